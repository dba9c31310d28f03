// What the kernels between the products share: the token rows of a block, the low-rank term that is added to them, and
// eight columns in float32.
#pragma once

#include "sgl_kernel/expand.h"

namespace sgl {

// Token rows that a block works on: some of a tile, or, without a batch, neighbours.
struct Rows {
  const int32_t* perm;  // null: the rows first, first + 1, ...
  int first, count;     // count <= 0: no work
  int slot;             // -1: the base model
};

// Tiles are counted along y; each is cut into `pieces` of `size` rows. Without a batch the rows 0 ... tokens - 1 are.
SGL_DEVICE Rows rows_of_block(const LoraBatch& batch, int tokens, int piece, int pieces, int size) {
  if (batch.header == nullptr) {
    const int first = (block_y() * pieces + piece) * size, left = tokens - first;
    return {nullptr, first, left < size ? left : size, -1};
  }
  if (block_y() >= num_tiles(batch)) return {nullptr, 0, 0, -1};
  const Tile tile = read_tile(batch, block_y());
  const int left = tile.count - piece * size;
  return {batch.perm, tile.start + piece * size, left < size ? left : size, tile.slot};
}
SGL_DEVICE int row_of(const Rows& rows, int i) {
  return rows.perm == nullptr ? rows.first + i : rows.perm[rows.first + i];
}

// What one slice of an adapter adds to a block's rows. Rank 0: nothing, and then not even a zero is added, so that the
// rows keep the bits they have without adapters.
struct Addition {
  const bf16* b;
  int rank;
  float scale;
  int slice;
};
SGL_DEVICE Addition addition_of(const LoraDelta& delta, const Rows& rows, int slice) {
  if (rows.slot < 0) return {nullptr, 0, 0.f, slice};
  const Slice module = read_slice(delta.site, rows.slot, slice);
  // Three constants rather than an index: an array of arguments that is indexed would be copied to memory first.
  const bf16* b = slice == 0   ? b_of(delta.site, rows.slot, 0)
                  : slice == 1 ? b_of(delta.site, rows.slot, 1)
                               : b_of(delta.site, rows.slot, 2);
  return {b, module.rank, module.scale, slice};
}

// The term of the columns [first, first + columns) of a slice for a block's rows. Expand::prefetch came before.
template <class Expand>
SGL_DEVICE void compute_addition(const LoraDelta& delta, const Rows& rows, const Addition& added, uint8_t* operands,
                                 float* sums, int first, int columns) {
  Expand::compute(operands, sums, added.b, added.rank, added.scale, first, columns, [&](int t) -> const bf16* {
    return t < rows.count ? u_of(delta, row_of(rows, t), rows.slot, added.slice) : nullptr;
  });
}

struct Float8 {
  float v[8];
};
SGL_DEVICE Float8 unpack(const Vec8& packed) {
  Float8 f;
  SGL_UNROLL
  for (int i = 0; i < 4; ++i) {
    f.v[2 * i] = low_float(packed.w[i]);
    f.v[2 * i + 1] = high_float(packed.w[i]);
  }
  return f;
}
SGL_DEVICE Vec8 pack(const Float8& f) {
  Vec8 packed;
  SGL_UNROLL
  for (int i = 0; i < 4; ++i) packed.w[i] = pack_bf16(f.v[2 * i], f.v[2 * i + 1]);
  return packed;
}
SGL_DEVICE Float8 load_floats(const float* p) {  // 16-byte aligned
  const Float4* quads = reinterpret_cast<const Float4*>(p);
  const Float4 low = quads[0], high = quads[1];
  return {{low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}};
}
SGL_DEVICE void add(Float8& sum, const Float8& more) {
  SGL_UNROLL
  for (int i = 0; i < 8; ++i) sum.v[i] += more.v[i];
}
// Squares are added one by one, in the order of the columns.
SGL_DEVICE float add_squares(float sum, const Float8& f) {
  SGL_UNROLL
  for (int i = 0; i < 8; ++i) sum = multiply_add(f.v[i], f.v[i], sum);
  return sum;
}
// The sum over `kLanes` neighbouring lanes, the same bits in each; all lanes of the warp take part.
template <int kLanes>
SGL_DEVICE float sum_lanes(float value) {
  SGL_UNROLL
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace sgl
