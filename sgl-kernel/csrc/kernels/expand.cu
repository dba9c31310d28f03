// Entry points of expand.h: tokens a tile holds x columns a block computes.
#include "expand.h"

#include "sgl_kernel/geometry.h"

#define SGL_EXPAND(tokens, columns)                                              \
  static_assert(sgl::ExpandTile<tokens, columns>::kOperandBytes == sgl::expand_operand_bytes(tokens, columns), ""); \
  static_assert(sgl::ExpandTile<tokens, columns>::kDeltaBytes == sgl::expand_delta_bytes(tokens, columns), "");     \
  SGL_KERNEL(sgl::expand_threads(sgl::kWarp, columns))                           \
  lora_expand_add_##tokens##x##columns(SGL_ARGS(sgl::ExpandArgs) args) {         \
    sgl::lora_expand_add<sgl::ExpandTile<tokens, columns>>(args);                \
  }

SGL_EXPAND(16, 128)
SGL_EXPAND(64, 128)
