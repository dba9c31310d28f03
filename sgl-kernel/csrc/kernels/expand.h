// y += scale * (B u) for the rows that have an adapter; the kernel of layers whose output nobody of ours reads next.
#pragma once

#include "sgl_kernel/expand.h"

namespace sgl {

template <class Expand>
SGL_DEVICE void lora_expand_add(const ExpandArgs& args) {
  let_next_kernel_start();
  const LoraDelta& delta = args.delta;
  if (block_y() >= num_lora_tiles(delta.batch)) return wait_for_previous_kernel();
  const Tile tile = read_tile(delta.batch, block_y());
  // Blocks along x: the column tiles of slice 0, then those of slice 1, ...
  int slice = 0, index = block_x(), out_start = 0;
  for (; slice < delta.site.num_slices - 1; ++slice) {
    const int tiles = (delta.site.out_features[slice] + Expand::kColumns - 1) / Expand::kColumns;
    if (index < tiles) break;
    index -= tiles;
    out_start += delta.site.out_features[slice];
  }
  const Slice module = read_slice(delta.site, tile.slot, slice);
  if (module.rank == 0) return wait_for_previous_kernel();
  const int first = index * Expand::kColumns, left = delta.site.out_features[slice] - first;
  const int columns = left < Expand::kColumns ? left : Expand::kColumns;
  const bf16* b = b_of(delta.site, tile.slot, slice);
  uint8_t* const operands = shared_memory();
  float* const sums = reinterpret_cast<float*>(operands + Expand::kOperandBytes);

  Expand::prefetch(operands, b, module.rank, first, columns);
  wait_for_previous_kernel();
  Expand::compute(operands, sums, b, module.rank, module.scale, first, columns, [&](int t) -> const bf16* {
    return t < tile.count ? u_of(delta, delta.batch.perm[tile.start + t], tile.slot, slice) : nullptr;
  });
  const int vectors = columns / 8;
  for (int i = thread_id(); i < tile.count * vectors; i += Expand::kThreads) {
    const int t = i / vectors, column = i % vectors * 8;
    bf16* y = args.y + delta.batch.perm[tile.start + t] * args.y_stride + out_start + first + column;
    store_vec(y, add_delta(load_vec(y), sums + t * Expand::kDeltaStride + column));
  }
}

}  // namespace sgl
