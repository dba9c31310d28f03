// Entry points of activation.h: token rows that a tile of the batch holds.
#include "activation.h"

#define SGL_SILU_AND_MUL(tile)                                                                                      \
  namespace sgl {                                                                                                   \
  using SiluAndMul##tile = SiluAndMul<activation_tokens(kWarp, tile)>;                                              \
  static_assert(SiluAndMul##tile::kThreads == activation_threads(kWarp), "geometry.h");                             \
  static_assert(SiluAndMul##tile::kSharedBytes == activation_shared_bytes(kWarp, tile, true), "geometry.h");        \
  static_assert(activation_shared_bytes(kWarp, tile, true) <= 65536, "shared memory");                              \
  }                                                                                                                 \
  SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), 3) silu_and_mul_##tile(SGL_ARGS(sgl::ActivationArgs) args) {   \
    sgl::silu_and_mul<sgl::SiluAndMul##tile>(args);                                                                 \
  }

SGL_SILU_AND_MUL(16)
SGL_SILU_AND_MUL(64)
