// What the kernels between the products share: the token rows of a block, and eight columns in float32.
#pragma once

#include "sgl_kernel/expand.h"
#include "sgl_kernel/geometry.h"

namespace sgl {

// Token rows that a block works on: those of a tile, or some of them, or, without a batch, neighbours.
struct Rows {
  const int32_t* perm;  // null: the rows first, first + 1, ...
  int first, count;     // count <= 0: no work
  int slot, rank;       // -1: the base model
};

// Rows [piece * size, (piece + 1) * size) of all.
SGL_DEVICE Rows neighbouring_rows(int tokens, int piece, int size) {
  const int first = piece * size, left = tokens - first;
  return {nullptr, first, left < size ? left : size, -1, 0};
}
SGL_DEVICE Rows rows_of_tile(const LoraBatch& batch, int index) {
  const Tile tile = read_tile(batch, index);
  return {batch.perm, tile.start, tile.count, tile.slot, tile.rank};
}
// Row i of the block in the matrices, -1 beyond its rows.
SGL_DEVICE int row_of(const Rows& rows, int i) {
  if (i >= rows.count) return -1;
  return rows.perm == nullptr ? rows.first + i : rows.perm[rows.first + i];
}

// What a block that takes `size` rows of every tile has of this one.
SGL_DEVICE Rows piece_of(Rows rows, int piece, int size) {
  const int left = rows.count - piece * size;
  rows.first += piece * size;
  rows.count = left < size ? left : size;
  return rows;
}

// A tile is 1 << bits pieces, neighbours along y.
SGL_DEVICE Rows rows_of_piece(const LoraBatch& batch, int size, int bits) {
  const int tile = block_y() >> bits;
  return piece_of(rows_of_tile(batch, tile), block_y() - (tile << bits), size);
}

// This lane's rows of a strip of a tile. Beyond the last one it is the last one again, so that loads of what is not written
// need not ask.
template <class Strip>
struct StripRows {
  int row[Strip::kRows];
  bool mine[Strip::kRows];

  StripRows() = default;
  __device__ __forceinline__ StripRows(const Rows& rows, int begin) {
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) {
      const int index = begin + Strip::row(i);
      mine[i] = index < rows.count;
      row[i] = rows.perm[rows.first + (mine[i] ? index : rows.count - 1)];
    }
  }
};

// Where a warp finds them. One that walks over a tile asks for all of them at once, since every strip would wait for memory
// otherwise: lane l has what belongs to rows l, l + kWarp, ... of the tile, those beyond the last one being the last one again.
template <class Strip, bool kWalks>
struct StripSource {
  const Rows& rows;

  __device__ __forceinline__ StripSource(const Rows& rows_) : rows(rows_) {}
  __device__ __forceinline__ StripRows<Strip> operator()(int) const { return StripRows<Strip>(rows, 0); }
};
template <class Strip>
struct StripSource<Strip, true> {
  static constexpr int kHeld = kWalkTokens / kWarp;
  static_assert(kHeld <= 2, "pick()");
  int count, row[kHeld];

  __device__ __forceinline__ StripSource(const Rows& rows) : count(rows.count) {
    SGL_UNROLL
    for (int i = 0; i < kHeld; ++i) {
      const int index = i * kWarp + lane_id();
      row[i] = rows.perm[rows.first + (index < count ? index : count - 1)];
    }
  }
  __device__ __forceinline__ StripRows<Strip> operator()(int strip) const {
    StripRows<Strip> rows;
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) {
      rows.mine[i] = strip * Strip::kTokens + Strip::row(i) < count;
      rows.row[i] = pick(row, strip, i);
    }
    return rows;
  }
  // What belongs to this lane's row i of a strip, out of what lanes have like `row`.
  SGL_DEVICE int pick(const int (&held)[kHeld], int strip, int i) {
    const int begin = strip * Strip::kTokens;  // a strip's rows are all in the same one of `held`
    return shuffle(kHeld == 1 || begin < kWarp ? held[0] : held[kHeld - 1], (begin + Strip::row(i)) % kWarp);
  }
};

// Of each of a lane's rows two vectors and what it needs of one or two u. A warp that walks over a tile has those of all strips on
// their way to shared memory from the start, up to 48 KiB a block: registers have room for few warps and little of their data, and
// with no more than that on its way, warps wait for memory's latency.
template <class Strip, int kSteps, int kThreads, int kFactors, bool kWalks>
struct StripInputs {
  Vec8 x[2][Strip::kRows];
  UStrip<Strip, kSteps> u[kFactors];

  __device__ __forceinline__ StripInputs(void*) {}
  __device__ __forceinline__ void fetch(int, int part, int i, const bf16* from) {
    x[part][i] = from == nullptr ? Vec8{} : load_vec(from);
  }
  __device__ __forceinline__ void fetch_u(int, int factor, const Module& module, const StripRows<Strip>& at) {
    u[factor].fetch(module, at.row);
  }
  SGL_DEVICE void fetched() {}
  SGL_DEVICE void wait() {}
  __device__ __forceinline__ Vec8 get(int, int part, int i) const { return x[part][i]; }
  __device__ __forceinline__ const UStrip<Strip, kSteps>& get_u(int, int factor, const Module&, const StripRows<Strip>&) const {
    return u[factor];
  }
};
template <class Strip, int kSteps, int kThreads, int kFactors>
struct StripInputs<Strip, kSteps, kThreads, kFactors, true> {
  static constexpr int kStrips = kWalkTokens / Strip::kTokens, kRows = Strip::kRows;
  using U = UStrip<Strip, kSteps>;
  // A thread reads what it has copied itself.
  Vec8* const x;  // [strip][part][row][thread]
  Vec4* const u;  // [strip][factor][row][thread], the first sixteen ranks

  __device__ __forceinline__ StripInputs(void* shared)
      : x(static_cast<Vec8*>(shared) + thread_id()),
        u(reinterpret_cast<Vec4*>(static_cast<Vec8*>(shared) + kStrips * 2 * kRows * kThreads) + thread_id()) {}

  __device__ __forceinline__ void fetch(int strip, int part, int i, const bf16* from) {
    async_copy16(x + ((strip * 2 + part) * kRows + i) * kThreads, from, from == nullptr ? 0 : 16);
  }
  __device__ __forceinline__ void fetch_u(int strip, int factor, const Module& module, const StripRows<Strip>& at) {
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i)
      async_copy8(place_u(strip, factor, i), row_at(module.u, at.row[i], module.u_stride) + U::this_lanes(module, 0));
  }
  SGL_DEVICE void fetched() { async_commit(); }  // a strip, or nothing in place of one
  // For the next strip. What there is behind it may be on its way.
  SGL_DEVICE void wait() { async_wait<kStrips - 1>(); }
  __device__ __forceinline__ Vec8 get(int strip, int part, int i) const { return x[((strip * 2 + part) * kRows + i) * kThreads]; }
  // Ranks from sixteen on are asked for here.
  __device__ __forceinline__ U get_u(int strip, int factor, const Module& module, const StripRows<Strip>& at) const {
    U all;
    if (kSteps > 1) all.fetch(module, at.row);
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) all.held[0][i] = *place_u(strip, factor, i);
    return all;
  }

 private:
  __device__ __forceinline__ Vec4* place_u(int strip, int factor, int i) const {
    return u + ((strip * kFactors + factor) * kRows + i) * kThreads;
  }
};

// Once the previous kernel has finished, all strips of a tile, or the only one of a warp that does not walk: `fetch(rows, strip)` asks
// for what `finish(rows, strip)` takes from `inputs`.
template <class Strip, bool kWalks, class Inputs, class Fetch, class Finish>
SGL_DEVICE void for_strips(const StripSource<Strip, kWalks>& strips, int count, const Inputs& inputs, Fetch fetch, Finish finish) {
  constexpr int kStrips = kWalks ? kWalkTokens / Strip::kTokens : 1;
  const StripRows<Strip> first = strips(0);
  wait_for_previous_kernel();
  fetch(first, 0);
  SGL_NO_UNROLL
  for (int strip = 1; strip < kStrips; ++strip) fetch(strips(strip), strip);  // the last row again, where there are no more
  SGL_NO_UNROLL
  for (int strip = 0; strip * Strip::kTokens < count; ++strip) {
    inputs.wait();
    finish(kWalks ? strips(strip) : first, strip);
    if (!kWalks) return;
    inputs.fetched();
  }
}

// Runs `body(true)` once the previous kernel has finished. Its code is cold then, and to fetch it takes longer than to run it, so a
// kernel that starts early runs `body(false)` before that: the same with no rows, reading and writing nothing of theirs.
template <class Body>
SGL_DEVICE void after_previous_kernel(bool rehearse, Body body) {
  SGL_NO_UNROLL
  for (bool live = !rehearse;; live = true) {
    if (live) wait_for_previous_kernel();
    body(live);
    if (live) return;
  }
}

SGL_DEVICE Float8 unpack(const Vec8& packed) {
  Float8 f;
  SGL_UNROLL
  for (int i = 0; i < 4; ++i) {
    f.v[2 * i] = low_float(packed.w[i]);
    f.v[2 * i + 1] = high_float(packed.w[i]);
  }
  return f;
}
SGL_DEVICE Vec8 pack(const Float8& f) {
  Vec8 packed;
  SGL_UNROLL
  for (int i = 0; i < 4; ++i) packed.w[i] = pack_bf16(f.v[2 * i], f.v[2 * i + 1]);
  return packed;
}
SGL_DEVICE Float8 load_floats(const float* p) {  // 16-byte aligned
  const Float4* quads = reinterpret_cast<const Float4*>(p);
  const Float4 low = quads[0], high = quads[1];
  return {{low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}};
}
SGL_DEVICE void add(Float8& sum, const Float8& more) {
  SGL_UNROLL
  for (int i = 0; i < 8; ++i) sum.v[i] += more.v[i];
}
// Squares are added one by one, in the order of the columns.
SGL_DEVICE float add_squares(float sum, const Float8& f) {
  SGL_UNROLL
  for (int i = 0; i < 8; ++i) sum = multiply_add(f.v[i], f.v[i], sum);
  return sum;
}

}  // namespace sgl
