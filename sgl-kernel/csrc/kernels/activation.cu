// Entry points of activation.h: alone, and with a low-rank term, named by the ranks that are kept in registers.
#include "activation.h"

SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), 8) silu_and_mul(SGL_ARGS(sgl::ActivationArgs) args) {
  sgl::silu_and_mul_plain(args);
}
SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), 4) silu_and_mul_16(SGL_ARGS(sgl::ActivationArgs) args) {
  sgl::silu_and_mul<1>(args);
}
SGL_KERNEL_OF(sgl::activation_threads(sgl::kWarp), 2) silu_and_mul_64(SGL_ARGS(sgl::ActivationArgs) args) {
  sgl::silu_and_mul<4>(args);
}
