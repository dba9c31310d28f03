// Entry points of expand.h, named by the ranks that are kept in registers.
#include "expand.h"

#define SGL_EXPAND(rank)                                                                   \
  SGL_KERNEL(sgl::expand_threads(sgl::kWarp)) lora_expand_add_##rank(SGL_ARGS(sgl::ExpandArgs) args) { \
    sgl::lora_expand_add<rank / 16>(args);                                                 \
  }

SGL_EXPAND(16)
SGL_EXPAND(64)
