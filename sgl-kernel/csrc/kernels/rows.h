// What the kernels between the products share: the token rows of a block, and eight columns in float32.
#pragma once

#include "sgl_kernel/expand.h"
#include "sgl_kernel/geometry.h"

namespace sgl {

// Token rows that a block works on: those of a tile, or some of them, or, without a batch, neighbours.
struct Rows {
  const int32_t* perm;  // null: the rows first, first + 1, ...
  int first, count;     // count <= 0: no work
  int slot, rank;       // -1: the base model
};

// Rows [piece * size, (piece + 1) * size) of all.
SGL_DEVICE Rows neighbouring_rows(int tokens, int piece, int size) {
  const int first = piece * size, left = tokens - first;
  return {nullptr, first, left < size ? left : size, -1, 0};
}
SGL_DEVICE Rows rows_of_tile(const LoraBatch& batch, int index) {
  const Tile tile = read_tile(batch, index);
  return {batch.perm, tile.start, tile.count, tile.slot, tile.rank};
}
// Row i of the block in the matrices, -1 beyond its rows.
SGL_DEVICE int row_of(const Rows& rows, int i) {
  if (i >= rows.count) return -1;
  return rows.perm == nullptr ? rows.first + i : rows.perm[rows.first + i];
}

// What a block that takes `size` rows of every tile has of this one.
SGL_DEVICE Rows piece_of(Rows rows, int piece, int size) {
  const int left = rows.count - piece * size;
  rows.first += piece * size;
  rows.count = left < size ? left : size;
  return rows;
}

// A tile is 1 << bits pieces, neighbours along y.
SGL_DEVICE Rows rows_of_piece(const LoraBatch& batch, int size, int bits) {
  const int tile = block_y() >> bits;
  return piece_of(rows_of_tile(batch, tile), block_y() - (tile << bits), size);
}

// This lane's rows of a strip of a tile. Beyond the last one it is the last one again, so that loads of what is not written
// need not ask.
template <class Strip>
struct StripRows {
  int row[Strip::kRows];
  bool mine[Strip::kRows];

  __device__ __forceinline__ StripRows(const Rows& rows, int begin) {
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) {
      const int index = begin + Strip::row(i);
      mine[i] = index < rows.count;
      row[i] = rows.perm[rows.first + (mine[i] ? index : rows.count - 1)];
    }
  }
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

}  // namespace sgl
