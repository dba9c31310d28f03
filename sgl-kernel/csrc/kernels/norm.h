// residual += x + low-rank term; x = norm(residual): what stands between a projection and the next one's input.
//
// A row is cut into parts of 32 columns, which four lanes have: each adds the squares of its eight columns one after another,
// then they add up in a tree. Part p of a row is then added by lane p % 16 of sixteen, in ascending order, and those sums again in a
// tree. So a row's result depends on nothing but the row: neither on how parts are spread over lanes, warps and the
// blocks of a cluster, nor on the rows beside it.
#pragma once

#include "rows.h"

namespace sgl {

// Which part of which of a block's rows a lane has, by turns: `Strips`, as a low-rank term is computed, warps taking
// parts of sixteen rows; `Lines`, neighbouring lanes along a row, where there is none.
template <class Strip_>
struct Strips {
  using Strip = Strip_;
  static constexpr int kRows = Strip::kRows;
  static constexpr int kWarps = norm_warps(kWarp, Strip::kTokens);

  __device__ __forceinline__ Strips(int) {}
  __device__ __forceinline__ int row(int i) const { return Strip::row(i); }
  __device__ __forceinline__ int part(int turn) const { return turn * kWarps + warp_id(); }
  __device__ __forceinline__ int column() const { return Strip::column(); }
  SGL_DEVICE float sum(float squares) { return sum_strip_row(squares); }
};
struct Lines {
  using Strip = sgl::Strip<16>;  // of no use
  static constexpr int kRows = 1;
  static constexpr int kWarps = norm_warps(kWarp, 0);
  int parts, own_row, own_part;  // parts that the threads have at once

  __device__ __forceinline__ Lines(int rows) : parts(kWarps * kWarp / 4 / rows) {
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
  using Strip = typename Lanes::Strip;
  static constexpr int kRows = Lanes::kRows;
  static constexpr int kThreads = Lanes::kWarps * kWarp;
  static constexpr bool kLora = kSteps > 0;
  static constexpr int kHeldSteps = kLora ? kSteps : 1;
  static constexpr bool kAhead = kRows > 1;  // with many rows what the next turn needs is on its way

  struct Inputs {
    Vec8 x[kRows], residual[kRows];
  };

  const NormArgs& args;
  const Rows& rows;
  const Lanes lanes;
  int first, columns;  // this block's columns of a row
  int row[kRows];  // this lane's, negative for none
  // Where this block's columns of them start: of x, and of the residual or, without one, of out.
  bf16 *x_row[kRows], *side_row[kRows];
  float *sums, *scales;
  bf16* weight;
  Vec8* held;
  bool live;  // not in a rehearsal, which has no rows

  __device__ __forceinline__ AddNorm(const NormArgs& args_, const Rows& rows_)
      : args(args_), rows(rows_), lanes(args_.block_tokens) {
    first = cluster_rank() * args.parts * kNormPart;
    const int left = args.hidden - first, most = args.parts * kNormPart;
    columns = left < 0 ? 0 : left < most ? left : most;
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row[i] = row_of(rows, lanes.row(i));
      x_row[i] = args.x + row[i] * args.x_stride + first;
      side_row[i] = args.residual != nullptr ? args.residual + row[i] * args.residual_stride + first
                                             : args.out + row[i] * args.out_stride + first;
    }
    sums = reinterpret_cast<float*>(shared_memory());  // [part of a row][row], every block's own copy
    scales = sums + (args.hidden + kNormPart - 1) / kNormPart * kNormRows;
    weight = reinterpret_cast<bf16*>(scales + kNormRows);
    held = reinterpret_cast<Vec8*>(weight + args.staged);
  }

  __device__ __forceinline__ void run() {
    if (cluster_size() > 1) cluster_start();
    const Module module = kLora ? module_of(args.delta, rows.slot, rows.rank, 0) : Module{};
    BStrip<Strip, kHeldSteps> b, next_b;
    if (module.b != nullptr) {
      fetch_b(b, module, 0);
      if (kAhead) fetch_b(next_b, module, 1);
    }
    SGL_NO_UNROLL
    for (int i = thread_id() * 8; i < args.staged && i < columns; i += kThreads * 8)
      async_copy16(weight + i, args.weight + first + i, 16);
    async_commit();
    if (cluster_size() > 1) cluster_started();  // so that their shared memory may be written
    after_previous_kernel(!kAhead && args.rehearse, [&](bool live_) {  // a turn moves on to the next one's B where it is ahead
      live = live_;
      const int turns = live ? args.turns : 1;
      Module used = module;
      if (!live && used.rank > 16 * kHeldSteps) used.rank = 16 * kHeldSteps;  // u of others is read when it is multiplied
      UStrip<Strip, kHeldSteps> u = {};
      Inputs next = load(0);
      if (module.b != nullptr && live) fetch_u(u, module);
      SGL_NO_UNROLL
      for (int turn = 0; turn < turns; ++turn) {
        if (!kAhead && turn > 0) {
          next = load(turn);
          if (module.b != nullptr) fetch_b(b, module, turn);
        }
        const Inputs now = next;
        if (kAhead && turn + 1 < turns) next = load(turn + 1);
        Strip term = {};
        if (module.b != nullptr) {
          term = multiply(used, b, u);
          if (kAhead) {
            b = next_b;
            if (turn + 2 < turns) fetch_b(next_b, module, turn + 2);
          }
        }
        SGL_UNROLL
        for (int i = 0; i < kRows; ++i) {
          Float8 sum = unpack(now.x[i]);
          if (args.residual != nullptr) add(sum, unpack(now.residual[i]));
          if (kLora) add_term(sum, used, term, i);
          accumulate(turn, i, sum);
        }
      }
      async_wait<0>();
      if (cluster_size() > 1) cluster_barrier();
      else barrier();
      compute_scales();
      barrier();
      SGL_NO_UNROLL
      for (int turn = 0; turn < turns; ++turn)
        SGL_UNROLL
        for (int i = 0; i < kRows; ++i) normalise(turn, i);
    });
  }

 private:
  // The first of this lane's eight columns, counted from `first`; those from `columns` on are nobody's.
  __device__ __forceinline__ int column(int turn) const { return lanes.part(turn) * kNormPart + lanes.column(); }
  __device__ __forceinline__ bool mine(int turn, int i) const { return live && row[i] >= 0 && column(turn) < columns; }

  __device__ __forceinline__ Inputs load(int turn) const {
    Inputs in = {};
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (!mine(turn, i)) continue;
      in.x[i] = load_vec(x_row[i] + column(turn));
      if (args.residual != nullptr) in.residual[i] = load_vec(side_row[i] + column(turn));
    }
    return in;
  }

  __device__ __forceinline__ void fetch_b(BStrip<Strip, kHeldSteps>& b, const Module& module, int turn) const {
    const int start = lanes.part(turn) * kNormPart;
    if constexpr (kLora)
      if (start < columns) b.fetch(module, first + start, columns - start);
  }
  __device__ __forceinline__ void fetch_u(UStrip<Strip, kHeldSteps>& u, const Module& module) const {
    int present[kRows];
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) present[i] = row[i] < 0 ? rows.perm[rows.first] : row[i];
    if constexpr (kLora) u.fetch(module, present);
  }

  __device__ __forceinline__ void accumulate(int turn, int i, const Float8& sum) {
    const Vec8 rounded = pack(sum);  // of an input alone, its own bits
    // What is held is stored later: a cluster's barrier would wait for it.
    if (turn < args.held) held[(turn * kRows + i) * kThreads + thread_id()] = rounded;
    else if (args.residual != nullptr && mine(turn, i)) store_vec(side_row[i] + column(turn), rounded);
    const float squares = lanes.sum(column(turn) < columns ? add_squares(0.f, unpack(rounded)) : 0.f);
    if (row[i] < 0 || lanes.part(turn) * kNormPart >= columns) return;
    float* const place = sums + (first / kNormPart + lanes.part(turn)) * kNormRows + lanes.row(i);
    SGL_NO_UNROLL
    for (int block = lanes.column() / 8; block < cluster_size(); block += 4) cluster_store(place, block, squares);
  }

  __device__ __forceinline__ void compute_scales() {
    const int all = (args.hidden + kNormPart - 1) / kNormPart;
    SGL_NO_UNROLL
    for (int i = thread_id() / 16; i < kNormRows; i += kThreads / 16) {
      float sum = 0.f;
      if (live && i < rows.count)
        SGL_NO_UNROLL
        for (int part = thread_id() % 16; part < all; part += 16) sum += sums[part * kNormRows + i];
      SGL_UNROLL
      for (int mask = 8; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      if (thread_id() % 16 == 0) scales[i] = rsqrt(multiply_add(sum, args.mean, args.eps));
    }
  }

  __device__ __forceinline__ void normalise(int turn, int i) {
    if (!mine(turn, i)) return;
    Vec8 rounded;
    if (turn < args.held) {
      rounded = held[(turn * kRows + i) * kThreads + thread_id()];
      if (args.residual != nullptr) store_vec(side_row[i] + column(turn), rounded);
    } else {
      rounded = load_vec((args.residual != nullptr ? side_row[i] : x_row[i]) + column(turn));
    }
    const Float8 value = unpack(rounded);
    const Float8 w = unpack(load_vec((column(turn) < args.staged ? weight : args.weight + first) + column(turn)));
    const float scale = scales[lanes.row(i)];
    Float8 out;
    SGL_UNROLL
    for (int c = 0; c < 8; ++c) out.v[c] = value.v[c] * scale * w.v[c];
    store_vec((args.residual != nullptr ? x_row[i] : side_row[i]) + column(turn), pack(out));
  }
};

// Grid: x = cluster * pieces of a tile, y = tiles of the batch; or without one x = cluster, y = ceil(tokens / block_tokens).
// Clusters are 1, 2, 4 or 8 along x. A piece is block_tokens rows, those of a strip.
template <class Lanes, int kSteps>
SGL_DEVICE void fused_add_rmsnorm(const NormArgs& args) {
  let_next_kernel_start();
  const Rows rows = kSteps > 0 ? piece_of(rows_of_tile(args.delta.batch, block_y()), cluster_x(), args.block_tokens)
                               : neighbouring_rows(args.tokens, block_y(), args.block_tokens);
  if (rows.count <= 0) return wait_for_previous_kernel();  // the same for every block of the cluster
  AddNorm<Lanes, kSteps>(args, rows).run();
}

}  // namespace sgl
