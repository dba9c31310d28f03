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
  wait_for_previous_kernel();
  const int column = (block_x() * kActivationWarps * kWarp + thread_id()) * 8, first = block_y() * kActivationRows;
  if (column >= args.inner) return;
  Vec8 gate[kActivationRows], up[kActivationRows];
  SGL_UNROLL
  for (int i = 0; i < kActivationRows; ++i) {
    if (first + i >= args.tokens) continue;
    const bf16* x = args.x + (first + i) * args.x_stride + column;
    gate[i] = load_vec(x);
    up[i] = load_vec(x + args.inner);
  }
  SGL_UNROLL
  for (int i = 0; i < kActivationRows; ++i)
    if (first + i < args.tokens)
      store_vec(args.out + (first + i) * args.out_stride + column, silu_times(unpack(gate[i]), unpack(up[i])));
}

// With one: a warp has 32 columns of gate and the same of up.
template <int kSteps>
struct SiluAndMul {
  static constexpr int kRows = Strip::kRows;

  const ActivationArgs& args;
  const Rows& rows;
  int first;  // column of the warp

  __device__ __forceinline__ void run() const {
    const Module gate_module = module_of(args.delta, rows.slot, rows.rank, 0);
    const Module up_module = module_of(args.delta, rows.slot, rows.rank, 1);
    BStrip<kSteps> gate_b, up_b;
    if (rows.slot >= 0) {
      gate_b.fetch(gate_module, first, args.inner - first);
      up_b.fetch(up_module, first, args.inner - first);
    }
    SGL_NO_UNROLL
    for (int begin = 0; begin < rows.count; begin += 16) {
      const StripRows strip(rows, begin);
      if (begin == 0) wait_for_previous_kernel();
      Vec8 gate[kRows] = {}, up[kRows] = {};
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (!mine(strip.row[i])) continue;
        const bf16* x = args.x + strip.row[i] * args.x_stride + column();
        gate[i] = load_vec(x);
        up[i] = load_vec(x + args.inner);
      }
      Strip gate_term = {}, up_term = {};
      if (rows.slot >= 0) {
        UStrip<kSteps> gate_u, up_u;
        gate_u.fetch(gate_module, strip.row);
        up_u.fetch(up_module, strip.row);
        gate_term = multiply(gate_module, gate_b, gate_u);
        up_term = multiply(up_module, up_b, up_u);
      }
      SGL_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (strip.skips(i)) continue;
        Float8 gate_sum = unpack(gate[i]), up_sum = unpack(up[i]);
        add_term(gate_sum, gate_module, gate_term, i);
        add_term(up_sum, up_module, up_term, i);
        if (mine(strip.row[i])) store_vec(args.out + strip.row[i] * args.out_stride + column(), silu_times(gate_sum, up_sum));
      }
    }
  }

 private:
  __device__ __forceinline__ int column() const { return first + Strip::column(); }
  __device__ __forceinline__ bool mine(int row) const { return row >= 0 && column() < args.inner; }
};

// Grid: x = blocks of strips; y = tiles of the batch.
template <int kSteps>
SGL_DEVICE void silu_and_mul(const ActivationArgs& args) {
  let_next_kernel_start();
  const Rows rows = rows_of_tile(args.delta.batch, block_y());
  if (rows.count <= 0) return wait_for_previous_kernel();
  SiluAndMul<kSteps>{args, rows, (block_x() * kActivationWarps + warp_id()) * Strip::kColumns}.run();
}

}  // namespace sgl
