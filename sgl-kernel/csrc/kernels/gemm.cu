// Entry points of gemm.h and group_gemm.h, named by the token rows of a block and its rows of weights, where there is a choice.
#include "gemm.h"

#include "sgl_kernel/geometry.h"
#include "sgl_kernel/group_gemm.h"

namespace sgl {

template <int kTokens>
struct Stream : StreamGemm<stream_tokens(kWarp, kTokens), stream_warps(kWarp), stream_stages(kWarp, kTokens)> {
  using Base = StreamGemm<stream_tokens(kWarp, kTokens), stream_warps(kWarp), stream_stages(kWarp, kTokens)>;
  static_assert(Base::kThreads == kStreamThreads, "geometry.h");
  static_assert(Base::kSharedBytes == stream_shared_bytes(kWarp, kTokens), "geometry.h");
};

template <int kTokens, int kRows>
struct Block : TileGemm<kRows, kTokens, gemm_stages(kWarp, kRows, kTokens)> {
  using Base = TileGemm<kRows, kTokens, gemm_stages(kWarp, kRows, kTokens)>;
  static_assert(Base::kThreads == gemm_threads(kWarp, kRows), "geometry.h");
  static_assert(Base::kSharedBytes == gemm_shared_bytes(kWarp, kRows, kTokens), "geometry.h");
};

}  // namespace sgl

#define SGL_STREAM(name, type, tokens)                                       \
  SGL_KERNEL(sgl::kStreamThreads) name##_##tokens(SGL_ARGS(sgl::type) args) { \
    sgl::name##_stream<sgl::Stream<tokens>>(args);                           \
  }
#define SGL_TILE(name, type, tokens, rows)                     \
  SGL_KERNEL(sgl::gemm_threads(sgl::kWarp, rows))              \
  name##_##tokens##x##rows(SGL_ARGS(sgl::type) args) {         \
    sgl::name##_tile<sgl::Block<tokens, rows>>(args);          \
  }

// The host asks for these where there are warpgroups, but every GPU has all kernels of a vendor. A build without the code of
// 9.0a would come here on a Hopper GPU.
#if SGL_WARPGROUPS
#define SGL_RUN_GROUP(rows, args) sgl::GroupGemm<rows>::run(args)
#else
#define SGL_RUN_GROUP(rows, args) sgl::trap()
#endif
#define SGL_GROUP(rows)                                                                              \
  SGL_KERNEL_OF(sgl::kGroupThreads, 1) skinny_gemm_group_##rows(SGL_ARGS(sgl::GroupGemmArgs) args) { \
    SGL_RUN_GROUP(rows, args);                                                                       \
  }

SGL_STREAM(skinny_gemm, GemmArgs, 8)
SGL_STREAM(skinny_gemm, GemmArgs, 16)
SGL_STREAM(lora_shrink, ShrinkArgs, 16)
SGL_TILE(skinny_gemm, GemmArgs, 32, 64)
SGL_TILE(skinny_gemm, GemmArgs, 64, 64)
SGL_TILE(lora_shrink, ShrinkArgs, 64, 64)
#if SGL_CUDA
SGL_GROUP(64)
SGL_GROUP(96)
SGL_GROUP(128)
#endif
