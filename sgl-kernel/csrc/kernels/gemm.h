// Products with few rows of x, and with the rows of A: y = x W^T for decoding, u = x A^T alone, or both in one launch.
//
// Up to 16 tokens go through stream_gemm.h, more through tile_gemm.h; both put the A rows of live slots after the rows of
// W as work of the same kind, and the batch says how many there are. Hopper takes more tokens without adapters through
// group_gemm.h.
#pragma once

#include "sgl_kernel/geometry.h"
#include "sgl_kernel/lora.h"
#include "sgl_kernel/stream_gemm.h"
#include "sgl_kernel/tile_gemm.h"

namespace sgl {

// ---- few tokens: units of sixteen rows -----------------------------------------------------------------------------

// Rows of W or A, from `first` on: those of A have gaps after every `rank` rows.
struct RowSource {
  const bf16* base;
  int64_t stride;
  int first, count, rank, gap;

  SGL_DEVICE RowSource of(const LoraSite& site, const ARows& a, int first) {
    return {a_of(site, a.slot), site.in_features, first, a.count, a.rank, site.rank_cap - a.rank};
  }
  __device__ __forceinline__ const bf16* operator()(int r) const {
    const int row = first + r;
    return row < count ? base + (row + ((row >= rank) + (row >= 2 * rank)) * gap) * stride : nullptr;
  }
};

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

  // Who adds B u next would wait for B while weights keep the memory busy: a block that multiplies with A asks for its
  // share of that adapter's B to be in the last cache by then.
  __device__ __forceinline__ void before_wait() const {
    if (first >= args.a_units || live.slot < 0) return;
    const int blocks = (args.site.num_slices * live.rank + kStreamRows - 1) / kStreamRows;
    const int place = first / args.max_live * kStreamThreads + thread_id();
    for (int slice = 0; slice < args.site.num_slices && place < blocks * kStreamThreads; ++slice) {
      const int rows = slice == 0 ? args.site.out_features[0] : slice == 1 ? args.site.out_features[1] : args.site.out_features[2];
      const bf16* b = b_of(args.site, live.slot, slice);
      for (int line = place; line < rows * b_stride(live.rank) / 64; line += blocks * kStreamThreads) prefetch_l2(b + line * 64);
    }
  }
  __device__ __forceinline__ int start() const { return existing(first); }
  __device__ __forceinline__ int next(int unit) const { return existing(unit + stride); }
  __device__ __forceinline__ bool exists(int unit) const { return unit < args.a_units + args.base_tiles; }
  __device__ __forceinline__ RowSource rows(int unit) const {
    if (unit >= args.a_units) {
      const int row = (unit - args.a_units) * kStreamRows;
      return {args.weight, args.weight_stride, row, args.out_features, args.out_features, 0};
    }
    return RowSource::of(args.site, a_rows(unit), a_first(unit));
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
    if (row < a.count) u[a.place(site, row)] = to_bf16(low);
    if (row + 1 < a.count) u[a.place(site, row + 1)] = to_bf16(high);
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

  __device__ __forceinline__ void before_wait() const {}
  __device__ __forceinline__ int start() const { return first; }
  __device__ __forceinline__ int next(int unit) const { return unit + stride; }
  __device__ __forceinline__ bool exists(int unit) const { return unit * kStreamRows < a.count; }
  __device__ __forceinline__ RowSource rows(int unit) const { return RowSource::of(args.site, a, unit * kStreamRows); }
  __device__ __forceinline__ int token_row(int t) const { return args.batch.perm[tile.start + t]; }
  __device__ __forceinline__ const bf16* token(int, int t) const {
    return t < tile.count ? args.x + token_row(t) * args.x_stride : nullptr;
  }
  __device__ __forceinline__ int tokens(int) const { return tile.count; }
  __device__ __forceinline__ void store(int unit, int r, int t, float low, float high) const {
    GemmWork::store_u(args.site, a, args.u + token_row(t) * args.u_stride, unit * kStreamRows + r, low, high);
  }
};

// Blocks: x sixteen rows of A, y a tile.
template <class Stream>
SGL_DEVICE void lora_shrink_stream(const ShrinkArgs& args) {
  let_next_kernel_start();
  const Tile tile = read_tile(args.batch, block_y());
  if (tile.count == 0 || tile.slot < 0) return wait_for_previous_kernel();
  const ARows a = ARows::of(args.site, tile.slot, tile.rank);
  Stream::run(ShrinkWork{args, block_x(), grid_x(), tile, a}, 0, args.site.in_features);
}

// ---- more tokens: blocks of 64 rows --------------------------------------------------------------------------------

// u of the rows [first, first + kRows) of an adapter's A; `token_row(t)` is the row of x and u, negative for no token.
template <class Gemm, class TokenRow>
SGL_DEVICE void shrink_tile(const LoraSite& site, const ARows& a, int first, const bf16* x, int64_t x_stride, bf16* u,
                            int64_t u_stride, int tokens, TokenRow token_row) {
  const int rows = a.count - first;
  if (rows <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  const Range k = part_of(site.in_features, cluster_rank(), cluster_size());
  Gemm gemm;
  gemm.run(RowSource::of(site, a, first),
           [&](int t) -> const bf16* {
             const int row = t < tokens ? token_row(t) : -1;
             return row < 0 ? nullptr : x + row * x_stride;
           },
           rows, k.begin, k.end);
  gemm.reduce(rows, tokens, [&](int r, int t, const Float4& sum) {
    const int row = token_row(t);
    if (row < 0) return;
    for (int j = 0; j < 4 && r + j < rows; ++j) u[row * u_stride + a.place(site, first + r + j)] = to_bf16(sum.v[j]);
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

// Blocks: x kRows rows of A, y a tile of tokens of one slot.
template <class Gemm>
SGL_DEVICE void lora_shrink_tile(const ShrinkArgs& args) {
  let_next_kernel_start();
  const Tile tile = read_tile(args.batch, block_y());
  if (tile.count == 0 || tile.slot < 0) return wait_for_previous_kernel();
  const int first = block_x() * Gemm::kRows;
  shrink_tile<Gemm>(args.site, ARows::of(args.site, tile.slot, tile.rank), first, args.x, args.x_stride, args.u, args.u_stride, tile.count,
                    [&](int t) { return args.batch.perm[tile.start + t]; });
}

}  // namespace sgl
