// How rows of 64 bf16 lie in shared memory.
#pragma once

#include "vendor.h"

namespace sgl {

// Place of a sixteen-byte chunk of a 128-byte row, so that the eight rows a warp reads at once are in different banks.
SGL_DEVICE int swizzle(int row, int chunk) { return (row * 8 + (chunk ^ (row & 7))) * 16; }

}  // namespace sgl
