// The low-rank term of a tile of outputs: delta[token][column] = scale * (B u), in shared memory, in float32.
//
// Used by the plain expand kernel and by every kernel that reads a projection's output anyway. The tile is computed by the matrix units with the
// columns as rows of the product, so one token costs as little as sixteen; it is then read back in whatever order the
// consumer likes. A sum runs over the rank in steps of 16 and depends on nothing else.
#pragma once

#include "lora.h"

namespace sgl {

template <int kTokens_, int kColumns_>
struct ExpandTile {
  static constexpr int kTokens = kTokens_;
  static constexpr int kColumns = kColumns_;
  static constexpr int kThreads = kColumns / 16 * kWarp;
  static constexpr int kDepth = 64;  // of the rank at once
  static constexpr int kOperandStride = kDepth + 8;  // elements; rows start in different banks
  static constexpr int kDeltaStride = kColumns + 4;  // floats
  static constexpr int kColumnBytes = kColumns * kOperandStride * 2;
  static constexpr int kOperandBytes = kColumnBytes + kTokens * kOperandStride * 2;
  static constexpr int kDeltaBytes = kTokens * kDeltaStride * 4;

  // Start fetching the first part of B, rows [first, first + columns) of [out, b_stride(rank)]: B is static, so this may
  // come before wait_for_previous_kernel.
  SGL_DEVICE void prefetch(uint8_t* operands, const bf16* b, int rank, int first, int columns) {
    fetch_columns(operands, b, rank, first, columns, 0);
  }

  // After prefetch. `token_u(t)` is the row of u of token t of the tile, null for none. `operands` has kOperandBytes,
  // `delta` kDeltaBytes; both are this block's alone. Ends with a barrier: delta may be read.
  template <class TokenU>
  SGL_DEVICE void compute(uint8_t* operands, float* delta, const bf16* b, int rank, float scale, int first, int columns,
                          TokenU token_u) {
    Accumulator sums[kTokens / 16];
    SGL_UNROLL
    for (int t = 0; t < kTokens / 16; ++t)
      SGL_UNROLL
      for (int i = 0; i < Accumulator::kSize; ++i) sums[t].v[i] = 0.f;
    const uint8_t* tokens = operands + kColumnBytes;
    for (int k = 0; k < rank; k += kDepth) {
      if (k > 0) {
        barrier();  // the operands of the step before have been read
        fetch_columns(operands, b, rank, first, columns, k);
      }
      fetch_tokens(operands + kColumnBytes, token_u, rank, k);
      async_commit();
      async_wait<0>();
      barrier();
      const int steps = (rank - k + 15) / 16;
      for (int step = 0; step < steps && step < kDepth / 16; ++step) {
        const Fragment a = load_fragment([&](int row, int half) {
          return operands + ((warp_id() * 16 + row) * kOperandStride + step * 16 + half * 8) * 2;
        });
        SGL_UNROLL
        for (int t = 0; t < kTokens / 16; ++t) {
          const Fragment u = load_fragment([&](int row, int half) {
            return tokens + ((t * 16 + row) * kOperandStride + step * 16 + half * 8) * 2;
          });
          mma(sums[t], a, u);
        }
      }
    }
    SGL_UNROLL
    for (int t = 0; t < kTokens / 16; ++t)
      SGL_UNROLL
      for (int i = 0; i < Accumulator::kSize; ++i)
        delta[(t * 16 + Accumulator::column(i)) * kDeltaStride + warp_id() * 16 + Accumulator::row(i)] =
            scale * sums[t].v[i];
    barrier();
  }

 private:
  // Chunks of eight along the rank; those that no step reads are left out, those beyond the rank are zeros.
  SGL_DEVICE void fetch_columns(uint8_t* operands, const bf16* b, int rank, int first, int columns, int k_begin) {
    const int left = (rank - k_begin + 15) / 16 * 2, chunks = left < kDepth / 8 ? left : kDepth / 8;
    const int stride = b_stride(rank);
    for (int i = thread_id(); i < kColumns * chunks; i += kThreads) {
      const int column = i / chunks, chunk = i % chunks, k = k_begin + chunk * 8;
      const int bytes = column < columns ? bytes_of(rank - k) : 0;
      const bf16* source = b + static_cast<int64_t>(first + column) * stride + k;
      async_copy16(operands + (column * kOperandStride + chunk * 8) * 2, bytes ? source : nullptr, bytes);
    }
  }
  template <class TokenU>
  SGL_DEVICE void fetch_tokens(uint8_t* tokens, TokenU token_u, int rank, int k_begin) {
    const int left = (rank - k_begin + 15) / 16 * 2, chunks = left < kDepth / 8 ? left : kDepth / 8;
    for (int i = thread_id(); i < kTokens * chunks; i += kThreads) {
      const int token = i / chunks, chunk = i % chunks, k = k_begin + chunk * 8;
      const bf16* u = token_u(token);
      const int bytes = u != nullptr ? bytes_of(rank - k) : 0;
      async_copy16(tokens + (token * kOperandStride + chunk * 8) * 2, bytes ? u + k : nullptr, bytes);
    }
  }
  SGL_DEVICE int bytes_of(int elements) { return elements <= 0 ? 0 : elements >= 8 ? 16 : elements * 2; }
};

// Row `row` of u, at the columns of a slice.
SGL_DEVICE const bf16* u_of(const LoraDelta& delta, int row, int slot, int slice) {
  return delta.u + row * delta.u_stride + slot * delta.u_slot_stride + slice * delta.site.rank_cap;
}

// Eight consecutive bf16 plus eight float32, rounded once.
SGL_DEVICE Vec8 add_delta(const Vec8& y, const float* delta) {
  Vec8 sum;
  SGL_UNROLL
  for (int i = 0; i < 4; ++i)
    sum.w[i] = pack_bf16(low_float(y.w[i]) + delta[2 * i], high_float(y.w[i]) + delta[2 * i + 1]);
  return sum;
}

}  // namespace sgl
