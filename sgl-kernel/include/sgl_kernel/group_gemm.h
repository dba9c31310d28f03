// y = x W^T for 17 to 64 token rows on Hopper. The copy engine brings tiles of 64 columns to a ring in shared memory, ahead of
// the warpgroup that multiplies them out of there, so nobody's instructions stand between memory and the tensor cores.
//
// A block computes all token rows of kRows columns of y over its part of K; the blocks of a cluster take the parts, and the parts are
// added in the order of their ranks: a row's bits depend on the matrix alone. Weights are static, so the ring is full of them before
// the previous kernel has finished. What comes after has to fetch its code first, which is why loops are not unrolled. Who multiplies is a
// single warp to each scheduler, so every instruction between two products counts: the ring is walked with what the compiler knows to be
// the same in all lanes, out of registers that a product takes its tiles from.
#pragma once

#include "geometry.h"
#include "swizzle.h"
#include "vendor.h"

#if SGL_WARPGROUPS
namespace sgl {

template <int kRows_>
struct GroupGemm {
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kGroupStages;
  static constexpr int kTokenBytes = kGroupTokens * 128, kStageBytes = kTokenBytes + kRows * 128;
  static constexpr int kThreads = kWarpgroup + kWarp;  // who multiplies, and who copies
  static_assert(kThreads == kGroupThreads, "geometry.h");
  static constexpr int kSumStride = kRows + 8;         // floats; spreads the lanes of a store over the banks
  static constexpr int kSharedBytes = group_shared_bytes(kRows);
  static_assert(kGroupTokens * kSumStride * 4 <= kStages * kStageBytes, "sums take the place of the ring");

  const GroupGemmArgs& args;
  uint8_t* const ring;                // a stage is a tile of tokens, then one of weights
  Arrivals *const filled, *const free;  // of every stage
  const int first_row, first_column;
  const int steps;  // none where there are fewer tiles than parts

  static __device__ __forceinline__ void run(const GroupGemmArgs& args) {
    let_next_kernel_start();
    uint8_t* const ring = align_shared(shared_memory(), 1024);
    Arrivals* const filled = reinterpret_cast<Arrivals*>(ring + kStages * kStageBytes);
    const int begin = same_in_all_lanes(cluster_rank()) * args.part_columns, left = args.in_features - begin;
    const int columns = left < args.part_columns ? left : args.part_columns;
    GroupGemm{args, ring, filled, filled + kStages, cluster_x() * kRows, begin, (columns + 63) / 64}.run();
  }

 private:
  __device__ __forceinline__ void run() const {
    if (thread_id() == 0) {
      for (int i = 0; i < kStages; ++i) {
        arrivals_init(filled + i, 1);
        arrivals_init(free + i, 1);
      }
      arrivals_ready();
    }
    barrier();
    GroupSums<kRows> sums;
    if (same_in_all_lanes(warp_id()) < kWarpgroup / kWarp) {
      multiply(sums);
    } else if (lane_id() == 0) {
      copy();
    }
    wait_for_previous_kernel();  // which may read what y was
    if (args.num_splits == 1) {
      if (thread_id() < kWarpgroup) store(sums);
    } else {
      reduce(sums);
    }
  }

  __device__ __forceinline__ uint8_t* stage(int step) const { return ring + step % kStages * kStageBytes; }

  __device__ __forceinline__ void copy_weights(int step) const {
    Arrivals* const done = filled + step % kStages;
    arrive_expecting(done, kStageBytes);
    copy_tile(stage(step) + kTokenBytes, args.weight, first_row, first_column + step * 64, done, Reuse::kNone);
  }
  __device__ __forceinline__ void copy_tokens(int step) const {
    copy_tile(stage(step), args.x, 0, first_column + step * 64, filled + step % kStages, Reuse::kSoon);
  }
  __device__ __forceinline__ void copy() const {
    const int early = steps < kStages ? steps : kStages;
    SGL_NO_UNROLL
    for (int step = 0; step < early; ++step) copy_weights(step);
    wait_for_previous_kernel();
    SGL_NO_UNROLL
    for (int step = 0; step < early; ++step) copy_tokens(step);
    SGL_NO_UNROLL
    for (int step = kStages; step < steps; ++step) {
      wait_for_arrivals(free + step % kStages, (step / kStages - 1) % 2);
      copy_weights(step);
      copy_tokens(step);
    }
  }

  __device__ __forceinline__ void multiply(GroupSums<kRows>& sums) const {
    SGL_UNROLL
    for (int i = 0; i < kRows / 2; ++i) sums.v[i] = 0.f;
    const Operand first = operand_at(ring);
    SGL_NO_UNROLL
    for (int step = 0; step < steps; ++step) {
      const Operand tokens = operand_after(first, step % kStages * kStageBytes), weights = operand_after(tokens, kTokenBytes);
      wait_for_arrivals(filled + step % kStages, step / kStages % 2);
      group_begin();
      SGL_UNROLL
      for (int i = 0; i < 4; ++i) multiply_tiles(sums, tokens, weights, i);
      group_commit();
      group_wait<1>(sums);
      if (step > 0 && thread_id() == 0) arrive(free + (step - 1) % kStages);
    }
    group_wait<0>(sums);
  }

  __device__ __forceinline__ void store(const GroupSums<kRows>& sums) const {
    SGL_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int token = sums.row(half);
      if (token >= args.tokens) continue;
      uint32_t* const y = reinterpret_cast<uint32_t*>(args.y + token * args.y_stride + first_row + sums.column(half));
      SGL_UNROLL
      for (int i = half; i < kRows / 4; i += 2)  // columns are in or out of the matrix eight by eight
        if (first_row + i * 4 < args.out_features) y[i / 2 * 4] = pack_bf16(sums.v[2 * i], sums.v[2 * i + 1]);
    }
  }

  // Every block adds the parts of its share of the token rows.
  __device__ __forceinline__ void reduce(const GroupSums<kRows>& sums) const {
    float* const part = reinterpret_cast<float*>(ring);
    barrier();  // the ring has been read
    if (thread_id() < kWarpgroup)
      SGL_UNROLL
      for (int i = 0; i < kRows / 4; ++i)
        *reinterpret_cast<Float2*>(part + sums.row(i) * kSumStride + sums.column(i)) = {{sums.v[2 * i], sums.v[2 * i + 1]}};
    cluster_barrier();
    constexpr int kQuads = kRows / 4;
    const int parts = args.num_splits, first = cluster_rank() * args.share_tokens;
    const int end = first + args.share_tokens, last = end < args.tokens ? end : args.tokens;
    SGL_NO_UNROLL
    for (int i = first * kQuads + thread_id(); i < last * kQuads; i += kThreads) {
      const int token = i / kQuads, row = i % kQuads * 4, n = first_row + row;
      if (n >= args.out_features) continue;
      const Float4* const place = reinterpret_cast<const Float4*>(part + token * kSumStride + row);
      Float4 more[kGroupSplits];
      SGL_UNROLL
      for (int other = 0; other < kGroupSplits; ++other)
        if (other < parts) more[other] = cluster_load(place, other);
      Float4 sum = {};
      SGL_UNROLL
      for (int other = 0; other < kGroupSplits; ++other)
        if (other < parts)
          SGL_UNROLL
          for (int j = 0; j < 4; ++j) sum.v[j] += more[other].v[j];
      uint32_t* const y = reinterpret_cast<uint32_t*>(args.y + token * args.y_stride + n);
      y[0] = pack_bf16(sum.v[0], sum.v[1]);
      y[1] = pack_bf16(sum.v[2], sum.v[3]);
    }
    cluster_start();
    cluster_started();  // nobody leaves while others read its sums; y may still be on its way
  }
};

}  // namespace sgl
#endif
