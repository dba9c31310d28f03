// Reading slabs and batches: what every kernel that touches adapters shares.
#pragma once

#include "args.h"
#include "vendor.h"

namespace sgl {

struct Tile {  // token rows of one slot: perm[start ... start + count)
  int start, count, slot;
};

SGL_DEVICE Tile read_tile(const LoraBatch& batch, int index) {
  const int32_t* t = batch.tiles + 4 * index;
  return {t[0], t[1], t[2]};
}
SGL_DEVICE int num_lora_tiles(const LoraBatch& batch) { return batch.header[0]; }
SGL_DEVICE int num_tiles(const LoraBatch& batch) { return batch.header[1]; }
SGL_DEVICE int num_live_slots(const LoraBatch& batch) { return batch.header[3]; }

struct Slice {  // one module of an adapter
  int rank;
  float scale;
};

SGL_DEVICE const uint8_t* slab_of(const LoraSite& site, int slot) { return site.slabs + slot * site.slab_bytes; }

SGL_DEVICE Slice read_slice(const LoraSite& site, int slot, int slice) {
  const uint8_t* entry = slab_of(site, slot) + site.table_offset + 8 * slice;
  return {*reinterpret_cast<const int32_t*>(entry), *reinterpret_cast<const float*>(entry + 4)};
}
SGL_DEVICE const bf16* a_of(const LoraSite& site, int slot, int slice) {
  const int64_t skipped = static_cast<int64_t>(slice) * site.rank_cap * site.in_features;
  return reinterpret_cast<const bf16*>(slab_of(site, slot) + site.a_offset) + skipped;
}
SGL_DEVICE const bf16* b_of(const LoraSite& site, int slot, int slice) {
  return reinterpret_cast<const bf16*>(slab_of(site, slot) + site.b_offsets[slice]);
}
SGL_DEVICE int b_stride(int rank) { return (rank + 7) / 8 * 8; }

// The rows of A of all slices of a slot, one slice after another, without the gaps between them.
struct ARows {
  int rank[kMaxSlices];

  SGL_DEVICE ARows of(const LoraSite& site, int slot) {
    ARows rows;
    SGL_UNROLL
    for (int i = 0; i < kMaxSlices; ++i) rows.rank[i] = i < site.num_slices ? read_slice(site, slot, i).rank : 0;
    return rows;
  }
};
SGL_DEVICE int count(const ARows& rows) { return rows.rank[0] + rows.rank[1] + rows.rank[2]; }

struct ARow {
  int slice, row;
};
SGL_DEVICE ARow locate(const ARows& rows, int index) {
  if (index < rows.rank[0]) return {0, index};
  index -= rows.rank[0];
  if (index < rows.rank[1]) return {1, index};
  return {2, index - rows.rank[1]};
}

}  // namespace sgl
