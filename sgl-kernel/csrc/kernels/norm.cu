// Entry points of norm.h: alone, and with a low-rank term, named by the ranks that are kept in registers.
#include "norm.h"

static_assert(sgl::Strip::kColumns == sgl::kStripColumns && sgl::kNormPart == sgl::kStripColumns, "geometry.h");
static_assert(sgl::norm_turn_bytes(sgl::kWarp, true) == sgl::norm_threads(sgl::kWarp) * sgl::Strip::kRows * 16, "geometry.h");
static_assert(sgl::norm_room(sgl::kWarp, sgl::kMaxHidden, 1) >= 2 * sgl::norm_staged(sgl::kMaxHidden, 1), "shared memory");

SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp), 3) fused_add_rmsnorm(SGL_ARGS(sgl::NormArgs) args) {
  sgl::fused_add_rmsnorm<sgl::Lines, 0>(args);
}
SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp), 2) fused_add_rmsnorm_16(SGL_ARGS(sgl::NormArgs) args) {
  sgl::fused_add_rmsnorm<sgl::Strips, 1>(args);
}
SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp), 1) fused_add_rmsnorm_64(SGL_ARGS(sgl::NormArgs) args) {
  sgl::fused_add_rmsnorm<sgl::Strips, 4>(args);
}
