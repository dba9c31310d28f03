// Launches of the products: the decode product, shrink and expand.
#include <tvm/ffi/function.h>

#include "sgl_kernel/geometry.h"
#include "unpack.h"

namespace sgl::host {
namespace {

// Into how many parts a product's sum over K is cut where its `tiles` leave multiprocessors idle. It depends on the matrix, the
// device and the kernel: rows beside a row change its bits only where their number chooses another kernel.
int choose_splits(const driver::Device& device, int tiles, int in_features, int least) {
  int splits = 1;
  while (splits < device.max_cluster && 10 * tiles * splits < 9 * device.multiprocessors && in_features / (2 * splits) >= least)
    splits *= 2;
  return splits;
}

struct Tiling {
  const char* name;
  int rows, threads, shared_bytes;
};

Tiling gemm_tiling(int tokens) {
  const int warp = driver::kWarp;
  if (tokens <= 8) return {"skinny_gemm_8", kStreamRows, kStreamThreads, stream_shared_bytes(warp, 8)};
  if (tokens <= 16) return {"skinny_gemm_16", kStreamRows, kStreamThreads, stream_shared_bytes(warp, 16)};
  if (tokens <= 32) return {"skinny_gemm_32x64", 64, gemm_threads(warp, 64), gemm_shared_bytes(warp, 64, 32)};
  return {"skinny_gemm_64x64", 64, gemm_threads(warp, 64), gemm_shared_bytes(warp, 64, 64)};
}

// y = x W^T by warpgroups.
void group_gemm(const TensorView& x, const TensorView& weight, const TensorView& y, int64_t splits, bool overlap) {
  const Place place(x);
  const int device_id = place.device_id;
  GroupGemmArgs args{};
  args.tokens = static_cast<int32_t>(x.size(0));
  args.in_features = static_cast<int32_t>(x.size(1));
  args.out_features = static_cast<int32_t>(weight.size(0));
  const int choice = group_choice(driver::device(device_id).multiprocessors, args.out_features, args.in_features);
  const int rows = choice / 16;
  args.num_splits = splits > 0 ? smaller(static_cast<int>(splits), kGroupSplits) : choice % 16;
  args.part_columns = ceil_div(ceil_div(args.in_features, 64), args.num_splits) * 64;
  args.share_tokens = ceil_div(args.tokens, args.num_splits);
  driver::make_tensor_map(args.x, device_id, x.data_ptr(), args.tokens, args.in_features, x.stride(0), kGroupTokens);
  driver::make_tensor_map(args.weight, device_id, weight.data_ptr(), args.out_features, args.in_features, weight.stride(0), rows);
  args.y = data<uint16_t>(y);
  args.y_stride = y.stride(0);
  const char* name = rows == 128 ? "skinny_gemm_group_128" : rows == 96 ? "skinny_gemm_group_96" : "skinny_gemm_group_64";
  const int blocks = ceil_div(args.out_features, rows) * args.num_splits;
  const driver::Grid grid{blocks, 1, kGroupThreads, group_shared_bytes(rows), args.num_splits, overlap};
  driver::launch(name, device_id, place.stream, grid, &args, sizeof(args));
}

// y = x W^T; with a site also u = x A^T of the rows of every live slot, by `workers` more clusters.
void skinny_gemm(TensorView x, TensorView weight, TensorView y, ffi::Optional<TensorView> slabs, Shape site,
                 ffi::Optional<TensorView> words, Shape shape, ffi::Optional<TensorView> u, int64_t splits, bool overlap) {
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  check_matrix(y, "out");
  const int tokens = static_cast<int>(x.size(0));
  if (tokens == 0) return;
  if (tokens > 64) TVM_FFI_THROW(ValueError) << "skinny_gemm takes 1 to 64 rows, got " << tokens;
  const Place place(x);
  const driver::Device& device = driver::device(place.device_id);
  // The copy engine is not documented to take rows that overlap, as those of an expanded tensor do.
  const bool apart = x.stride(0) >= x.size(1) && weight.stride(0) >= weight.size(1);
  if (tokens > 16 && device.warpgroups && apart && !slabs.has_value()) return group_gemm(x, weight, y, splits, overlap);
  GemmArgs args{};
  args.x = data<const uint16_t>(x);
  args.weight = data<const uint16_t>(weight);
  args.y = data<uint16_t>(y);
  args.x_stride = x.stride(0);
  args.weight_stride = weight.stride(0);
  args.y_stride = y.stride(0);
  args.tokens = tokens;
  args.in_features = static_cast<int32_t>(x.size(1));
  args.out_features = static_cast<int32_t>(weight.size(0));
  const Tiling tiling = gemm_tiling(tokens);
  args.base_tiles = ceil_div(args.out_features, tiling.rows);
  args.num_splits = splits > 0 ? static_cast<int>(splits) : choose_splits(device, args.base_tiles, args.in_features, 256);
  if (slabs.has_value()) {
    check_matrix(u.value(), "u");
    args.site = unpack_site(slabs.value(), site);
    args.batch = unpack_batch(words.value(), shape);
    args.u = data<uint16_t>(u);
    args.u_stride = u.value().stride(0);
    const BatchShape capacity(shape);
    args.max_live = smaller(capacity.num_slots, tokens);
    args.a_units = args.max_live * ceil_div(args.site.num_slices * args.site.rank_cap, tiling.rows);
  }
  const int units = args.a_units;
  const int room = larger(1, 2 * device.multiprocessors / args.num_splits);  // two blocks fit a multiprocessor
  const bool stream = tiling.rows == kStreamRows;
  const int clusters = stream ? smaller(args.base_tiles + units, room) : args.base_tiles + smaller(units, room);
  const driver::Grid grid{clusters * args.num_splits, 1, tiling.threads, tiling.shared_bytes, args.num_splits, overlap};
  driver::launch(tiling.name, place.device_id, place.stream, grid, &args, sizeof(args));
}

void lora_shrink(TensorView x, TensorView slabs, Shape site, TensorView words, Shape shape, TensorView u,
                 bool overlap) {
  check_matrix(x, "x");
  check_matrix(u, "u");
  if (x.size(0) == 0) return;
  const Place place(x);
  ShrinkArgs args{};
  args.x = data<const uint16_t>(x);
  args.u = data<uint16_t>(u);
  args.x_stride = x.stride(0);
  args.u_stride = u.stride(0);
  args.site = unpack_site(slabs, site);
  args.batch = unpack_batch(words, shape);
  const BatchShape capacity(shape);
  const bool stream = capacity.tile_tokens == 16;
  const int rows = stream ? kStreamRows : 64, tiles = capacity.tiles(static_cast<int>(x.size(0)));
  const int row_tiles = ceil_div(args.site.num_slices * args.site.rank_cap, rows);
  const driver::Grid grid{row_tiles,
                          tiles,
                          stream ? kStreamThreads : gemm_threads(driver::kWarp, rows),
                          stream ? stream_shared_bytes(driver::kWarp, 16) : gemm_shared_bytes(driver::kWarp, rows, 64),
                          1,
                          overlap};
  driver::launch(stream ? "lora_shrink_16" : "lora_shrink_64x64", place.device_id, place.stream, grid, &args, sizeof(args));
}

void lora_expand_add(TensorView y, TensorView u, int64_t u_slot_stride, TensorView slabs, Shape site, TensorView words,
                     Shape shape, bool overlap) {
  check_matrix(y, "y");
  check_matrix(u, "u");
  if (y.size(0) == 0) return;
  const Place place(y);
  const BatchShape capacity(shape);
  ExpandArgs args{};
  args.y = data<uint16_t>(y);
  args.y_stride = y.stride(0);
  args.delta = unpack_delta(u, u_slot_stride, slabs, site, words, shape);
  const int warp = driver::kWarp;
  int blocks = 0;
  for (int i = 0; i < args.delta.site.num_slices; ++i) blocks += expand_blocks(warp, args.delta.site.out_features[i]);
  const driver::Grid grid{blocks, capacity.tiles(static_cast<int>(y.size(0))), expand_threads(warp), 0, 1, overlap};
  driver::launch(args.delta.site.rank_cap <= 16 ? "lora_expand_add_16" : "lora_expand_add_64", place.device_id, place.stream,
                 grid, &args, sizeof(args));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(skinny_gemm, skinny_gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lora_shrink, lora_shrink);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lora_expand_add, lora_expand_add);

}  // namespace sgl::host
