// Between the qkv projection and attention: bias and low-rank term, norm of the heads of q and k, rotation, and the
// copy of k and v into their pools. Everything in float32, rounded once.
//
// A lane has eight columns of the first half of a head and the eight that they turn with. The squares of a head are added by each
// lane in the order of its columns, then over four lanes, and over these fours, in a tree.
#pragma once

#include "rows.h"

namespace sgl {

struct Pair {  // eight columns of either half of a head
  Vec8 low, high;
};
struct Turn {
  Float8 cosine, sine;
};

// One head of a block, as a lane sees it.
template <int kHeadDim>
struct Head {
  static constexpr int kHalf = kHeadDim / 2;

  const RopeArgs& args;
  int slice, index, column;  // 0, 1, 2: q, k, v; which of them; this lane's first column of qkv
  int in_head;               // and of the head
  bool exists;

  // Beyond the last head it is the last one again, but not to be stored.
  __device__ __forceinline__ Head(const RopeArgs& args_, int index_, int in_head_) : args(args_), in_head(in_head_) {
    const int q = args.num_heads, kv = args.num_kv_heads, heads = q + 2 * kv;
    exists = index_ < heads;
    const int head = exists ? index_ : heads - 1;
    slice = head < q ? 0 : head < q + kv ? 1 : 2;
    index = head - (slice == 0 ? 0 : slice == 1 ? q : q + kv);
    column = head * kHeadDim + in_head;
  }

  SGL_DEVICE Pair load_pair(const bf16* p) { return {load_vec(p), load_vec(p + kHalf)}; }
  SGL_DEVICE void store_pair(bf16* p, const Pair& y) {
    store_vec(p, y.low);
    store_vec(p + kHalf, y.high);
  }
  __device__ __forceinline__ const bf16* norm() const {
    return slice == 0 ? args.q_weight : slice == 1 ? args.k_weight : nullptr;
  }
  __device__ __forceinline__ Pair weight() const { return norm() == nullptr ? Pair{} : load_pair(norm() + in_head); }
  __device__ __forceinline__ Pair bias() const { return args.bias == nullptr ? Pair{} : load_pair(args.bias + column); }
  __device__ __forceinline__ Turn turn(int position) const {
    if (slice == 2) return Turn{};
    const float* angles = row_at(args.cos_sin, position, kHeadDim) + in_head;
    return {load_floats(angles), load_floats(angles + kHalf)};
  }
  __device__ __forceinline__ int position(int row) const { return static_cast<int>(args.positions[row]); }
  __device__ __forceinline__ int loc(int row) const {
    return args.k_pool != nullptr ? static_cast<int>(args.locs[row]) : 0;
  }
  // Of this lane's columns of the first half; null where somebody else may be writing them.
  __device__ __forceinline__ const bf16* place(int row, bool mine) const {
    return mine && exists ? row_at(args.qkv, row, args.qkv_stride) + column : nullptr;
  }
  __device__ __forceinline__ Pair load(int row, bool mine) const {
    const bf16* from = place(row, mine);
    return from == nullptr ? Pair{} : load_pair(from);
  }

  __device__ __forceinline__ void add_bias(Float8& low, Float8& high, const Pair& bias) const {
    if (args.bias == nullptr) return;
    add(low, unpack(bias.low));
    add(high, unpack(bias.high));
  }
  SGL_DEVICE float squares(const Float8& low, const Float8& high) { return add_squares(add_squares(0.f, low), high); }
  __device__ __forceinline__ void normalise(Float8& low, Float8& high, float squares, const Pair& weight) const {
    if (norm() == nullptr) return;
    const Float8 low_weight = unpack(weight.low), high_weight = unpack(weight.high);
    const float scale = rsqrt(multiply_add(squares, 1.f / kHeadDim, args.eps));
    SGL_UNROLL
    for (int c = 0; c < 8; ++c) {
      low.v[c] = low.v[c] * scale * low_weight.v[c];
      high.v[c] = high.v[c] * scale * high_weight.v[c];
    }
  }
  // Turns q and k, and writes the row.
  __device__ __forceinline__ void finish(Float8& low, Float8& high, const Turn& turn, int row, int loc, bool mine) const {
    if (slice < 2)
      SGL_UNROLL
      for (int c = 0; c < 8; ++c) {
        const float turned = multiply_add(low.v[c], turn.cosine.v[c], -(high.v[c] * turn.sine.v[c]));
        high.v[c] = multiply_add(high.v[c], turn.cosine.v[c], low.v[c] * turn.sine.v[c]);
        low.v[c] = turned;
      }
    const Pair y = {pack(low), pack(high)};
    if (!mine || !exists) return;
    store_pair(row_at(args.qkv, row, args.qkv_stride) + column, y);
    if (slice == 0 || args.k_pool == nullptr) return;
    bf16* const pool = slice == 1 ? args.k_pool : args.v_pool;
    store_pair(row_at(pool, loc, args.num_kv_heads * kHeadDim) + index * kHeadDim + in_head, y);
  }
};

SGL_DEVICE bool has_norm(const RopeArgs& args) { return args.q_weight != nullptr || args.k_weight != nullptr; }

// Without a low-rank term: kHeadDim / 16 lanes have a row of a head, a block sixteen rows of some heads one after
// another.
// Grid: x = ceil((num_heads + 2 num_kv_heads) / block_heads), y = ceil(tokens / kRopeRows).
template <int kHeadDim>
SGL_DEVICE void qk_norm_rope_plain(const RopeArgs& args) {
  constexpr int kLanes = kHeadDim / 16;
  let_next_kernel_start();
  const int in_head = thread_id() % kLanes * 8, heads = args.num_heads + 2 * args.num_kv_heads;
  const Rows rows = neighbouring_rows(args.tokens, block_y(), kRopeRows);
  const int begin = block_x() * args.block_heads, index = thread_id() / kLanes;
  const bool mine = index < rows.count;
  const int row = rows.first + (mine ? index : 0);
  const Head<kHeadDim> first(args, begin, in_head);
  const Turn turn = first.turn(first.position(row));
  const int loc = first.loc(row);
  Pair weight = first.weight(), bias = first.bias();
  after_previous_kernel(args.rehearse, [&](bool live) {
    const int end = begin + (live ? args.block_heads : 1);
    SGL_NO_UNROLL
    for (int i = begin; i < end && i < heads; ++i) {
      const Head<kHeadDim> head(args, i, in_head);
      if (i > begin) weight = head.weight(), bias = head.bias();
      const Pair x = head.load(row, live && mine);
      Float8 low = unpack(x.low), high = unpack(x.high);
      head.add_bias(low, high, bias);
      if (has_norm(args)) {
        float squares = head.squares(low, high);
        squares += shuffle_xor(squares, 2);
        squares += shuffle_xor(squares, 1);
        SGL_UNROLL
        for (int mask = 4; mask < kLanes; mask *= 2) squares += shuffle_xor(squares, mask);
        head.normalise(low, high, squares, weight);
      }
      head.finish(low, high, turn, row, loc, live && mine);
    }
  });
}

// With one: a warp has a strip of the first half of a head and the strip that it turns with. With kMany it walks over the
// strips of a tile; without, what is static and small is fetched ahead.
template <int kHeadDim, class Strip, int kSteps, bool kMany>
struct QkNormRope {
  static constexpr int kRows = Strip::kRows;
  static constexpr int kWarps = kHeadDim / (2 * Strip::kColumns);  // of a head
  static constexpr int kBlockHeads = rope_block_heads(kHeadDim, kMany ? kWalkTokens : 16, true);
  static constexpr int kSumsBytes = rope_sums_bytes(kHeadDim, kBlockHeads);

  const RopeArgs& args;
  const Rows& rows;
  const Head<kHeadDim> head;
  bool buffer;
  Module module;
  BStrip<Strip, kSteps> low_b, high_b;
  StripInputs<Strip, kSteps, kBlockHeads * kWarps * kWarp, 1, kMany> inputs;
  Pair weight, bias;
  Turn turn[kRows];

  __device__ __forceinline__ QkNormRope(const RopeArgs& args_, const Rows& rows_)
      : args(args_),
        rows(rows_),
        head(args_, block_x() * args_.block_heads + warp_id() / kWarps, in_head()),
        buffer(false),
        inputs(shared_memory() + kSumsBytes) {
    module = module_of(args.delta, rows.slot, rows.rank, head.slice);
  }

  __device__ __forceinline__ void run() {
    if (module.b != nullptr) {
      const int first = head.index * kHeadDim + in_head() - Strip::column();
      low_b.fetch(module, first, Strip::kColumns);
      high_b.fetch(module, first + kHeadDim / 2, Strip::kColumns);
    }
    const StripSource<Strip, kMany> strips(rows);
    const Places<kMany> places(head, strips);
    if (!kMany) weight = head.weight(), bias = head.bias(), load_turns(places, 0);
    for_strips(
        strips, rows.count, inputs, [&](const StripRows<Strip>& at, int strip) { fetch(at, strip); },
        [&](const StripRows<Strip>& at, int strip) { finish(at, strip, places); });
  }

 private:
  // Rows of the tables of angles and of the pools, like StripSource.
  template <bool kWalks, class = void>
  struct Places {
    int position[kRows], loc[kRows];

    __device__ __forceinline__ Places(const Head<kHeadDim>& head, const StripSource<Strip, kWalks>& strips) {
      const StripRows<Strip> at = strips(0);
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) {
        position[i] = head.position(at.row[i]);
        loc[i] = head.loc(at.row[i]);
      }
    }
    __device__ __forceinline__ int position_of(int, int i) const { return position[i]; }
    __device__ __forceinline__ int loc_of(int, int i) const { return loc[i]; }
  };
  template <class Unused>
  struct Places<true, Unused> {
    using Source = StripSource<Strip, true>;
    int position[Source::kHeld], loc[Source::kHeld];

    __device__ __forceinline__ Places(const Head<kHeadDim>& head, const Source& strips) {
      SGL_UNROLL
      for (int i = 0; i < Source::kHeld; ++i) {
        position[i] = head.position(strips.row[i]);
        loc[i] = head.loc(strips.row[i]);
      }
    }
    __device__ __forceinline__ int position_of(int strip, int i) const { return Source::pick(position, strip, i); }
    __device__ __forceinline__ int loc_of(int strip, int i) const { return Source::pick(loc, strip, i); }
  };

  SGL_DEVICE int in_head() { return warp_id() % kWarps * Strip::kColumns + Strip::column(); }
  __device__ __forceinline__ void fetch(const StripRows<Strip>& at, int strip) {
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const bf16* x = head.place(at.row[i], at.mine[i]);
      inputs.fetch(strip, 0, i, x);
      inputs.fetch(strip, 1, i, x == nullptr ? nullptr : x + kHeadDim / 2);
    }
    if (module.b != nullptr) inputs.fetch_u(strip, 0, module, at);
    inputs.fetched();
  }
  __device__ __forceinline__ void load_turns(const Places<kMany>& places, int strip) {
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) turn[i] = head.turn(places.position_of(strip, i));
  }
  __device__ __forceinline__ void finish(const StripRows<Strip>& at, int strip, const Places<kMany>& places) {
    if (kMany) weight = head.weight(), bias = head.bias();
    Strip low_term = {}, high_term = {};
    if (module.b != nullptr) {
      const UStrip<Strip, kSteps>& u = inputs.get_u(strip, 0, module, at);
      low_term = multiply(module, low_b, u);
      high_term = multiply(module, high_b, u);
    }
    Float8 low[kRows], high[kRows];
    float squares[kRows];
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      low[i] = unpack(inputs.get(strip, 0, i));
      high[i] = unpack(inputs.get(strip, 1, i));
      head.add_bias(low[i], high[i], bias);
      add_term(low[i], module, low_term, i);
      add_term(high[i], module, high_term, i);
      if (has_norm(args)) squares[i] = sum_strip_row(head.squares(low[i], high[i]));
    }
    if (kMany) load_turns(places, strip);  // on their way while warps wait for each other
    if (has_norm(args)) add_warps(squares);
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      head.normalise(low[i], high[i], squares[i], weight);
      head.finish(low[i], high[i], turn[i], at.row[i], places.loc_of(strip, i), at.mine[i]);
    }
  }

  // From the squares of a warp's strips those of its head. All warps of a block come here equally often.
  __device__ __forceinline__ void add_warps(float (&squares)[kRows]) {
    if (kWarps == 1) return;
    // Two buffers: a warp that is ahead by one step writes where nobody reads.
    float* const sums = reinterpret_cast<float*>(shared_memory()) + buffer * args.block_heads * kWarps * 16;
    buffer = !buffer;
    if (Strip::column() == 0)
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) sums[warp_id() * 16 + Strip::row(i)] = squares[i];
    barrier();
    const float* const own = sums + warp_id() / kWarps * kWarps * 16;
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      squares[i] = 0.f;
      SGL_UNROLL
      for (int other = 0; other < kWarps; other += 2)
        squares[i] += own[other * 16 + Strip::row(i)] + own[(other + 1) * 16 + Strip::row(i)];
    }
  }
};

// Grid: x = ceil((num_heads + 2 num_kv_heads) / block_heads), each head kHeadDim / 64 warps; y = pieces of the batch's
// tiles.
template <int kHeadDim, class Strip, int kSteps, bool kMany>
SGL_DEVICE void qk_norm_rope(const RopeArgs& args) {
  let_next_kernel_start();
  const Rows rows = rows_of_piece(args.delta.batch, args.block_tokens, args.piece_bits);
  if (rows.count <= 0) return wait_for_previous_kernel();
  QkNormRope<kHeadDim, Strip, kSteps, kMany>(args, rows).run();
}

}  // namespace sgl
