// Reading slabs and batches: what every kernel that touches adapters shares.
//
// What a kernel needs before it can ask for an adapter's first numbers, its slot and rank, is in the batch, so that they are one
// dependent read away. A module's own rank and scale, which the slab's table has, are needed only with the sums.
#pragma once

#include "args.h"
#include "vendor.h"

namespace sgl {

// Row `row` of a matrix whose rows are `stride` numbers apart, found by one multiplication of 32 bits: the host checks that
// strides are small enough.
template <class T>
SGL_DEVICE T* row_at(T* matrix, int row, int64_t stride) {
  return matrix + multiply_wide(row, static_cast<int>(stride));
}

struct alignas(16) Tile {  // token rows of one slot: perm[start ... start + count); none where the batch has no such tile
  int start, count, slot, rank;  // the adapter's rank
};
SGL_DEVICE Tile read_tile(const LoraBatch& batch, int index) {
  return *reinterpret_cast<const Tile*>(batch.tiles + 4 * index);
}

struct alignas(8) Live {  // a slot of the step and its adapter's rank; slot -1 where there are no more
  int slot, rank;
};
SGL_DEVICE Live read_live(const LoraBatch& batch, int index) {
  return *reinterpret_cast<const Live*>(batch.live + 2 * index);
}

struct alignas(8) Slice {  // one module of an adapter; rank 0: the adapter has none
  int rank;
  float scale;
};

SGL_DEVICE const uint8_t* slab_of(const LoraSite& site, int slot) { return site.slabs + slot * site.slab_bytes; }

SGL_DEVICE Slice read_slice(const LoraSite& site, int slot, int slice) {
  return *reinterpret_cast<const Slice*>(slab_of(site, slot) + site.table_offset + 8 * slice);
}
SGL_DEVICE const bf16* b_of(const LoraSite& site, int slot, int slice) {
  // Three constants rather than an index: an array of arguments that is indexed would be copied to memory first.
  const int64_t offset = slice == 0 ? site.b_offsets[0] : slice == 1 ? site.b_offsets[1] : site.b_offsets[2];
  return reinterpret_cast<const bf16*>(slab_of(site, slot) + offset);
}
SGL_DEVICE int b_stride(int rank) { return (rank + 7) / 8 * 8; }  // of all modules of an adapter of this rank

// The rows of A of an adapter, as many of every slice as the adapter has ranks: those of a module of a lower rank, or of
// none, bring columns of u that nobody reads.
struct ARows {
  int slot, rank, count;

  SGL_DEVICE ARows of(const LoraSite& site, int slot, int rank) { return {slot, rank, site.num_slices * rank}; }
  // A row's place among the rows of A that a slab has room for, which is also its column of u.
  __device__ __forceinline__ int place(const LoraSite& site, int row) const {
    return row + ((row >= rank) + (row >= 2 * rank)) * (site.rank_cap - rank);
  }
};
SGL_DEVICE const bf16* a_of(const LoraSite& site, int slot) {
  return reinterpret_cast<const bf16*>(slab_of(site, slot) + site.a_offset);
}

}  // namespace sgl
