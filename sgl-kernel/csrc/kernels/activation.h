// out = silu(gate + its low-rank term) * (up + its own): what stands between gate_up and down.
#pragma once

#include "rows.h"

namespace sgl {

constexpr int kActivationWarps = activation_warps(kWarp);

SGL_DEVICE float silu(float x) { return x * reciprocal_approx(1.f + exp_approx(-x)); }
SGL_DEVICE Vec8 silu_times(Float8 gate, const Float8& up) {
  SGL_UNROLL
  for (int c = 0; c < 8; ++c) gate.v[c] = silu(gate.v[c]) * up.v[c];
  return pack(gate);
}

// Without a low-rank term: a lane has eight columns of some neighbouring rows.
// Grid: x = blocks of columns, y = ceil(tokens / kActivationRows).
SGL_DEVICE void silu_and_mul_plain(const ActivationArgs& args) {
  let_next_kernel_start();
  const int column = (block_x() * kActivationWarps * kWarp + thread_id()) * 8, first = block_y() * kActivationRows;
  after_previous_kernel(args.rehearse, [&](bool live) {
    const int rows = live && column < args.inner ? args.tokens - first : 0;
    Vec8 gate[kActivationRows] = {}, up[kActivationRows] = {};
    SGL_UNROLL
    for (int i = 0; i < kActivationRows; ++i) {
      if (i >= rows) continue;
      const bf16* x = args.x + (first + i) * args.x_stride + column;
      gate[i] = load_vec(x);
      up[i] = load_vec(x + args.inner);
    }
    SGL_UNROLL
    for (int i = 0; i < kActivationRows; ++i) {
      const Vec8 out = silu_times(unpack(gate[i]), unpack(up[i]));
      if (i < rows) store_vec(args.out + (first + i) * args.out_stride + column, out);
    }
  });
}

// With one: a warp has 32 columns of gate and the same of up. With kMany it walks over the strips of a tile.
template <class Strip, int kSteps, bool kMany>
struct SiluAndMul {
  static constexpr int kRows = Strip::kRows;

  const ActivationArgs& args;
  const Rows& rows;
  int first, left;  // column of the warp; how many there are from it on
  Module gate, up;
  BStrip<Strip, kSteps> gate_b, up_b;
  StripInputs<Strip, kSteps, kActivationWarps * kWarp, 2, kMany> inputs;

  __device__ __forceinline__ SiluAndMul(const ActivationArgs& args_, const Rows& rows_, int first_, int left_)
      : args(args_), rows(rows_), first(first_), left(left_), inputs(shared_memory()) {
    gate = module_of(args.delta, rows.slot, rows.rank, 0);
    up = module_of(args.delta, rows.slot, rows.rank, 1);
  }

  __device__ __forceinline__ void run() {
    if (rows.slot >= 0) {
      gate_b.fetch(gate, first, left);
      up_b.fetch(up, first, left);
    }
    const StripSource<Strip, kMany> strips(rows);
    for_strips(
        strips, rows.count, inputs, [&](const StripRows<Strip>& at, int strip) { fetch(at, strip); },
        [&](const StripRows<Strip>& at, int strip) { finish(at, strip); });
  }

 private:
  // Lanes beyond the last column compute the last ones again.
  __device__ __forceinline__ int column() const { return first + (Strip::column() < left ? Strip::column() : left - 8); }
  __device__ __forceinline__ void fetch(const StripRows<Strip>& at, int strip) {
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const bf16* x = row_at(args.x, at.row[i], args.x_stride) + column();
      inputs.fetch(strip, 0, i, x);
      inputs.fetch(strip, 1, i, x + args.inner);
    }
    if (rows.slot >= 0) {
      inputs.fetch_u(strip, 0, gate, at);
      inputs.fetch_u(strip, 1, up, at);
    }
    inputs.fetched();
  }
  __device__ __forceinline__ void finish(const StripRows<Strip>& at, int strip) const {
    Strip gate_term = {}, up_term = {};
    if (rows.slot >= 0) {
      gate_term = multiply(gate, gate_b, inputs.get_u(strip, 0, gate, at));
      up_term = multiply(up, up_b, inputs.get_u(strip, 1, up, at));
    }
    SGL_UNROLL
    for (int i = 0; i < kRows; ++i) {
      Float8 gate_sum = unpack(inputs.get(strip, 0, i)), up_sum = unpack(inputs.get(strip, 1, i));
      add_term(gate_sum, gate, gate_term, i);
      add_term(up_sum, up, up_term, i);
      const Vec8 out = silu_times(gate_sum, up_sum);
      if (at.mine[i] && Strip::column() < left) store_vec(row_at(args.out, at.row[i], args.out_stride) + column(), out);
    }
  }
};

// Grid: x = blocks of strips; y = pieces of the batch's tiles.
template <class Strip, int kSteps, bool kMany>
SGL_DEVICE void silu_and_mul(const ActivationArgs& args) {
  let_next_kernel_start();
  const Rows rows = rows_of_piece(args.delta.batch, args.block_tokens, args.piece_bits);
  const int first = (block_x() * kActivationWarps + warp_id()) * Strip::kColumns, left = args.inner - first;
  if (rows.count <= 0 || left <= 0) return wait_for_previous_kernel();
  SiluAndMul<Strip, kSteps, kMany>{args, rows, first, left}.run();
}

}  // namespace sgl
