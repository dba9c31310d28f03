// Sizes of blocks and of their shared memory, as host and device both need them. A kernel's own constants are checked
// against these where it is instantiated. `warp` is 32 on CUDA and 64 on ROCm.
#pragma once

namespace sgl {

constexpr int kDynamicSharedAlign = 128;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// ---- products with a long sum (tile_gemm.h) ------------------------------------------------------------------------

constexpr int gemm_threads(int warp, int rows) { return rows / 16 * warp; }
constexpr int gemm_stages(int warp, int rows, int tokens) {
  if (warp == 64) return 2;  // copies are not asynchronous there, and 64 KiB is all there is
  return rows == 64 && tokens == 16 ? 8 : rows == 64 && tokens == 32 ? 6 : 4;
}
constexpr int gemm_shared_bytes(int warp, int rows, int tokens) {
  return larger(gemm_stages(warp, rows, tokens) * (rows + tokens) * 128, tokens * (rows + 4) * 4);
}

// ---- the low-rank term of a tile (expand.h) ------------------------------------------------------------------------

constexpr int expand_threads(int warp, int columns) { return columns / 16 * warp; }
constexpr int expand_operand_bytes(int tokens, int columns) { return (columns + tokens) * (64 + 8) * 2; }
constexpr int expand_delta_bytes(int tokens, int columns) { return tokens * (columns + 4) * 4; }
constexpr int expand_shared_bytes(int tokens, int columns) {
  return expand_operand_bytes(tokens, columns) + expand_delta_bytes(tokens, columns);
}

}  // namespace sgl
