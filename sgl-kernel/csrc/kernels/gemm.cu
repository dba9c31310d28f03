// Entry points of gemm.h: weight rows a block x token rows it can hold.
#include "gemm.h"

#include "sgl_kernel/geometry.h"

namespace sgl {
template <int kRows, int kTokens>
struct Gemm : TileGemm<kRows, kTokens, gemm_stages(kWarp, kRows, kTokens)> {
  using Base = TileGemm<kRows, kTokens, gemm_stages(kWarp, kRows, kTokens)>;
  static_assert(Base::kThreads == gemm_threads(kWarp, kRows), "geometry.h");
  static_assert(Base::kSharedBytes == gemm_shared_bytes(kWarp, kRows, kTokens), "geometry.h");
};
}  // namespace sgl

#define SGL_GEMM(rows, tokens)                                                 \
  SGL_KERNEL(sgl::gemm_threads(sgl::kWarp, rows))                              \
  skinny_gemm_##rows##x##tokens(SGL_ARGS(sgl::GemmArgs) args) {                \
    sgl::skinny_gemm<sgl::Gemm<rows, tokens>>(args);                           \
  }
#define SGL_SHRINK(rows, tokens)                                               \
  SGL_KERNEL(sgl::gemm_threads(sgl::kWarp, rows))                              \
  lora_shrink_##rows##x##tokens(SGL_ARGS(sgl::ShrinkArgs) args) {              \
    sgl::lora_shrink<sgl::Gemm<rows, tokens>>(args);                           \
  }

SGL_GEMM(64, 16)
SGL_GEMM(64, 32)
SGL_GEMM(64, 64)
SGL_GEMM(128, 64)
SGL_SHRINK(64, 16)
SGL_SHRINK(64, 64)
