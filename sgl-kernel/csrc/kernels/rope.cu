// Entry points of rope.h: alone, by the width of a head, and with a low-rank term, by the token rows of a tile and the ranks that
// are kept in registers as well.
#include "rope.h"

#define SGL_ROPE_OF(head_dim, tile, rank, warps, blocks)                                    \
  static_assert(warps == sgl::rope_head_warps(head_dim) * sgl::rope_block_heads(head_dim, tile, true), "geometry.h"); \
  SGL_KERNEL_OF(warps * sgl::kWarp, blocks)                                                 \
  qk_norm_rope_##head_dim##x##tile##x##rank(SGL_ARGS(sgl::RopeArgs) args) {                 \
    sgl::qk_norm_rope<head_dim, sgl::Strip<tile == 16 ? 8 : 16>, rank / 16, tile == 64>(args);                               \
  }
#define SGL_ROPE(head_dim, few)                                                               \
  SGL_KERNEL_OF(head_dim, 768 / head_dim) qk_norm_rope_##head_dim(SGL_ARGS(sgl::RopeArgs) args) { \
    sgl::qk_norm_rope_plain<head_dim>(args);                                                  \
  }                                                                                           \
  SGL_ROPE_OF(head_dim, 16, 16, few, 8 / few)                                                 \
  SGL_ROPE_OF(head_dim, 16, 64, few, 8 / few)                                                 \
  SGL_ROPE_OF(head_dim, 64, 16, 4, 4)                                                         \
  SGL_ROPE_OF(head_dim, 64, 64, 4, 2)

SGL_ROPE(64, 1)
SGL_ROPE(128, 2)
SGL_ROPE(256, 4)
