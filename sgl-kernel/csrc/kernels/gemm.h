// Products with few rows of x, and with the rows of A: y = x W^T for decoding, u = x A^T alone, or both in one launch.
//
// Up to 16 tokens go through stream_gemm.h, more through tile_gemm.h; both put the A rows of live slots after the rows of
// W as work of the same kind, and the batch says how many there are.
#pragma once

#include "sgl_kernel/geometry.h"
#include "sgl_kernel/lora.h"
#include "sgl_kernel/stream_gemm.h"
#include "sgl_kernel/tile_gemm.h"

namespace sgl {

// ---- few tokens: units of sixteen rows -----------------------------------------------------------------------------

// Units of A's rows, then of W's. A's are the first sixteen of every live slot, then the next sixteen, ...; a slot that is
// not live, or has no more rows, leaves its places empty. They come first because their rows are found one read later.
struct GemmWork {
  const GemmArgs& args;
  int first, stride;  // of this block's units
  // Asked for before there is a use for it, so that nobody waits then: whose the block's first unit is, and the slot of the
  // token that this thread will store.
  Live live;
  int token_slot;

  __device__ __forceinline__ GemmWork(const GemmArgs& args_, int first_, int stride_)
      : args(args_), first(first_), stride(stride_), live{-1, 0}, token_slot(-1) {
    if (first >= args.a_units) return;
    live = read_live(args.batch, first % args.max_live);
    const int token = thread_id() / (kStreamRows / 2);
    if (token < args.tokens) token_slot = args.batch.token_slot[token];
  }

  __device__ __forceinline__ int start() const { return existing(first); }
  __device__ __forceinline__ int next(int unit) const { return existing(unit + stride); }
  __device__ __forceinline__ bool exists(int unit) const { return unit < args.a_units + args.base_tiles; }
  __device__ __forceinline__ const bf16* row(int unit, int r) const {
    if (unit < args.a_units) {
      const ARows a = a_rows(unit);
      const int row = a_first(unit) + r;
      return row < a.count ? a.row(args.site, row) : nullptr;
    }
    const int n = (unit - args.a_units) * kStreamRows + r;
    return n < args.out_features ? args.weight + n * args.weight_stride : nullptr;
  }
  __device__ __forceinline__ const bf16* token(int, int t) const {
    return t < args.tokens ? args.x + t * args.x_stride : nullptr;
  }
  __device__ __forceinline__ int tokens(int) const { return args.tokens; }
  __device__ __forceinline__ void store(int unit, int r, int t, float low, float high) const {
    if (unit < args.a_units) {
      const ARows a = a_rows(unit);
      if (token_slot == a.slot) store_u(args.site, a, args.u + t * args.u_stride, a_first(unit) + r, low, high);
      return;
    }
    const int n = (unit - args.a_units) * kStreamRows + r;
    if (n < args.out_features) *reinterpret_cast<uint32_t*>(args.y + t * args.y_stride + n) = pack_bf16(low, high);
  }

  // Two sums of neighbouring rows of A, of which those beyond its rows are nobody's.
  SGL_DEVICE void store_u(const LoraSite& site, const ARows& a, bf16* u, int row, float low, float high) {
    if (row < a.count) u[a.u_column(site, row)] = to_bf16(low);
    if (row + 1 < a.count) u[a.u_column(site, row + 1)] = to_bf16(high);
  }

 private:
  __device__ __forceinline__ int a_first(int unit) const { return unit / args.max_live * kStreamRows; }
  __device__ __forceinline__ ARows a_rows(int unit) const {
    const Live own = unit == first ? live : read_live(args.batch, unit % args.max_live);
    return ARows::of(args.site, own.slot, own.rank);
  }
  // The unit, or this block's first after it that has rows.
  __device__ __forceinline__ int existing(int unit) const {
    while (unit < args.a_units && a_first(unit) >= a_rows(unit).count) unit += stride;
    return unit;
  }
};

// Blocks: clusters of num_splits, as many as there is room for; each walks through its units.
template <class Stream>
SGL_DEVICE void skinny_gemm_stream(const GemmArgs& args) {
  let_next_kernel_start();
  const Range k = part_of(args.in_features, cluster_rank(), cluster_size());
  Stream::run(GemmWork(args, block_x() / args.num_splits, grid_x() / args.num_splits), k.begin, k.end);
}

// Units of A's rows for one tile of at most sixteen tokens of one slot each.
struct ShrinkWork {
  const ShrinkArgs& args;
  int first, stride;
  Tile tile;
  ARows a;

  __device__ __forceinline__ int start() const { return first; }
  __device__ __forceinline__ int next(int unit) const { return unit + stride; }
  __device__ __forceinline__ bool exists(int unit) const { return unit * kStreamRows < a.count; }
  __device__ __forceinline__ const bf16* row(int unit, int r) const {
    const int row = unit * kStreamRows + r;
    return row < a.count ? a.row(args.site, row) : nullptr;
  }
  __device__ __forceinline__ int token_row(int t) const { return args.batch.perm[tile.start + t]; }
  __device__ __forceinline__ const bf16* token(int, int t) const {
    return t < tile.count ? args.x + token_row(t) * args.x_stride : nullptr;
  }
  __device__ __forceinline__ int tokens(int) const { return tile.count; }
  __device__ __forceinline__ void store(int unit, int r, int t, float low, float high) const {
    GemmWork::store_u(args.site, a, args.u + token_row(t) * args.u_stride, unit * kStreamRows + r, low, high);
  }
};

// Blocks: x a cluster of num_splits for sixteen rows of A, y a tile.
template <class Stream>
SGL_DEVICE void lora_shrink_stream(const ShrinkArgs& args) {
  let_next_kernel_start();
  const Tile tile = read_tile(args.batch, block_y());
  if (tile.count == 0 || tile.slot < 0) return wait_for_previous_kernel();
  const ARows a = ARows::of(args.site, tile.slot, tile.rank);
  const Range k = part_of(args.site.in_features, cluster_rank(), cluster_size());
  Stream::run(ShrinkWork{args, block_x() / args.num_splits, grid_x() / args.num_splits, tile, a}, k.begin, k.end);
}

// ---- more tokens: blocks of 64 or 128 rows -------------------------------------------------------------------------

// u of the rows [first, first + kRows) of an adapter's A; `token_row(t)` is the row of x and u, negative for no token.
template <class Gemm, class TokenRow>
SGL_DEVICE void shrink_tile(const LoraSite& site, const ARows& a, int first, const bf16* x, int64_t x_stride, bf16* u,
                            int64_t u_stride, int tokens, TokenRow token_row) {
  const int rows = a.count - first;
  if (rows <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  const Range k = part_of(site.in_features, cluster_rank(), cluster_size());
  Gemm gemm;
  gemm.run([&](int r) -> const bf16* { return r < rows ? a.row(site, first + r) : nullptr; },
           [&](int t) -> const bf16* {
             const int row = t < tokens ? token_row(t) : -1;
             return row < 0 ? nullptr : x + row * x_stride;
           },
           rows, k.begin, k.end);
  gemm.reduce(rows, tokens, [&](int r, int t, const Float4& sum) {
    const int row = token_row(t);
    if (row < 0) return;
    for (int j = 0; j < 4 && r + j < rows; ++j) u[row * u_stride + a.u_column(site, first + r + j)] = to_bf16(sum.v[j]);
  });
}

// Blocks: clusters of num_splits, one for each tile of W's rows and then some for those of A.
template <class Gemm>
SGL_DEVICE void skinny_gemm_tile(const GemmArgs& args) {
  let_next_kernel_start();
  const int cluster = block_x() / args.num_splits;
  if (cluster < args.base_tiles) {
    const int first = cluster * Gemm::kRows;
    const int left = args.out_features - first, rows = left < Gemm::kRows ? left : Gemm::kRows;
    const Range k = part_of(args.in_features, cluster_rank(), cluster_size());
    Gemm gemm;
    gemm.run([&](int r) { return r < rows ? args.weight + (first + r) * args.weight_stride : nullptr; },
             [&](int t) { return t < args.tokens ? args.x + t * args.x_stride : nullptr; }, rows, k.begin, k.end);
    gemm.reduce(rows, args.tokens, [&](int r, int t, const Float4& sum) {
      uint32_t* y = reinterpret_cast<uint32_t*>(args.y + t * args.y_stride + first + r);
      y[0] = pack_bf16(sum.v[0], sum.v[1]);
      y[1] = pack_bf16(sum.v[2], sum.v[3]);
    });
    return;
  }
  // Units of A's rows: every live slot's first kRows, then everyone's next, ...
  const int workers = grid_x() / args.num_splits - args.base_tiles, units = args.a_units;
  if (workers <= 0 || cluster - args.base_tiles >= units) return wait_for_previous_kernel();
  for (int unit = cluster - args.base_tiles; unit < units; unit += workers) {
    const Live live = read_live(args.batch, unit % args.max_live);
    const ARows a = ARows::of(args.site, live.slot, live.rank);
    shrink_tile<Gemm>(args.site, a, unit / args.max_live * Gemm::kRows, args.x, args.x_stride, args.u, args.u_stride,
                      args.tokens, [&](int t) { return args.batch.token_slot[t] == live.slot ? t : -1; });
  }
}

// Blocks: x a cluster of num_splits for kRows rows of A, y a tile of tokens of one slot.
template <class Gemm>
SGL_DEVICE void lora_shrink_tile(const ShrinkArgs& args) {
  let_next_kernel_start();
  const Tile tile = read_tile(args.batch, block_y());
  if (tile.count == 0 || tile.slot < 0) return wait_for_previous_kernel();
  const int first = block_x() / args.num_splits * Gemm::kRows;
  shrink_tile<Gemm>(args.site, ARows::of(args.site, tile.slot, tile.rank), first, args.x, args.x_stride, args.u, args.u_stride, tile.count,
                    [&](int t) { return args.batch.perm[tile.start + t]; });
}

}  // namespace sgl
