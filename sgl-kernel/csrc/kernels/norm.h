// residual += x + low-rank term; x = norm(residual): what stands between a projection and the next one's input.
//
// A row is cut into parts of 128 columns, and sixteen lanes add the squares of one part: each lane those of eight
// columns one after another, then the lanes in a tree. Part p of a row is then added by lane p % 16, in ascending
// order, and those sums again in a tree. So a row's result depends on nothing but the row: neither on how parts are
// spread over warps and over the blocks of a cluster, nor on the rows beside it.
#pragma once

#include "rows.h"
#include "sgl_kernel/geometry.h"

namespace sgl {

template <int kTile>
struct AddNorm {
  static constexpr int kTokens = norm_tokens(kTile);
  static constexpr int kColumns = norm_columns(kTile);
  using Expand = ExpandTile<kTokens, kColumns>;
  static constexpr int kThreads = Expand::kThreads;
  static constexpr int kLanes = kNormPart / 8;
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kRowGroups = kGroups / (kColumns / kNormPart);
  static constexpr int kPasses = (kTokens + kRowGroups - 1) / kRowGroups;

  // A step is all rows of as many parts as there are groups of lanes for; with a low-rank term kColumns, with few rows
  // and none of it more.
  struct Inputs {
    Vec8 x[kPasses], residual[kPasses];
  };

  const NormArgs& args;
  Rows rows;
  Addition added;
  int parts_each, first, columns;  // parts of a row that each block of the cluster takes; this block's columns
  int parts_at_once, my_part, my_row, steps;
  int row[kPasses];  // of x and residual, negative for none
  uint8_t* operands;
  float *delta, *sums, *scales;
  bf16* weight;
  Vec8* held;

  __device__ __forceinline__ AddNorm(const NormArgs& args_, const Rows& rows_) : args(args_), rows(rows_) {
    added = args.residual != nullptr ? addition_of(args.delta, rows, 0) : Addition{nullptr, 0, 0.f, 0};
    parts_each = (num_parts() + cluster_size() - 1) / cluster_size();
    first = cluster_rank() * parts_each * kNormPart;
    const int left = args.hidden - first, most = parts_each * kNormPart;
    columns = left < 0 ? 0 : left < most ? left : most;
    const int row_groups = added.rank > 0 || args.block_tokens > kRowGroups ? kRowGroups : args.block_tokens;
    parts_at_once = kGroups / row_groups;
    my_part = thread_id() / kLanes / row_groups;
    my_row = thread_id() / kLanes % row_groups;
    steps = (columns + parts_at_once * kNormPart - 1) / (parts_at_once * kNormPart);
    SGL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = my_row + pass * kRowGroups;
      row[pass] = i < rows.count ? row_of(rows, i) : -1;
    }
    place();
  }

  __device__ __forceinline__ void run() {
    fetch_static();
    wait_for_previous_kernel();
    Inputs next = load(0);
    for (int step = 0; step < steps; ++step) {
      const Inputs now = next;
      if (step + 1 < steps) next = load(step + 1);
      if (added.rank > 0) expand(step);
      SGL_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) accumulate(step, pass, now.x[pass], now.residual[pass]);
    }
    async_wait<0>();
    cluster_barrier();
    compute_scales();
    if (cluster_size() > 1)
      cluster_barrier();  // nobody leaves while others read its sums
    else
      barrier();
    for (int step = 0; step < steps; ++step)
      SGL_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) normalise(step, pass);
  }

 private:
  __device__ __forceinline__ int num_parts() const { return (args.hidden + kNormPart - 1) / kNormPart; }
  __device__ __forceinline__ int part_of_row(int step) const { return step * parts_at_once + my_part; }
  // The first of this lane's eight columns, counted from `first`; those from `columns` on are nobody's.
  __device__ __forceinline__ int column(int step) const {
    return part_of_row(step) * kNormPart + thread_id() % kLanes * 8;
  }
  __device__ __forceinline__ bool mine(int step, int pass) const { return row[pass] >= 0 && column(step) < columns; }
  __device__ __forceinline__ const bf16* input(int step, int pass) const {
    return args.x + row[pass] * args.x_stride + first + column(step);
  }
  __device__ __forceinline__ bf16* residual(int step, int pass) const {
    return args.residual + row[pass] * args.residual_stride + first + column(step);
  }

  __device__ __forceinline__ void place() {
    uint8_t* shared = shared_memory();
    operands = shared;
    delta = reinterpret_cast<float*>(shared + Expand::kOperandBytes);
    if (args.delta.batch.header != nullptr) shared += Expand::kOperandBytes + Expand::kDeltaBytes;
    sums = reinterpret_cast<float*>(shared);  // [part][row]
    scales = sums + parts_each * kTokens;
    weight = reinterpret_cast<bf16*>(scales + kTokens);
    held = reinterpret_cast<Vec8*>(weight + args.staged);
  }

  // What no kernel writes is on its way before the previous kernel has finished.
  __device__ __forceinline__ void fetch_static() {
    if (added.rank > 0 && columns > 0) {
      fetch_b(0);
      if (kTile == 16) {  // for prompts, other blocks have brought it
        const int stride = b_stride(added.rank);
        const bf16* b = added.b + static_cast<int64_t>(first) * stride;
        for (int i = thread_id() * 64; i < columns * stride; i += kThreads * 64) prefetch_l2(b + i);
      }
    }
    for (int i = thread_id() * 8; i < args.staged && i < columns; i += kThreads * 8)
      async_copy16(weight + i, args.weight + first + i, 16);
    async_commit();
  }
  __device__ __forceinline__ int expand_columns(int step) const {
    const int left = columns - step * kColumns;
    return left < kColumns ? left : kColumns;
  }
  __device__ __forceinline__ void fetch_b(int step) {
    Expand::prefetch(operands, added.b, added.rank, first + step * kColumns, expand_columns(step));
  }
  __device__ __forceinline__ void expand(int step) {
    compute_addition<Expand>(args.delta, rows, added, operands, delta, first + step * kColumns, expand_columns(step));
    if (step + 1 < steps) fetch_b(step + 1);  // the operands have been read; the delta is until the next barrier
  }

  __device__ __forceinline__ Inputs load(int step) const {
    Inputs in = {};
    SGL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      if (!mine(step, pass)) continue;
      in.x[pass] = load_vec(input(step, pass));
      if (args.residual != nullptr) in.residual[pass] = load_vec(residual(step, pass));
    }
    return in;
  }

  __device__ __forceinline__ void accumulate(int step, int pass, const Vec8& x, const Vec8& before) {
    Vec8 rounded = x;
    const int i = my_row + pass * kRowGroups;
    if (args.residual != nullptr) {
      Float8 sum = unpack(before);
      add(sum, unpack(x));
      if (added.rank > 0 && mine(step, pass))
        add(sum, load_floats(delta + i * Expand::kDeltaStride + column(step) - step * kColumns));
      rounded = pack(sum);
      if (mine(step, pass)) store_vec(residual(step, pass), rounded);
    }
    if (step < args.held) held[(step * kPasses + pass) * kThreads + thread_id()] = rounded;
    const float squares = sum_lanes<kLanes>(add_squares(0.f, unpack(rounded)));
    if (thread_id() % kLanes == 0 && mine(step, pass)) sums[part_of_row(step) * kTokens + i] = squares;
  }

  __device__ __forceinline__ void compute_scales() {
    for (int begin = 0; begin < rows.count; begin += kGroups) {
      const int i = begin + thread_id() / kLanes;
      float sum = 0.f;
      if (i < rows.count)
        for (int part = thread_id() % kLanes; part < num_parts(); part += kLanes)
          sum += cluster_load(sums + part % parts_each * kTokens + i, part / parts_each);
      sum = sum_lanes<kLanes>(sum);
      if (thread_id() % kLanes == 0 && i < rows.count)
        scales[i] = rsqrt(multiply_add(sum, 1.f / args.hidden, args.eps));
    }
  }

  __device__ __forceinline__ void normalise(int step, int pass) {
    if (!mine(step, pass)) return;
    const bf16* source = args.residual != nullptr ? residual(step, pass) : input(step, pass);
    const Vec8* kept = held + (step * kPasses + pass) * kThreads + thread_id();
    const Float8 value = unpack(step < args.held ? *kept : load_vec(source));
    const Float8 w = unpack(load_vec((column(step) < args.staged ? weight : args.weight + first) + column(step)));
    const float scale = scales[my_row + pass * kRowGroups];
    Float8 out;
    SGL_UNROLL
    for (int i = 0; i < 8; ++i) out.v[i] = value.v[i] * scale * w.v[i];
    bf16* to = args.residual != nullptr ? args.x + row[pass] * args.x_stride : args.out + row[pass] * args.out_stride;
    store_vec(to + first + column(step), pack(out));
  }
};

// Grid: x = cluster * pieces, y = tiles of the batch, or without one ceil(tokens / (pieces * block_tokens)); cluster
// 1, 2, 4 or 8 along x. A piece is block_tokens rows of a tile, so pieces * block_tokens = tile_tokens with a batch.
template <int kTile>
SGL_DEVICE void fused_add_rmsnorm(const NormArgs& args) {
  let_next_kernel_start();
  const int clusters = grid_x() / cluster_size(), piece = block_x() / cluster_size();
  const Rows rows = rows_of_block(args.delta.batch, args.tokens, piece, clusters, args.block_tokens);
  if (rows.count <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  AddNorm<kTile>(args, rows).run();
}

}  // namespace sgl
