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

// ---- products for more tokens (tile_gemm.h) ------------------------------------------------------------------------

constexpr int gemm_halves(int warp) { return warp == 32 ? 2 : 1; }  // of K, for warps with the same token rows
constexpr int gemm_threads(int warp, int rows) { return rows / 16 * warp; }
constexpr int gemm_stages(int warp, int rows, int tokens) {
  if (warp == 64) return 2;  // copies are not asynchronous there, and 64 KiB is all there is
  return tokens == 32 ? 6 : 4;
}
constexpr int gemm_shared_bytes(int warp, int rows, int tokens) {
  return larger(gemm_stages(warp, rows, tokens) * (rows + tokens) * 128, gemm_halves(warp) * tokens * (rows + 4) * 4);
}

// ---- products of 17 to 64 tokens on Hopper (group_gemm.h) ------------------------------------------------------------

constexpr int kGroupTokens = 64;
constexpr int kGroupThreads = 160;
constexpr int kGroupStages = 8;
constexpr int kGroupSplits = 4;  // parts of K at most
constexpr int group_shared_bytes(int rows) {
  return 1024 + kGroupStages * ((rows + kGroupTokens) * 128 + 2 * 8);  // from a multiple of 1024 on; two counters of arrivals
}
// Elements of W that a block streams, in rounds of blocks, and what parts and blocks cost beside them: fitted to an H200.
constexpr int kGroupSplitCost = 50000, kGroupBlockCost = 400;
constexpr long long group_cost(int multiprocessors, int out_features, int in_features, int rows, int splits) {
  const int blocks = ceil_div(out_features, rows) * splits;
  // A cluster stays within a part of the GPU, so a few multiprocessors of every part find no work.
  const int room = splits > 1 ? larger(multiprocessors * 15 / 16 / splits, 1) * splits : multiprocessors;
  return 1LL * ceil_div(blocks, room) * rows * ceil_div(in_features, splits) + (splits > 1 ? kGroupSplitCost : 0) +
         smaller(blocks, multiprocessors) * kGroupBlockCost;
}
// The largest of 1, 1.5, 2, 3, 4, 6, ... that is not larger.
constexpr int round_down(int value) {
  int power = 1;
  while (power <= value / 2) power *= 2;
  return power / 2 * 3 <= value && power > 1 ? power / 2 * 3 : power;
}
// The best rows * 16 + splits. A few rows behind a weight, those of A, change nothing.
constexpr int group_choice(int multiprocessors, int out_features, int in_features) {
  int best = 0;
  long long least = 0;
  for (int rows = 128; rows >= 64; rows -= 32)
    for (int splits = 1; splits <= kGroupSplits && (splits == 1 || in_features / splits >= 256); ++splits) {
      const long long cost = group_cost(multiprocessors, round_down(out_features), in_features, rows, splits);
      if (best && cost >= least) continue;
      best = rows * 16 + splits;
      least = cost;
    }
  return best;
}

// ---- kernels that add a low-rank term (expand.h) -------------------------------------------------------------------
// Each is compiled for ranks up to 16 and 64 in registers; higher ranks are fetched as they are needed.

constexpr int kStripColumns = 32;  // of a warp

// Token rows of a warp at once, by those of the batch's tiles. Few where a step is waited for: what a lane does is code to be fetched.
constexpr int strip_tokens(int warp, int tile) { return tile == 16 && warp == 32 ? 8 : 16; }

// Prompts: warps that walk over the strips of a tile, and what they have in shared memory of it (StripInputs).
constexpr int kWalkTokens = 64;
constexpr int walk_shared_bytes(int warp, int threads, int factors) {
  const int rows = kWalkTokens / strip_tokens(warp, kWalkTokens) * (warp == 32 ? 2 : 1);  // of a thread
  return rows * threads * (2 * 16 + factors * 8);
}

constexpr int expand_warps(int warp) { return 128 / warp; }
constexpr int expand_threads(int warp) { return expand_warps(warp) * warp; }
constexpr int expand_blocks(int warp, int columns) { return ceil_div(columns, expand_warps(warp) * kStripColumns); }

// ---- residual add and norm (norm.h) --------------------------------------------------------------------------------
// `strip` is the token rows of a strip, 0 without a low-rank term: lanes have their columns in another order then.

constexpr int kNormPart = 32;  // columns of a row whose squares are one sum
constexpr int kNormRows = 16;  // token rows of a block at most
constexpr int kMaxHidden = 16384;
constexpr int kMaxCluster = 8;

// A block must find room beside two of a product: it is then there before the product has ended, and the next product's
// blocks find their place. Hence few threads where lanes have many registers.
constexpr int norm_warps(int warp, int strip) { return strip == 16 ? 4 : 256 / warp; }
constexpr int norm_threads(int warp, int strip) { return norm_warps(warp, strip) * warp; }
constexpr int norm_cluster(int tile, int hidden) {  // a good size where blocks can form clusters; 1 elsewhere
  const int wanted = ceil_div(hidden, tile == 16 ? 256 : 1024);
  return wanted > 4 ? 8 : wanted > 2 ? 4 : wanted;
}
// Parts that a block has, that its threads have at once, and the turns that it takes.
constexpr int norm_block_parts(int hidden, int cluster) { return ceil_div(ceil_div(hidden, kNormPart), cluster); }
constexpr int norm_parts_at_once(int warp, int block_tokens, int strip) {
  return strip ? norm_warps(warp, strip) : norm_threads(warp, 0) / 4 / block_tokens;
}
constexpr int norm_turns(int warp, int hidden, int cluster, int block_tokens, int strip) {
  return ceil_div(norm_block_parts(hidden, cluster), norm_parts_at_once(warp, block_tokens, strip));
}
constexpr int norm_turn_bytes(int warp, int strip) {
  return norm_threads(warp, strip) * (warp == 32 ? larger(1, strip / 8) : 1) * 16;
}
// Shared memory without the two parts that may be smaller than a row.
constexpr int norm_fixed_bytes(int hidden) { return (ceil_div(hidden, kNormPart) + 1) * kNormRows * 4; }
constexpr int norm_room(int warp, int hidden) { return (warp == 64 ? 65536 : 98304) - norm_fixed_bytes(hidden); }
// Columns of the weight that are fetched into shared memory ahead of the previous kernel's end.
constexpr int norm_staged(int hidden, int cluster) {
  return smaller(norm_block_parts(hidden, cluster) * kNormPart, 4096);
}
// Turns whose sums stay in shared memory until they are normalised; those of others are read again.
constexpr int norm_held(int warp, int hidden, int cluster, int block_tokens, int strip) {
  const int room = norm_room(warp, hidden) - norm_staged(hidden, cluster) * 2;
  return smaller(norm_turns(warp, hidden, cluster, block_tokens, strip), room / norm_turn_bytes(warp, strip));
}
constexpr int norm_shared_bytes(int warp, int hidden, int cluster, int block_tokens, int strip) {
  return norm_fixed_bytes(hidden) + norm_staged(hidden, cluster) * 2 +
         norm_held(warp, hidden, cluster, block_tokens, strip) * norm_turn_bytes(warp, strip);
}

// ---- SwiGLU (activation.h) -----------------------------------------------------------------------------------------

constexpr int kActivationRows = 4;  // that a lane takes, without a low-rank term

constexpr int activation_warps(int warp) { return 128 / warp; }
constexpr int activation_threads(int warp) { return activation_warps(warp) * warp; }
constexpr int activation_blocks(int warp, int inner, bool lora) {
  return ceil_div(inner, lora ? activation_warps(warp) * kStripColumns : activation_threads(warp) * 8);
}

// ---- head norm and rotation (rope.h) -------------------------------------------------------------------------------

// With a low-rank term a head has as many warps as it has pairs of strips; without one, a row of it has as many lanes as
// it has pairs of eight columns, and a block sixteen rows.

constexpr int kRopeRows = 16;

constexpr int rope_head_warps(int head_dim) { return head_dim / (2 * kStripColumns); }
constexpr int rope_block_heads(int head_dim, int tile, bool lora) {
  return tile == 16 ? 1 : lora ? 4 / rope_head_warps(head_dim) : 4;
}
constexpr int rope_threads(int warp, int head_dim, int block_heads, bool lora) {
  return lora ? rope_head_warps(head_dim) * block_heads * warp : head_dim;
}
constexpr int rope_sums_bytes(int head_dim, int block_heads) {  // two buffers of sums of squares
  return rope_head_warps(head_dim) == 1 ? 0 : 2 * block_heads * rope_head_warps(head_dim) * 16 * 4;
}
constexpr int rope_shared_bytes(int warp, int head_dim, int block_heads, int tile, bool lora) {
  const int walk = tile == kWalkTokens ? walk_shared_bytes(warp, rope_threads(warp, head_dim, block_heads, lora), 1) : 0;
  return lora ? rope_sums_bytes(head_dim, block_heads) + walk : 0;
}

}  // namespace sgl
