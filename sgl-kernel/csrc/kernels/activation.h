// out = silu(gate + its low-rank term) * (up + its own): what stands between gate_up and down.
#pragma once

#include "rows.h"
#include "sgl_kernel/geometry.h"

namespace sgl {

SGL_DEVICE float silu(float x) { return x * reciprocal_approx(1.f + exp_approx(-x)); }

template <int kTokens_>
struct SiluAndMul {
  static constexpr int kTokens = kTokens_;
  using Expand = ExpandTile<kTokens, kActivationColumns>;
  static constexpr int kThreads = Expand::kThreads;
  static constexpr int kLanes = kActivationColumns / 8;  // of a row
  static constexpr int kGroups = kThreads / kLanes;
  static constexpr int kPasses = (kTokens + kGroups - 1) / kGroups;
  // With few tokens both slices are fetched ahead; with many the second comes while the first is added.
  static constexpr bool kBothAhead = kTokens == 16;
  static constexpr int kOperandBytes = Expand::kOperandBytes * (kBothAhead ? 2 : 1);
  static constexpr int kSharedBytes = kOperandBytes + Expand::kDeltaBytes;

  const ActivationArgs& args;
  Rows rows;
  int first, columns;

  __device__ __forceinline__ SiluAndMul(const ActivationArgs& args_, const Rows& rows_, int first_)
      : args(args_), rows(rows_), first(first_) {
    const int left = args.inner - first;
    columns = left < kActivationColumns ? left : kActivationColumns;
  }

  __device__ __forceinline__ void run() {
    const Addition gate_term = addition_of(args.delta, rows, 0), up_term = addition_of(args.delta, rows, 1);
    uint8_t* const operands = shared_memory();
    uint8_t* const up_operands = operands + (kBothAhead ? Expand::kOperandBytes : 0);
    float* const sums = reinterpret_cast<float*>(operands + kOperandBytes);
    if (gate_term.rank > 0) fetch(gate_term, operands);
    if (kBothAhead && up_term.rank > 0) fetch(up_term, up_operands);
    wait_for_previous_kernel();
    Vec8 gate[kPasses], up[kPasses];
    load(gate, up);
    if (gate_term.rank > 0) compute_addition<Expand>(args.delta, rows, gate_term, operands, sums, first, columns);
    if (!kBothAhead && up_term.rank > 0) fetch(up_term, up_operands);
    Float8 activated[kPasses];
    SGL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      activated[pass] = added(gate[pass], gate_term, sums, pass);
      SGL_UNROLL
      for (int i = 0; i < 8; ++i) activated[pass].v[i] = silu(activated[pass].v[i]);
    }
    if (up_term.rank > 0) compute_addition<Expand>(args.delta, rows, up_term, up_operands, sums, first, columns);
    SGL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      const Float8 factor = added(up[pass], up_term, sums, pass);
      SGL_UNROLL
      for (int i = 0; i < 8; ++i) activated[pass].v[i] *= factor.v[i];
      if (!mine(pass)) continue;
      bf16* out = args.out + row_of(rows, index(pass)) * args.out_stride + first + column();
      store_vec(out, pack(activated[pass]));
    }
  }

 private:
  __device__ __forceinline__ int index(int pass) const { return pass * kGroups + thread_id() / kLanes; }
  __device__ __forceinline__ int column() const { return thread_id() % kLanes * 8; }
  __device__ __forceinline__ bool mine(int pass) const { return index(pass) < rows.count && column() < columns; }

  __device__ __forceinline__ void fetch(const Addition& term, uint8_t* operands) const {
    Expand::prefetch(operands, term.b, term.rank, first, columns);
  }
  __device__ __forceinline__ void load(Vec8* gate, Vec8* up) const {
    SGL_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      gate[pass] = up[pass] = Vec8{};
      if (!mine(pass)) continue;
      const bf16* x = args.x + row_of(rows, index(pass)) * args.x_stride + first + column();
      gate[pass] = load_vec(x);
      up[pass] = load_vec(x + args.inner);
    }
  }
  __device__ __forceinline__ Float8 added(const Vec8& x, const Addition& term, const float* sums, int pass) const {
    Float8 sum = unpack(x);
    if (term.rank > 0 && mine(pass)) add(sum, load_floats(sums + index(pass) * Expand::kDeltaStride + column()));
    return sum;
  }
};

// Grid: x = ceil(inner / kActivationColumns) * pieces, y = tiles of the batch, or without one ceil(tokens / (pieces *
// kTokens)). A piece is kTokens rows of a tile: 1 of them unless the batch has larger tiles than the kernel.
template <class Kernel>
SGL_DEVICE void silu_and_mul(const ActivationArgs& args) {
  let_next_kernel_start();
  const int tiles = (args.inner + kActivationColumns - 1) / kActivationColumns;
  const Rows rows = rows_of_block(args.delta.batch, args.tokens, block_x() / tiles, grid_x() / tiles, Kernel::kTokens);
  if (rows.count <= 0) return wait_for_previous_kernel();
  Kernel(args, rows, block_x() % tiles * kActivationColumns).run();
}

}  // namespace sgl
