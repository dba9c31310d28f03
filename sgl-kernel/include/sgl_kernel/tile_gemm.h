// The main loop of products of more than 16 tokens: rows of weights times token rows, both dense along K.
//
// A block computes kRows x kTokens sums over its part of K; the blocks of a cluster take the parts, and the parts are added in the order of
// their ranks, so a result depends on K and the number of parts alone: not on the other rows, tokens or blocks.
// Every warp reads all token rows out of shared memory, which is what limits it: on 32 lanes a warp therefore has 32 rows of weights,
// and half of every slice of K.
// Weights are static, so their first stages are on the way before the previous kernel has finished.
#pragma once

#include "geometry.h"
#include "swizzle.h"
#include "vendor.h"

namespace sgl {

template <int kRows_, int kTokens_, int kStages>
struct TileGemm {
  static constexpr int kRows = kRows_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kHalves = gemm_halves(kWarp);
  static constexpr int kWarpRows = 16 * kHalves;
  static constexpr int kGroups = kRows / kWarpRows;  // warps that share a half of K
  static constexpr int kThreads = kGroups * kHalves * kWarp;
  static constexpr int kDepth = 64;  // of one stage
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  static constexpr int kSumStride = kRows + 4;  // floats; spreads the lanes of a store over the banks
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kSums = kTokens * kSumStride;
  static constexpr int kSumBytes = kHalves * kSums * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kSumBytes ? kPipelineBytes : kSumBytes;
  static constexpr int kLoaders = kThreads / 8;  // rows that the block copies at once
  static constexpr int kRowCopies = kRows / kLoaders;
  static constexpr int kTokenCopies = (kTokens + kLoaders - 1) / kLoaders;

  Accumulator sums[kHalves][kTokens / 16];  // of the warp's rows, sixteen and sixteen

  // Add up k_begin <= k < k_end, both multiples of 8. `row(r)` and `token(t)` give the start of a row of K, or null for zeros; `rows` of them exist.
  template <class Row, class Token>
  __device__ __forceinline__ void run(Row row, Token token, int rows, int k_begin, int k_end) {
    uint8_t* const shared = shared_memory();
    const int thread = thread_id(), chunk = thread % 8;
    const bf16* row_source[kRowCopies];
    SGL_UNROLL
    for (int i = 0; i < kRowCopies; ++i) row_source[i] = row(thread / 8 + i * kLoaders);
    const int steps = (k_end - k_begin + kDepth - 1) / kDepth;

    auto copy_rows = [&](int step) {
      const int k = k_begin + step * kDepth + chunk * 8;
      uint8_t* stage = shared + step % kStages * kStageBytes;
      SGL_UNROLL
      for (int i = 0; i < kRowCopies; ++i) copy(stage, thread / 8 + i * kLoaders, chunk, row_source[i], k, k_end);
    };
    const bf16* token_source[kTokenCopies];
    auto copy_tokens = [&](int step) {
      const int k = k_begin + step * kDepth + chunk * 8;
      uint8_t* stage = shared + step % kStages * kStageBytes + kRows * kRowBytes;
      SGL_UNROLL
      for (int i = 0; i < kTokenCopies; ++i)
        if (thread / 8 + i * kLoaders < kTokens) copy(stage, thread / 8 + i * kLoaders, chunk, token_source[i], k, k_end);
    };

    barrier();  // the stages may still be read as the sums of an earlier tile
    SGL_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy_rows(step);
      async_commit();
    }
    wait_for_previous_kernel();
    SGL_UNROLL
    for (int i = 0; i < kTokenCopies; ++i) token_source[i] = token(thread / 8 + i * kLoaders);
    SGL_UNROLL
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy_tokens(step);
      async_commit();
    }
    clear();
    const bool active = warp_id() % kGroups * kWarpRows < rows;
    for (int step = 0; step < steps; ++step) {
      async_wait<kStages - 2>();
      barrier();
      const int next = step + kStages - 1;
      if (next < steps) {
        copy_rows(next);
        copy_tokens(next);
      }
      async_commit();
      if (active) multiply(shared + step % kStages * kStageBytes);
    }
    async_wait<0>();
    barrier();
  }

  // Add the cluster's parts and hand the sums to `store(row, token, Float4)`, four rows at a time, of which
  // those from `rows` on are nobody's.
  template <class Store>
  __device__ __forceinline__ void reduce(int rows, int tokens, Store store) {
    float* const part = reinterpret_cast<float*>(shared_memory());
    float* const own = part + warp_id() / kGroups * kSums + warp_id() % kGroups * kWarpRows;
    SGL_UNROLL
    for (int h = 0; h < kHalves; ++h)
      SGL_UNROLL
      for (int t = 0; t < kTokens / 16; ++t)
        SGL_UNROLL
        for (int i = 0; i < Accumulator::kSize; ++i)
          own[(t * 16 + Accumulator::column(i)) * kSumStride + h * 16 + Accumulator::row(i)] = sums[h][t].v[i];
    cluster_barrier();
    constexpr int kQuads = kRows / 4;
    const int parts = cluster_size();
    for (int i = cluster_rank() * kThreads + thread_id(); i < tokens * kQuads; i += parts * kThreads) {
      const int token = i / kQuads, row = i % kQuads * 4;
      if (row >= rows) continue;
      const Float4* place = reinterpret_cast<const Float4*>(part + token * kSumStride + row);
      Float4 sum = {};
      for (int other = 0; other < parts; ++other)
        SGL_UNROLL
        for (int h = 0; h < kHalves; ++h) {
          const Float4 more = cluster_load(place + h * (kSums / 4), other);
          SGL_UNROLL
          for (int j = 0; j < 4; ++j) sum.v[j] += more.v[j];
        }
      store(row, token, sum);
    }
    if (parts > 1) cluster_barrier();  // nobody leaves while others read its sums
  }

 private:
  __device__ __forceinline__ void clear() {
    SGL_UNROLL
    for (int h = 0; h < kHalves; ++h)
      SGL_UNROLL
      for (int t = 0; t < kTokens / 16; ++t)
        SGL_UNROLL
        for (int i = 0; i < Accumulator::kSize; ++i) sums[h][t].v[i] = 0.f;
  }

  SGL_DEVICE void copy(uint8_t* stage, int row, int chunk, const bf16* source, int k, int k_end) {
    const bool present = source != nullptr && k < k_end;
    async_copy16(stage + swizzle(row, chunk), present ? source + k : nullptr, present ? 16 : 0);
  }

  __device__ __forceinline__ void multiply(const uint8_t* stage) {
    const uint8_t* row_tile = stage;
    const uint8_t* token_tile = stage + kRows * kRowBytes;
    const int first = warp_id() % kGroups * kWarpRows;
    constexpr int kSteps = kDepth / 16 / kHalves;
    SGL_NO_UNROLL  // registers for two blocks of a multiprocessor
    for (int i = 0; i < kSteps; ++i) {
      const int step = warp_id() / kGroups * kSteps + i;
      Fragment a[kHalves];
      SGL_UNROLL
      for (int h = 0; h < kHalves; ++h)
        a[h] = load_fragment([&](int row, int half) { return row_tile + swizzle(first + h * 16 + row, step * 2 + half); });
      SGL_UNROLL
      for (int t = 0; t < kTokens / 16; ++t) {
        const Fragment b =
            load_fragment([&](int row, int half) { return token_tile + swizzle(t * 16 + row, step * 2 + half); });
        SGL_UNROLL
        for (int h = 0; h < kHalves; ++h) mma(sums[h][t], a[h], b);
      }
    }
  }
};

// This block's part of K: multiples of 64, the same for every tile of a launch.
struct Range {
  int begin, end;
};
SGL_DEVICE Range part_of(int length, int part, int parts) {
  const int chunks = (length + 63) / 64, each = (chunks + parts - 1) / parts;
  const int begin = part * each * 64, end = begin + each * 64;
  return {begin < length ? begin : length, end < length ? end : length};
}

}  // namespace sgl
