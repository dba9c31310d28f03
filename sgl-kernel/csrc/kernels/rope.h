// Between the qkv projection and attention: bias and low-rank term, norm of the heads of q and k, rotation, and the
// copy of k and v into their pools. Everything in float32, rounded once.
//
// A thread has eight columns of the first half of a head and the eight that they turn with. The squares of a head are
// added by each lane in the order of its columns, then by the lanes in a tree.
#pragma once

#include "rows.h"
#include "sgl_kernel/geometry.h"

namespace sgl {

template <int kTokens_, int kHeadDim_>
struct QkNormRope {
  static constexpr int kTokens = kTokens_;
  static constexpr int kHeadDim = kHeadDim_;
  using Expand = ExpandTile<kTokens, kHeadDim>;
  static constexpr int kThreads = Expand::kThreads;
  static constexpr int kSharedBytes = Expand::kOperandBytes + Expand::kDeltaBytes;
  static constexpr int kHalf = kHeadDim / 2;
  static constexpr int kLanes = kHalf / 8;  // of a row
  static_assert(kThreads / kLanes >= kTokens, "every row has its lanes");

  struct Pair {  // eight columns of either half
    Vec8 low, high;
  };
  struct Vectors {
    Pair weight, bias;
  };
  // Fetched with x, which spares a few tokens a wait; with more tokens or wider heads the registers are worth more.
  static constexpr bool kEarly = kTokens == 16 && kHeadDim < 256;
  struct Head {
    int slice, index, column;  // 0, 1, 2: q, k, v; which one of them; its first column in qkv
    Addition added;
  };

  const RopeArgs& args;
  Rows rows;
  int row;  // of qkv, negative for none
  int64_t loc;
  Float8 cosine, sine;
  uint8_t* operands;
  float* sums;

  __device__ __forceinline__ QkNormRope(const RopeArgs& args_, const Rows& rows_) : args(args_), rows(rows_) {
    operands = shared_memory();
    sums = reinterpret_cast<float*>(operands + Expand::kOperandBytes);
    row = -1;
    loc = 0;
    cosine = sine = Float8{};
    if (index() >= rows.count) return;
    row = row_of(rows, index());
    if (args.k_pool != nullptr) loc = args.locs[row];
    const float* angles = args.cos_sin + args.positions[row] * kHeadDim + lane_column();
    cosine = load_floats(angles);
    sine = load_floats(angles + kHalf);
  }

  // The heads [begin, end) of q, k and v, counted through.
  __device__ __forceinline__ void run(int begin, int end) {
    const Head start = head_of(begin);
    fetch_b(start);
    prefetch_vectors(start);
    wait_for_previous_kernel();
    for (int i = begin; i < end; ++i) {
      const Head head = head_of(i);
      const Pair x = row < 0 ? Pair{} : load_pair(place(head));
      Vectors vectors = kEarly ? load_vectors(head) : Vectors{};
      if (head.added.rank > 0)
        compute_addition<Expand>(args.delta, rows, head.added, operands, sums, head.index * kHeadDim, kHeadDim);
      if (i + 1 < end) fetch_b(head_of(i + 1));  // the operands have been read; the sums are until the next barrier
      if (!kEarly) vectors = load_vectors(head);
      finish(head, x, vectors);
    }
  }

 private:
  __device__ __forceinline__ int index() const { return thread_id() / kLanes; }
  __device__ __forceinline__ int lane_column() const { return thread_id() % kLanes * 8; }
  __device__ __forceinline__ bf16* place(const Head& head) const {
    return args.qkv + row * args.qkv_stride + head.column + lane_column();
  }
  __device__ __forceinline__ Pair load_pair(const bf16* p) const { return {load_vec(p), load_vec(p + kHalf)}; }
  __device__ __forceinline__ Vectors load_vectors(const Head& head) const {
    return {norm_weight(head) == nullptr ? Pair{} : load_pair(norm_weight(head) + lane_column()),
            args.bias == nullptr ? Pair{} : load_pair(args.bias + head.column + lane_column())};
  }
  __device__ __forceinline__ const bf16* norm_weight(const Head& head) const {
    return head.slice == 0 ? args.q_weight : head.slice == 1 ? args.k_weight : nullptr;
  }

  __device__ __forceinline__ Head head_of(int i) const {
    const int q = args.num_heads, kv = args.num_kv_heads, slice = i < q ? 0 : i < q + kv ? 1 : 2;
    const int before = slice == 0 ? 0 : slice == 1 ? q : q + kv;
    return {slice, i - before, i * kHeadDim, addition_of(args.delta, rows, slice)};
  }
  __device__ __forceinline__ void fetch_b(const Head& head) const {
    if (head.added.rank > 0) Expand::prefetch(operands, head.added.b, head.added.rank, head.index * kHeadDim, kHeadDim);
  }
  __device__ __forceinline__ void prefetch_vectors(const Head& head) const {
    if (thread_id() * 64 >= kHeadDim) return;
    if (args.bias != nullptr) prefetch_l2(args.bias + head.column + thread_id() * 64);
    if (norm_weight(head) != nullptr) prefetch_l2(norm_weight(head) + thread_id() * 64);
  }

  __device__ __forceinline__ void finish(const Head& head, const Pair& x, const Vectors& vectors) const {
    Float8 low = unpack(x.low), high = unpack(x.high);
    if (args.bias != nullptr) {
      add(low, unpack(vectors.bias.low));
      add(high, unpack(vectors.bias.high));
    }
    if (head.added.rank > 0 && row >= 0) {
      const float* delta = sums + index() * Expand::kDeltaStride + lane_column();
      add(low, load_floats(delta));
      add(high, load_floats(delta + kHalf));
    }
    if (norm_weight(head) != nullptr) normalise(low, high, vectors.weight);
    if (head.slice < 2) rotate(low, high);
    if (row >= 0) store(head, {pack(low), pack(high)});
  }

  __device__ __forceinline__ void normalise(Float8& low, Float8& high, const Pair& weight) const {
    const float sum = sum_lanes<kLanes>(add_squares(add_squares(0.f, low), high));
    const float scale = rsqrt(multiply_add(sum, 1.f / kHeadDim, args.eps));
    const Float8 low_weight = unpack(weight.low), high_weight = unpack(weight.high);
    SGL_UNROLL
    for (int i = 0; i < 8; ++i) {
      low.v[i] = low.v[i] * scale * low_weight.v[i];
      high.v[i] = high.v[i] * scale * high_weight.v[i];
    }
  }

  __device__ __forceinline__ void rotate(Float8& low, Float8& high) const {
    SGL_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float turned = multiply_add(low.v[i], cosine.v[i], -(high.v[i] * sine.v[i]));
      high.v[i] = multiply_add(high.v[i], cosine.v[i], low.v[i] * sine.v[i]);
      low.v[i] = turned;
    }
  }

  __device__ __forceinline__ void store(const Head& head, const Pair& y) const {
    store_pair(place(head), y);
    if (head.slice == 0 || args.k_pool == nullptr) return;
    bf16* const pool = head.slice == 1 ? args.k_pool : args.v_pool;
    store_pair(pool + (loc * args.num_kv_heads + head.index) * kHeadDim + lane_column(), y);
  }
  __device__ __forceinline__ void store_pair(bf16* p, const Pair& y) const {
    store_vec(p, y.low);
    store_vec(p + kHalf, y.high);
  }
};

// Grid: x = ceil((num_heads + 2 num_kv_heads) / block_heads) * pieces, y = tiles of the batch, or without one
// ceil(tokens / (pieces * kTokens)). A piece is kTokens rows of a tile.
template <class Kernel>
SGL_DEVICE void qk_norm_rope(const RopeArgs& args) {
  let_next_kernel_start();
  const int heads = args.num_heads + 2 * args.num_kv_heads, blocks = (heads + args.block_heads - 1) / args.block_heads;
  const int piece = block_x() / blocks, pieces = grid_x() / blocks;
  const Rows rows = rows_of_block(args.delta.batch, args.tokens, piece, pieces, Kernel::kTokens);
  if (rows.count <= 0) return wait_for_previous_kernel();
  const int begin = block_x() % blocks * args.block_heads, end = begin + args.block_heads;
  Kernel(args, rows).run(begin, end < heads ? end : heads);
}

}  // namespace sgl
