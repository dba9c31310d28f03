// The code objects that the build embeds, as SGL_IMAGE(symbol, "path") lines of the generated images.inc.
#pragma once

#define SGL_IMAGE(symbol, path)                                                                     \
  asm(".pushsection .rodata.sgl_images,\"a\",@progbits\n.balign 4096\n.hidden sgl_image_" #symbol   \
      "\n.globl sgl_image_" #symbol "\nsgl_image_" #symbol ":\n.incbin \"" path                     \
      "\"\n.balign 16\n.popsection\n");                                                             \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char sgl_image_##symbol[];
#include "images.inc"
#undef SGL_IMAGE

namespace sgl::driver {
#define SGL_IMAGE(symbol, path) sgl_image_##symbol,
inline const unsigned char* const kImages[] = {
#include "images.inc"
};
#undef SGL_IMAGE
constexpr int kNumImages = sizeof(kImages) / sizeof(kImages[0]);
}  // namespace sgl::driver
