// Entry points of rope.h: width of a head x token rows that a tile of the batch holds.
#include "rope.h"

#define SGL_ROPE(head_dim, tile)                                                                                    \
  namespace sgl {                                                                                                   \
  using QkNormRope##head_dim##x##tile = QkNormRope<rope_tokens(kWarp, head_dim, tile), head_dim>;                   \
  static_assert(QkNormRope##head_dim##x##tile::kThreads == rope_threads(kWarp, head_dim), "geometry.h");            \
  static_assert(QkNormRope##head_dim##x##tile::kSharedBytes == rope_shared_bytes(kWarp, head_dim, tile, true),      \
                "geometry.h");                                                                                      \
  static_assert(rope_shared_bytes(kWarp, head_dim, tile, true) <= 65536, "shared memory");                          \
  }                                                                                                                 \
  SGL_KERNEL_OF(sgl::rope_threads(sgl::kWarp, head_dim), (tile == 16 ? 512 : 768) / sgl::rope_threads(32, head_dim)) \
  qk_norm_rope_##head_dim##x##tile(SGL_ARGS(sgl::RopeArgs) args) {                                                  \
    sgl::qk_norm_rope<sgl::QkNormRope##head_dim##x##tile>(args);                                                    \
  }

SGL_ROPE(64, 16)
SGL_ROPE(64, 64)
SGL_ROPE(128, 16)
SGL_ROPE(128, 64)
SGL_ROPE(256, 16)
SGL_ROPE(256, 64)
