// Sizes of blocks and of their shared memory, as host and device both need them. A kernel's own constants are checked
// against these where it is instantiated. `warp` is 32 on CUDA and 64 on ROCm.
#pragma once

namespace sgl {

constexpr int kDynamicSharedAlign = 128;

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

// ---- products for up to 16 tokens (stream_gemm.h) ------------------------------------------------------------------

constexpr int kStreamRows = 16;
constexpr int kStreamThreads = 256;

constexpr int stream_tokens(int warp, int tokens) { return tokens <= 8 && warp == 32 ? 8 : 16; }
constexpr int stream_warps(int warp) { return 256 / warp; }
constexpr int stream_stages(int warp, int tokens) { return warp == 64 ? 2 : tokens <= 8 ? 4 : 3; }
constexpr int stream_shared_bytes(int warp, int tokens) {
  const int columns = stream_tokens(warp, tokens), stage = (kStreamRows + columns) * 128;
  return stream_warps(warp) * (stream_stages(warp, tokens) * stage + columns * (kStreamRows + 4) * 4);
}

// ---- products with a long sum (tile_gemm.h) ------------------------------------------------------------------------

constexpr int gemm_threads(int warp, int rows) { return rows / 16 * warp; }
constexpr int gemm_stages(int warp, int rows, int tokens) {
  if (warp == 64) return 2;  // copies are not asynchronous there, and 64 KiB is all there is
  return tokens == 32 ? 6 : 4;
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

// ---- residual add and norm (norm.h) --------------------------------------------------------------------------------
// `tile` is 16 or 64, as in the kernel's name; token rows a block takes are a power of two up to norm_tokens().

constexpr int kNormPart = 128;  // columns of a row whose squares are one sum
constexpr int kMaxHidden = 16384;
constexpr int kMaxCluster = 8;

constexpr int norm_tokens(int tile) { return tile == 16 ? 16 : 32; }
constexpr int norm_columns(int tile) { return tile == 16 ? 256 : 128; }  // of the low-rank term at once
constexpr int norm_threads(int warp, int tile) { return expand_threads(warp, norm_columns(tile)); }
// Rows that the threads cover at once with eight columns each, and how often they do for all rows of a block.
constexpr int norm_row_groups(int warp, int tile) { return norm_threads(warp, tile) / (norm_columns(tile) / 8); }
constexpr int norm_passes(int warp, int tile) { return ceil_div(norm_tokens(tile), norm_row_groups(warp, tile)); }
constexpr int norm_cluster(int tile, int hidden) {  // a good size where blocks can form clusters; 1 elsewhere
  const int wanted = ceil_div(hidden, tile == 16 ? 256 : 512);
  return wanted > 4 ? 8 : wanted > 2 ? 4 : wanted;
}
constexpr int norm_block_columns(int hidden, int cluster) {
  return ceil_div(ceil_div(hidden, kNormPart), cluster) * kNormPart;
}
constexpr int norm_step_bytes(int warp, int tile) { return norm_passes(warp, tile) * norm_threads(warp, tile) * 16; }
// Shared memory without the two parts that may be smaller than a row.
constexpr int norm_fixed_bytes(int tile, int hidden, int cluster, bool delta) {
  const int sums = (norm_block_columns(hidden, cluster) / kNormPart + 1) * norm_tokens(tile) * 4;
  return sums + (delta ? expand_shared_bytes(norm_tokens(tile), norm_columns(tile)) : 0);
}
constexpr int norm_room(int warp, int tile, int hidden, int cluster, bool delta) {
  return (warp == 64 ? 65536 : 98304) - norm_fixed_bytes(tile, hidden, cluster, delta);
}
// Columns of the weight that are fetched into shared memory ahead of the previous kernel's end.
constexpr int norm_staged(int warp, int tile, int hidden, int cluster, bool delta) {
  const int room = norm_room(warp, tile, hidden, cluster, delta) / 16 * 8;
  return smaller(smaller(norm_block_columns(hidden, cluster), 4096), room);
}
// Steps in which a block walks its columns; without a low-rank term fewer rows leave threads for more of them.
constexpr int norm_steps(int warp, int tile, int hidden, int cluster, int block_tokens, bool delta) {
  const int row_groups = norm_row_groups(warp, tile), rows = delta ? row_groups : smaller(block_tokens, row_groups);
  return ceil_div(norm_block_columns(hidden, cluster), norm_threads(warp, tile) * 8 / rows);
}
// Steps whose sums stay in shared memory until they are normalised; those of others are read again.
constexpr int norm_held(int warp, int tile, int hidden, int cluster, int block_tokens, bool delta) {
  const int room = norm_room(warp, tile, hidden, cluster, delta) - norm_staged(warp, tile, hidden, cluster, delta) * 2;
  const int steps = norm_steps(warp, tile, hidden, cluster, block_tokens, delta);
  const int most = tile == 16 ? room : smaller(room, 40960);  // with more, fewer blocks would run at once
  return smaller(steps, most / norm_step_bytes(warp, tile));
}
constexpr int norm_shared_bytes(int warp, int tile, int hidden, int cluster, int block_tokens, bool delta) {
  return norm_fixed_bytes(tile, hidden, cluster, delta) + norm_staged(warp, tile, hidden, cluster, delta) * 2 +
         norm_held(warp, tile, hidden, cluster, block_tokens, delta) * norm_step_bytes(warp, tile);
}

// ---- SwiGLU (activation.h) -----------------------------------------------------------------------------------------

constexpr int kActivationColumns = 128;

constexpr int activation_tokens(int warp, int tile) { return tile == 16 ? 16 : warp == 64 ? 64 : 32; }
constexpr int activation_threads(int warp) { return expand_threads(warp, kActivationColumns); }
constexpr int activation_shared_bytes(int warp, int tile, bool delta) {
  // With few tokens gate and up have their own operands, so that both are fetched ahead.
  const int tokens = activation_tokens(warp, tile);
  const int operands = expand_operand_bytes(tokens, kActivationColumns) * (tile == 16 ? 2 : 1);
  return delta ? operands + expand_delta_bytes(tokens, kActivationColumns) : 0;
}

// ---- head norm and rotation (rope.h) -------------------------------------------------------------------------------

constexpr int rope_tokens(int warp, int head_dim, int tile) {  // as many as have their own lanes, and room
  return tile == 16 || head_dim == 256 ? 16 : warp == 64 ? 64 : 32;
}
constexpr int rope_threads(int warp, int head_dim) { return expand_threads(warp, head_dim); }
constexpr int rope_shared_bytes(int warp, int head_dim, int tile, bool delta) {
  return delta ? expand_shared_bytes(rope_tokens(warp, head_dim, tile), head_dim) : 0;
}

}  // namespace sgl
