// Entry points of norm.h: alone, and with a low-rank term, named by the token rows of a tile and the ranks that are kept in
// registers.
#include "norm.h"

static_assert(sgl::Strip<8>::kColumns == sgl::kStripColumns && sgl::kNormPart == sgl::kStripColumns, "geometry.h");
static_assert(sgl::norm_room(sgl::kWarp, sgl::kMaxHidden) >= 2 * sgl::norm_staged(sgl::kMaxHidden, 1), "shared memory");

SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp, 0), 4) fused_add_rmsnorm(SGL_ARGS(sgl::NormArgs) args) {
  sgl::fused_add_rmsnorm<sgl::Lines, 0>(args);
}

#define SGL_NORM(tile, rank, blocks)                                                                          \
  static_assert(sgl::Strip<tile == 16 ? 8 : 16>::kTokens == sgl::strip_tokens(sgl::kWarp, tile), "geometry.h"); \
  SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp, sgl::strip_tokens(sgl::kWarp, tile)), blocks)                                                  \
  fused_add_rmsnorm_##tile##x##rank(SGL_ARGS(sgl::NormArgs) args) {                                           \
    sgl::fused_add_rmsnorm<sgl::Strips<sgl::Strip<tile == 16 ? 8 : 16>>, rank / 16>(args);                    \
  }

SGL_NORM(16, 16, sgl::kStartsEarly ? 4 : 3)
SGL_NORM(16, 64, 2)
SGL_NORM(64, 16, 4)
SGL_NORM(64, 64, 2)
