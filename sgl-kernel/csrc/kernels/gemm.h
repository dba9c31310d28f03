// Products with few rows of x, and with the rows of A: y = x W^T for decoding, u = x A^T alone, or both in one launch.
//
// Up to 16 tokens go through stream_gemm.h, more through tile_gemm.h; both put the A rows of live slots after the rows of
// W as work of the same kind, and the batch says how many there are.
#pragma once

#include "sgl_kernel/lora.h"
#include "sgl_kernel/stream_gemm.h"
#include "sgl_kernel/tile_gemm.h"

namespace sgl {

// ---- few tokens: units of sixteen rows -----------------------------------------------------------------------------

// Rows of A of one slot, from `first` on.
struct AUnit {
  int slot, first;
  ARows a;

  __device__ __forceinline__ const bf16* row(const LoraSite& site, int r) const {
    if (first + r >= count(a)) return nullptr;
    const ARow place = locate(a, first + r);
    return a_of(site, slot, place.slice) + static_cast<int64_t>(place.row) * site.in_features;
  }
  __device__ __forceinline__ void store(const LoraSite& site, bf16* u, int r, float low, float high) const {
    const float sums[2] = {low, high};
    SGL_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (first + r + i >= count(a)) return;
      const ARow place = locate(a, first + r + i);
      u[place.slice * site.rank_cap + place.row] = to_bf16(sums[i]);
    }
  }
};

// Units of W's rows, then of the A rows of every live slot.
struct GemmWork {
  const GemmArgs& args;

  __device__ __forceinline__ int units_of_slot() const { return (args.site.num_slices * args.site.rank_cap + 15) / 16; }
  // How many slots are live is asked for only where it matters: no block waits for it before its first weights.
  __device__ __forceinline__ bool exists(int unit) const {
    if (unit < args.base_tiles) return true;
    return unit < args.max_units && unit < args.base_tiles + num_live_slots(args.batch) * units_of_slot();
  }
  __device__ __forceinline__ AUnit a_unit(int unit) const {
    const int index = unit - args.base_tiles, each = units_of_slot(), slot = args.batch.live[index / each];
    return {slot, index % each * 16, ARows::of(args.site, slot)};
  }
  __device__ __forceinline__ const bf16* row(int unit, int r) const {
    if (unit >= args.base_tiles) return a_unit(unit).row(args.site, r);
    const int n = unit * 16 + r;
    return n < args.out_features ? args.weight + n * args.weight_stride : nullptr;
  }
  __device__ __forceinline__ const bf16* token(int, int t) const {
    return t < args.tokens ? args.x + t * args.x_stride : nullptr;
  }
  __device__ __forceinline__ int tokens(int) const { return args.tokens; }
  __device__ __forceinline__ void store(int unit, int r, int t, float low, float high) const {
    if (unit < args.base_tiles) {
      const int n = unit * 16 + r;
      if (n < args.out_features) *reinterpret_cast<uint32_t*>(args.y + t * args.y_stride + n) = pack_bf16(low, high);
      return;
    }
    const AUnit a = a_unit(unit);
    if (args.batch.token_slot[t] == a.slot) a.store(args.site, args.u + t * args.u_stride, r, low, high);
  }
};

// Blocks: clusters of num_splits, as many as there is room for; each walks through its units.
template <class Stream>
SGL_DEVICE void skinny_gemm_stream(const GemmArgs& args) {
  let_next_kernel_start();
  const Range k = part_of(args.in_features, cluster_rank(), cluster_size());
  Stream::run(GemmWork{args}, block_x() / args.num_splits, grid_x() / args.num_splits, k.begin, k.end);
}

// Units of A's rows for one tile of at most sixteen tokens of one slot each.
struct ShrinkWork {
  const ShrinkArgs& args;
  Tile tile;
  ARows a;

  __device__ __forceinline__ bool exists(int unit) const { return unit * 16 < count(a); }
  __device__ __forceinline__ AUnit a_unit(int unit) const { return {tile.slot, unit * 16, a}; }
  __device__ __forceinline__ const bf16* row(int unit, int r) const { return a_unit(unit).row(args.site, r); }
  __device__ __forceinline__ int token_row(int t) const { return args.batch.perm[tile.start + t]; }
  __device__ __forceinline__ const bf16* token(int, int t) const {
    return t < tile.count ? args.x + token_row(t) * args.x_stride : nullptr;
  }
  __device__ __forceinline__ int tokens(int) const { return tile.count; }
  __device__ __forceinline__ void store(int unit, int r, int t, float low, float high) const {
    a_unit(unit).store(args.site, args.u + token_row(t) * args.u_stride, r, low, high);
  }
};

// Blocks: x a cluster of num_splits for sixteen rows of A, y a tile.
template <class Stream>
SGL_DEVICE void lora_shrink_stream(const ShrinkArgs& args) {
  let_next_kernel_start();
  if (block_y() >= num_lora_tiles(args.batch)) return wait_for_previous_kernel();
  const Tile tile = read_tile(args.batch, block_y());
  const ARows a = ARows::of(args.site, tile.slot);
  const Range k = part_of(args.site.in_features, cluster_rank(), cluster_size());
  Stream::run(ShrinkWork{args, tile, a}, block_x() / args.num_splits, grid_x() / args.num_splits, k.begin, k.end);
}

// ---- more tokens: blocks of 64 or 128 rows -------------------------------------------------------------------------

// u of the rows [first, first + kRows) of a slot's A; `token_row(t)` is the row of x and u, negative for no token.
template <class Gemm, class TokenRow>
SGL_DEVICE void shrink_tile(const LoraSite& site, int slot, int first, const bf16* x, int64_t x_stride, bf16* u,
                            int64_t u_stride, int tokens, TokenRow token_row) {
  const ARows a = ARows::of(site, slot);
  const int rows = count(a) - first;
  if (rows <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  const Range k = part_of(site.in_features, cluster_rank(), cluster_size());
  Gemm gemm;
  gemm.run(
      [&](int r) -> const bf16* {
        if (r >= rows) return nullptr;
        const ARow place = locate(a, first + r);
        return a_of(site, slot, place.slice) + static_cast<int64_t>(place.row) * site.in_features;
      },
      [&](int t) -> const bf16* {
        const int row = t < tokens ? token_row(t) : -1;
        return row < 0 ? nullptr : x + row * x_stride;
      },
      rows, k.begin, k.end);
  gemm.reduce(rows, tokens, [&](int r, int t, const Float4& sum) {
    const int row = token_row(t);
    if (row < 0) return;
    for (int j = 0; j < 4 && r + j < rows; ++j) {
      const ARow place = locate(a, first + r + j);
      u[row * u_stride + place.slice * site.rank_cap + place.row] = to_bf16(sum.v[j]);
    }
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
  const int workers = grid_x() / args.num_splits - args.base_tiles;
  const int tiles = (args.site.num_slices * args.site.rank_cap + Gemm::kRows - 1) / Gemm::kRows;
  const int units = num_live_slots(args.batch) * tiles;
  if (cluster - args.base_tiles >= units) return wait_for_previous_kernel();
  for (int unit = cluster - args.base_tiles; unit < units; unit += workers) {
    const int slot = args.batch.live[unit / tiles];
    shrink_tile<Gemm>(args.site, slot, unit % tiles * Gemm::kRows, args.x, args.x_stride, args.u, args.u_stride, args.tokens,
                      [&](int t) { return args.batch.token_slot[t] == slot ? t : -1; });
  }
}

// Blocks: x a cluster of num_splits for kRows rows of A, y a tile of tokens of one slot.
template <class Gemm>
SGL_DEVICE void lora_shrink_tile(const ShrinkArgs& args) {
  let_next_kernel_start();
  if (block_y() >= num_lora_tiles(args.batch)) return wait_for_previous_kernel();
  const Tile tile = read_tile(args.batch, block_y());
  const int first = block_x() / args.num_splits * Gemm::kRows;
  shrink_tile<Gemm>(args.site, tile.slot, first, args.x, args.x_stride, args.u, args.u_stride, tile.count,
                    [&](int t) { return args.batch.perm[tile.start + t]; });
}

}  // namespace sgl
