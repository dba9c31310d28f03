// residual += x + low-rank term; x = norm(residual): what stands between a projection and the next one's input.
//
// A row is cut into parts of 32 columns, which four lanes have: each adds the squares of its eight columns one after another,
// then they add up in a tree. Part p of a row is then added by lane p % 16 of sixteen, in ascending order, and those sums again in a
// tree. So a row's result depends on nothing but the row: neither on how parts are spread over lanes, warps and the
// blocks of a cluster, nor on the rows beside it.
#pragma once

#include "rows.h"

namespace sgl {

constexpr int kNormWarps = norm_warps(kWarp);

// Which part of which of a block's rows a lane has, by turns: `Strips`, as a low-rank term is computed, warps taking
// parts of sixteen rows; `Lines`, neighbouring lanes along a row, where there is none.
struct Strips {
  static constexpr int kRows = Strip::kRows;

  __device__ __forceinline__ Strips(int) {}
  __device__ __forceinline__ int row(int i) const { return Strip::row(i); }
  __device__ __forceinline__ int part(int turn) const { return turn * kNormWarps + warp_id(); }
  __device__ __forceinline__ int column() const { return Strip::column(); }
  SGL_DEVICE float sum(float squares) { return sum_strip_row(squares); }
};
struct Lines {
  static constexpr int kRows = 1;
  int parts, own_row, own_part;  // parts that the threads have at once

  __device__ __forceinline__ Lines(int rows) : parts(kNormWarps * kWarp / 4 / rows) {
    own_row = thread_id() / 4 / parts;
    own_part = thread_id() / 4 - own_row * parts;
  }
  __device__ __forceinline__ int row(int) const { return own_row; }
  __device__ __forceinline__ int part(int turn) const { return turn * parts + own_part; }
  __device__ __forceinline__ int column() const { return thread_id() % 4 * 8; }
  SGL_DEVICE float sum(float squares) {
    squares += shuffle_xor(squares, 2);
    return squares + shuffle_xor(squares, 1);
  }
};

template <class Lanes, int kSteps>
struct AddNorm {
  static constexpr int kRows = Lanes::kRows;
  static constexpr int kThreads = kNormWarps * kWarp;
  static constexpr bool kLora = kSteps > 0;
  static constexpr int kHeldSteps = kLora ? kSteps : 1;

  struct Inputs {
    Vec8 x[kRows], residual[kRows];
  };

  const NormArgs& args;
  const Rows& rows;
  const Lanes lanes;
  int parts, first, columns;  // this block's parts and columns of a row
  int turns;
  int row[kRows];  // of x and residual, negative for none
  bool few;        // no lane has a row other than its first
  float *sums, *scales;
  bf16* weight;
  Vec8* held;

  __device__ __forceinline__ AddNorm(const NormArgs& args_, const Rows& rows_)
      : args(args_), rows(rows_), lanes(args_.block_tokens) {
    parts = args.parts;
    first = cluster_rank() * parts * kNormPart;
    const int left = args.hidden - first, most = parts * kNormPart;
    columns = left < 0 ? 0 : left < most ? left : most;
    turns = args.turns;
    few = kLora && rows.count <= 8;
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) row[i] = row_of(rows, lanes.row(i));
    sums = reinterpret_cast<float*>(shared_memory());  // [part of this block][row]
    scales = sums + parts * kNormRows;
    weight = reinterpret_cast<bf16*>(scales + kNormRows);
    held = reinterpret_cast<Vec8*>(weight + args.staged);
  }

  __device__ __forceinline__ void run() {
    const Module module = kLora ? module_of(args.delta, rows.slot, rows.rank, 0) : Module{};
    BStrip<kHeldSteps> b;
    if (module.b != nullptr) fetch_b(b, module, 0);
    for (int i = thread_id() * 8; i < args.staged && i < columns; i += kThreads * 8)
      async_copy16(weight + i, args.weight + first + i, 16);
    async_commit();
    wait_for_previous_kernel();
    UStrip<kHeldSteps> u;
    Inputs next = load(0);
    if (module.b != nullptr) fetch_u(u, module);
    SGL_NO_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const Inputs now = next;
      if (turn + 1 < turns) next = load(turn + 1);
      Strip term = {};
      if (module.b != nullptr) {
        term = multiply(module, b, u);
        if (turn + 1 < turns) fetch_b(b, module, turn + 1);
      }
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (i > 0 && few) continue;
        Float8 sum = unpack(now.x[i]);
        if (args.residual != nullptr) add(sum, unpack(now.residual[i]));
        if (kLora) add_term(sum, module, term, i);
        accumulate(turn, i, sum);
      }
    }
    async_wait<0>();
    if (cluster_size() > 1) cluster_barrier();
    else barrier();
    compute_scales();
    if (cluster_size() > 1) cluster_arrive();
    barrier();
    for (int turn = 0; turn < turns; ++turn)
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) normalise(turn, i);
    if (cluster_size() > 1) cluster_wait();  // nobody leaves while others read its sums
  }

 private:
  // The first of this lane's eight columns, counted from `first`; those from `columns` on are nobody's.
  __device__ __forceinline__ int column(int turn) const { return lanes.part(turn) * kNormPart + lanes.column(); }
  __device__ __forceinline__ bool mine(int turn, int i) const { return row[i] >= 0 && column(turn) < columns; }
  __device__ __forceinline__ const bf16* input(int turn, int i) const {
    return args.x + row[i] * args.x_stride + first + column(turn);
  }
  __device__ __forceinline__ bf16* residual(int turn, int i) const {
    return args.residual + row[i] * args.residual_stride + first + column(turn);
  }

  __device__ __forceinline__ Inputs load(int turn) const {
    Inputs in = {};
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!mine(turn, i)) continue;
      in.x[i] = load_vec(input(turn, i));
      if (args.residual != nullptr) in.residual[i] = load_vec(residual(turn, i));
    }
    return in;
  }

  __device__ __forceinline__ void fetch_b(BStrip<kHeldSteps>& b, const Module& module, int turn) const {
    const int start = lanes.part(turn) * kNormPart;
    if constexpr (kLora) b.fetch(module, first + start, columns - start);
  }
  __device__ __forceinline__ void fetch_u(UStrip<kHeldSteps>& u, const Module& module) const {
    if constexpr (kLora) u.fetch(module, row);
  }

  __device__ __forceinline__ void accumulate(int turn, int i, const Float8& sum) {
    const Vec8 rounded = pack(sum);  // of an input alone, its own bits
    if (args.residual != nullptr && mine(turn, i)) store_vec(residual(turn, i), rounded);
    if (turn < args.held) held[(turn * kRows + i) * kThreads + thread_id()] = rounded;
    const float squares = lanes.sum(add_squares(0.f, unpack(rounded)));
    if (lanes.column() == 0 && mine(turn, i)) sums[lanes.part(turn) * kNormRows + lanes.row(i)] = squares;
  }

  __device__ __forceinline__ void compute_scales() {
    const int all = (args.hidden + kNormPart - 1) / kNormPart;
    for (int i = thread_id() / 16; i < kNormRows; i += kThreads / 16) {
      float sum = 0.f;
      if (i < rows.count)
        for (int part = thread_id() % 16, block = 0, in_block = part; part < all; part += 16, in_block += 16) {
          for (; in_block >= parts; in_block -= parts) ++block;  // no division: this stands in everybody's way
          sum += cluster_size() > 1 ? cluster_load(sums + in_block * kNormRows + i, block) : sums[part * kNormRows + i];
        }
      SGL_UNROLL
      for (int mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (thread_id() % 16 == 0 && i < rows.count) scales[i] = rsqrt(multiply_add(sum, 1.f / args.hidden, args.eps));
    }
  }

  __device__ __forceinline__ void normalise(int turn, int i) {
    if (!mine(turn, i)) return;
    const bf16* source = args.residual != nullptr ? residual(turn, i) : input(turn, i);
    const Vec8* kept = held + (turn * kRows + i) * kThreads + thread_id();
    const Float8 value = unpack(turn < args.held ? *kept : load_vec(source));
    const Float8 w = unpack(load_vec((column(turn) < args.staged ? weight : args.weight + first) + column(turn)));
    const float scale = scales[lanes.row(i)];
    Float8 out;
    SGL_UNROLL
    for (int c = 0; c < 8; ++c) out.v[c] = value.v[c] * scale * w.v[c];
    bf16* to = args.residual != nullptr ? args.x + row[i] * args.x_stride : args.out + row[i] * args.out_stride;
    store_vec(to + first + column(turn), pack(out));
  }
};

// Grid: x = cluster * pieces, y = tiles of the batch, or without one ceil(tokens / (pieces * block_tokens)); cluster
// 1, 2, 4 or 8 along x. A piece is block_tokens rows of a tile: sixteen with a batch.
template <class Lanes, int kSteps>
SGL_DEVICE void fused_add_rmsnorm(const NormArgs& args) {
  let_next_kernel_start();
  const int pieces = grid_x() / cluster_size(), piece = block_x() / cluster_size();
  Rows rows = kSteps > 0 ? rows_of_tile(args.delta.batch, block_y())
                         : neighbouring_rows(args.tokens, block_y() * pieces + piece, args.block_tokens);
  if (kSteps > 0) {
    rows.first += piece * kNormRows;
    rows.count = rows.count - piece * kNormRows < kNormRows ? rows.count - piece * kNormRows : kNormRows;
  }
  if (rows.count <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  AddNorm<Lanes, kSteps>(args, rows).run();
}

}  // namespace sgl
