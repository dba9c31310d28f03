// The main loop of products for a few token rows: sixteen rows of weights at a time, streamed through by every warp alone.
//
// Decoding reads each weight once, so what counts is how soon its bytes are on the way and how short the path is from the last of them to the
// result. Each warp of a block takes its share of the slices of K for the block's rows and keeps a ring of slices in flight in
// shared memory that is its own: no barrier until the sums of the warps are added, in the order of the warps (and of the
// blocks of a cluster, which share K). Blocks walk through units of work, and the ring runs on from one unit into the next.
// The first slices of weights are asked for before the previous kernel has finished.
// A result depends on K and the number of parts alone: not on the other rows, tokens, units or blocks.
#pragma once

#include "swizzle.h"
#include "vendor.h"

namespace sgl {

template <int kTokens_, int kWarps_, int kStages>
struct StreamGemm {
  static constexpr int kRows = 16;
  static constexpr int kTokens = kTokens_;  // 8 or 16; 16 where the matrix units know no narrower tile
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kDepth = 64;  // of one slice
  static constexpr int kRowBytes = kDepth * 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kRowBytes;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumStride = kRows + 4;  // floats
  static constexpr int kSharedBytes = kRingBytes + kWarps * kTokens * kSumStride * 4;
  static constexpr int kLoaders = kWarp / 8;  // rows that a warp copies at once
  static constexpr int kRowCopies = kRows / kLoaders;
  static constexpr int kTokenCopies = kTokens / kLoaders;

  // A slice of a unit of this warp.
  struct Cursor {
    int unit, slice, stage;

    template <class Work>
    __device__ __forceinline__ void advance(const Work& work, int slices) {
      stage = stage + 1 == kStages ? 0 : stage + 1;
      if (++slice < slices) return;
      slice = 0;
      unit = work.next(unit);
    }
  };

  // Compute the units work.start(), work.next(...), ... as long as work.exists(unit), over k_begin <= k < k_end. `Work`
  // says what they are: rows(unit), which is called with r for the start of a row of K or null for zeros, and token(unit, t) likewise;
  // tokens(unit), how many there are;
  // store(unit, row, token, low, high), which takes the sums of `row` and `row + 1`, both of which may be rows for which row() is null.
  template <class Work>
  SGL_DEVICE void run(const Work& work, int k_begin, int k_end) {
    uint8_t* const shared = shared_memory();
    const int warp = warp_id(), chunk = lane_id() % 8, loader = lane_id() / 8;
    uint8_t* const ring = shared + warp * kStages * kStageBytes;
    const int all = (k_end - k_begin + kDepth - 1) / kDepth;
    const int slices = (all - warp + kWarps - 1) / kWarps;  // of this warp
    const int k_first = k_begin + warp * kDepth + chunk * 8;
    const bool busy = slices > 0;
    const bf16* rows[kRowCopies];
    const bf16* tokens[kTokenCopies];

    auto copy_rows = [&](const Cursor& at) {
      const int k = k_first + at.slice * kWarps * kDepth;
      if (at.slice == 0) {
        const auto source = work.rows(at.unit);
        SGL_UNROLL
        for (int i = 0; i < kRowCopies; ++i) rows[i] = source(loader + i * kLoaders);
      }
      SGL_UNROLL
      for (int i = 0; i < kRowCopies; ++i)
        copy(ring + at.stage * kStageBytes + swizzle(loader + i * kLoaders, chunk), rows[i], k, k_end);
    };
    auto copy_tokens = [&](const Cursor& at) {
      const int k = k_first + at.slice * kWarps * kDepth;
      if (at.slice == 0)
        SGL_UNROLL
        for (int i = 0; i < kTokenCopies; ++i) tokens[i] = work.token(at.unit, loader + i * kLoaders);
      uint8_t* const stage = ring + at.stage * kStageBytes + kRows * kRowBytes;
      SGL_UNROLL
      for (int i = 0; i < kTokenCopies; ++i) copy(stage + swizzle(loader + i * kLoaders, chunk), tokens[i], k, k_end);
    };

    const int first = work.start();
    Cursor fetched{first, 0, 0};
    SGL_NO_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (busy && work.exists(fetched.unit)) {
        copy_rows(fetched);
        fetched.advance(work, slices);
      }
      async_commit();
    }
    work.before_wait();
    wait_for_previous_kernel();
    Cursor followed{first, 0, 0};
    SGL_NO_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (busy && work.exists(followed.unit)) {
        copy_tokens(followed);
        followed.advance(work, slices);
      }
      async_commit();
    }
    int stage = 0;
    for (int unit = first; work.exists(unit); unit = work.next(unit)) {
      Accumulator even = {}, odd = {};
      SGL_NO_UNROLL
      for (int slice = 0; slice < slices; ++slice) {
        async_wait<kStages - 2>();
        warp_barrier();
        if (work.exists(fetched.unit)) {
          copy_rows(fetched);
          copy_tokens(fetched);
          fetched.advance(work, slices);
        }
        async_commit();
        multiply(even, odd, ring + stage * kStageBytes);
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      reduce(work, unit, even, odd, reinterpret_cast<float*>(shared + kRingBytes));
    }
  }

 private:
  SGL_DEVICE void copy(uint8_t* to, const bf16* source, int k, int k_end) {
    const bool present = source != nullptr && k < k_end;
    async_copy16(to, present ? source + k : nullptr, present ? 16 : 0);
  }

  // One slice. Two sums, because a product waits for the one before it into the same sum.
  SGL_DEVICE void multiply(Accumulator& even, Accumulator& odd, const uint8_t* stage) {
    const uint8_t* const token_rows = stage + kRows * kRowBytes;
    Fragment a[kDepth / 16], b[kDepth / 16];
    SGL_UNROLL
    for (int step = 0; step < kDepth / 16; ++step) {
      // With eight tokens the other eight are never multiplied: any address will do.
      b[step] = load_fragment([&](int row, int half) { return token_rows + swizzle(row % kTokens, step * 2 + half); });
      a[step] = load_fragment([&](int row, int half) { return stage + swizzle(row, step * 2 + half); });
    }
    SGL_UNROLL
    for (int step = 0; step < kDepth / 16; ++step) mma<kTokens>(step % 2 ? odd : even, a[step], b[step]);
  }

  template <class Work>
  SGL_DEVICE void reduce(const Work& work, int unit, const Accumulator& even, const Accumulator& odd, float* sums) {
    constexpr int kUsed = Accumulator::kSize * kTokens / 16;  // eight columns are the first half of a lane's elements
    SGL_UNROLL
    for (int i = 0; i < kUsed; ++i) {
      float* const mine = sums + (warp_id() * kTokens + Accumulator::column(i)) * kSumStride;
      mine[Accumulator::row(i)] = even.v[i] + odd.v[i];
    }
    const int parts = cluster_size();
    if (parts > 1) cluster_barrier();
    else barrier();
    constexpr int kPairs = kRows / 2;
    const int pairs = work.tokens(unit) * kPairs;
    SGL_NO_UNROLL
    for (int i = cluster_rank() * kThreads + thread_id(); i < pairs; i += parts * kThreads) {
      const int token = i / kPairs, row = i % kPairs * 2;
      const Float2* const own = reinterpret_cast<const Float2*>(sums + token * kSumStride + row);
      constexpr int kNextWarp = kTokens * kSumStride / 2;
      Float2 sum = {};
      auto add = [&](const Float2& more) {
        sum.v[0] += more.v[0];
        sum.v[1] += more.v[1];
      };
      if (parts == 1)
        SGL_UNROLL
        for (int warp = 0; warp < kWarps; ++warp) add(own[warp * kNextWarp]);
      else
        SGL_NO_UNROLL
        for (int part = 0; part < parts; ++part)
          SGL_UNROLL
          for (int warp = 0; warp < kWarps; ++warp) add(cluster_load(own + warp * kNextWarp, part));
      work.store(unit, row, token, sum.v[0], sum.v[1]);
    }
    if (parts > 1) cluster_barrier();  // nobody overwrites its sums, or leaves, while others read them
    else barrier();
  }
};

}  // namespace sgl
