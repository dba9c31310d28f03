// Entry points of norm.h: token rows that a tile of the batch holds.
#include "norm.h"

#define SGL_NORM(tile)                                                                                              \
  static_assert(sgl::AddNorm<tile>::kThreads == sgl::norm_threads(sgl::kWarp, tile), "");                           \
  static_assert(sgl::AddNorm<tile>::kRowGroups == sgl::norm_row_groups(sgl::kWarp, tile), "");                      \
  static_assert(sgl::AddNorm<tile>::kPasses == sgl::norm_passes(sgl::kWarp, tile), "");                             \
  static_assert(sgl::AddNorm<tile>::Expand::kOperandBytes + sgl::AddNorm<tile>::Expand::kDeltaBytes ==              \
                sgl::expand_shared_bytes(sgl::norm_tokens(tile), sgl::norm_columns(tile)), "");                     \
  static_assert(sgl::norm_room(sgl::kWarp, tile, sgl::kMaxHidden, 1, true) >= 0, "shared memory");                  \
  SGL_KERNEL_OF(sgl::norm_threads(sgl::kWarp, tile), tile == 16 ? 2 : 3)                                            \
  fused_add_rmsnorm_##tile(SGL_ARGS(sgl::NormArgs) args) {                                                          \
    sgl::fused_add_rmsnorm<tile>(args);                                                                             \
  }

SGL_NORM(16)
SGL_NORM(64)
