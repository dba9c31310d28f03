// Entry points of activation.h: alone, and with a low-rank term, named by the token rows of a tile and the ranks that are
// kept in registers.
#include "activation.h"

SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), 8) silu_and_mul(SGL_ARGS(sgl::ActivationArgs) args) {
  sgl::silu_and_mul_plain(args);
}

#define SGL_SILU_AND_MUL(tile, rank, blocks)                     \
  SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), blocks)     \
  silu_and_mul_##tile##x##rank(SGL_ARGS(sgl::ActivationArgs) args) { \
    sgl::silu_and_mul<sgl::Strip<tile == 16 ? 8 : 16>, rank / 16, tile == 64>(args); \
  }

SGL_SILU_AND_MUL(16, 16, 4)
SGL_SILU_AND_MUL(16, 64, 2)
SGL_SILU_AND_MUL(64, 16, 4)
SGL_SILU_AND_MUL(64, 64, 2)
