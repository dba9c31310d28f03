// y = x W^T for a few token rows, with every live adapter's u = x A^T in the same launch.
//
// A decode step reads each weight once and computes next to nothing, so this kernel is a way to keep enough of W in flight:
// small blocks, several to a multiprocessor, and K split over a cluster so that even a narrow matrix fills the device.
// A rows are more clusters of the same kind; the batch says how many of them have something to do.
#pragma once

#include "sgl_kernel/lora.h"
#include "sgl_kernel/tile_gemm.h"

namespace sgl {

// u of the rows [first, first + kRows) of a slot's A; `token_row(t)` is the row of x and u, negative for no token.
template <class Gemm, class TokenRow>
SGL_DEVICE void shrink_tile(const LoraSite& site, int slot, int first, const bf16* x, int64_t x_stride, bf16* u,
                            int64_t u_stride, int tokens, TokenRow token_row) {
  const ARows a = ARows::of(site, slot);
  const int rows = count(a) - first;
  if (rows <= 0) return;  // the same for every block of the cluster
  const Range k = part_of(site.in_features, cluster_rank(), cluster_size());
  Gemm gemm;
  gemm.run(
      [&](int r) -> const bf16* {
        if (r >= rows) return nullptr;
        const ARow place = locate(a, first + r);
        return a_of(site, slot, place.slice) + static_cast<int64_t>(place.row) * site.in_features;
      },
      [&](int t) -> const bf16* {
        const int row = t < tokens ? token_row(t) : -1;
        return row < 0 ? nullptr : x + row * x_stride;
      },
      rows, k.begin, k.end);
  gemm.reduce(rows, tokens, [&](int r, int t, const Float4& sum) {
    const int row = token_row(t);
    if (row < 0) return;
    for (int j = 0; j < 4 && r + j < rows; ++j) {
      const ARow place = locate(a, first + r + j);
      u[row * u_stride + place.slice * site.rank_cap + place.row] = to_bf16(sum.v[j]);
    }
  });
}

template <class Gemm>
SGL_DEVICE void skinny_gemm(const GemmArgs& args) {
  let_next_kernel_start();
  const int cluster = block_x() / args.num_splits;
  if (cluster < args.base_tiles) {
    const int first = cluster * Gemm::kRows;
    const int left = args.out_features - first, rows = left < Gemm::kRows ? left : Gemm::kRows;
    const Range k = part_of(args.in_features, cluster_rank(), cluster_size());
    Gemm gemm;
    gemm.run([&](int r) { return r < rows ? args.weight + (first + r) * args.weight_stride : nullptr; },
             [&](int t) { return t < args.tokens ? args.x + t * args.x_stride : nullptr; }, rows, k.begin, k.end);
    gemm.reduce(rows, args.tokens, [&](int r, int t, const Float4& sum) {
      uint32_t* y = reinterpret_cast<uint32_t*>(args.y + t * args.y_stride + first + r);
      y[0] = pack_bf16(sum.v[0], sum.v[1]);
      y[1] = pack_bf16(sum.v[2], sum.v[3]);
    });
    return;
  }
  const int workers = grid_x() / args.num_splits - args.base_tiles;
  const int tiles = (args.site.num_slices * args.site.rank_cap + Gemm::kRows - 1) / Gemm::kRows;
  const int units = num_live_slots(args.batch) * tiles;
  for (int unit = cluster - args.base_tiles; unit < units; unit += workers) {
    const int slot = args.batch.live[unit / tiles];
    shrink_tile<Gemm>(args.site, slot, unit % tiles * Gemm::kRows, args.x, args.x_stride, args.u, args.u_stride, args.tokens,
                      [&](int t) { return args.batch.token_slot[t] == slot ? t : -1; });
  }
}

template <class Gemm>
SGL_DEVICE void lora_shrink(const ShrinkArgs& args) {
  let_next_kernel_start();
  if (block_y() >= num_lora_tiles(args.batch)) return;
  const Tile tile = read_tile(args.batch, block_y());
  const int first = block_x() / args.num_splits * Gemm::kRows;
  shrink_tile<Gemm>(args.site, tile.slot, first, args.x, args.x_stride, args.u, args.u_stride, tile.count,
                    [&](int t) { return args.batch.perm[tile.start + t]; });
}

}  // namespace sgl
