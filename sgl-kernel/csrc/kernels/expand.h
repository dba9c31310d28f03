// y += scale * (B u) for the rows that have an adapter; the kernel of layers whose output nobody of ours reads next.
#pragma once

#include "rows.h"

namespace sgl {

constexpr int kExpandWarps = expand_warps(kWarp);

// Grid: x = the strips of slice 0, then those of slice 1, ..., each slice's rounded up to whole blocks; y = tiles.
template <int kSteps>
SGL_DEVICE void lora_expand_add(const ExpandArgs& args) {
  using Strip = sgl::Strip<16>;
  let_next_kernel_start();
  const LoraSite& site = args.delta.site;
  const Rows rows = rows_of_tile(args.delta.batch, block_y());
  if (rows.count == 0 || rows.slot < 0) return wait_for_previous_kernel();
  int slice = 0, index = block_x(), out_start = 0, width = site.out_features[0];
  SGL_UNROLL
  for (int i = 1; i < kMaxSlices; ++i) {
    const int blocks = (width + kExpandWarps * Strip::kColumns - 1) / (kExpandWarps * Strip::kColumns);
    if (i >= site.num_slices || slice != i - 1 || index < blocks) continue;
    index -= blocks;
    out_start += width;
    width = site.out_features[i];
    slice = i;
  }
  const int first = (index * kExpandWarps + warp_id()) * Strip::kColumns, left = width - first;
  const Module module = module_of(args.delta, rows.slot, rows.rank, slice);
  if (left <= 0 || module.rank == 0) return wait_for_previous_kernel();
  BStrip<Strip, kSteps> b;
  b.fetch(module, first, left);
  wait_for_previous_kernel();
  SGL_NO_UNROLL
  for (int begin = 0; begin < rows.count; begin += Strip::kTokens) {
    const StripRows<Strip> strip(rows, begin);
    auto mine = [&](int i) { return strip.mine[i] && Strip::column() < left; };
    Vec8 y[Strip::kRows];
    bf16* place[Strip::kRows];
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) {
      place[i] = args.y + strip.row[i] * args.y_stride + out_start + first + Strip::column();
      y[i] = mine(i) ? load_vec(place[i]) : Vec8{};
    }
    UStrip<Strip, kSteps> u;
    u.fetch(module, strip.row);
    const Strip term = multiply(module, b, u);
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) {
      Float8 sum = unpack(y[i]);
      add_term(sum, module, term, i);
      if (mine(i)) store_vec(place[i], pack(sum));
    }
  }
}

}  // namespace sgl
