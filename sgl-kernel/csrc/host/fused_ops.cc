// Launches of the kernels between the products: norm, activation, rotation.
#include <tvm/ffi/function.h>

#include "sgl_kernel/geometry.h"
#include "unpack.h"

namespace sgl::host {
namespace {

// A low-rank term as Python passes it: absent, or u, slabs and the words of the batch.
struct Term {
  LoraDelta delta{};
  int tile = 0;   // token rows of a tile of the batch
  int tiles = 0;  // at most
  bool present = false;

  Term() = default;
  Term(const ffi::Optional<TensorView>& u, int64_t u_slot_stride, const ffi::Optional<TensorView>& slabs, const Shape& site,
       const ffi::Optional<TensorView>& words, const Shape& shape, int tokens) {
    if (!u.has_value()) return;
    check_matrix(u.value(), "u");
    delta = unpack_delta(u.value(), u_slot_stride, slabs.value(), site, words.value(), shape);
    const BatchShape capacity(shape);
    tile = capacity.tile_tokens;
    tiles = capacity.tiles(tokens);
    present = true;
  }
};

// Without a batch, from this many rows on the kernels for prompts are faster.
constexpr int kManyTokens = 256;

int tile_of(const Term& term, int tokens) { return term.present ? term.tile : tokens < kManyTokens ? 16 : 64; }

void launch_norm(NormArgs& args, const Term& term, const Place& place, bool overlap) {
  const int tile = tile_of(term, args.tokens), warp = driver::kWarp;
  int cluster = 1, pieces = 1, rows = args.tokens;
  if (term.present) {
    cluster = smaller(norm_cluster(tile, args.hidden), driver::device(place.device_id).max_cluster);
    args.block_tokens = norm_tokens(tile);
    pieces = tile / args.block_tokens;
    rows = term.tiles;
  } else {
    args.block_tokens = tile == 16 ? 1 : 4;
    rows = ceil_div(args.tokens, args.block_tokens);
  }
  args.staged = norm_staged(warp, tile, args.hidden, cluster, term.present);
  args.held = norm_held(warp, tile, args.hidden, cluster, args.block_tokens, term.present);
  const int shared = norm_shared_bytes(warp, tile, args.hidden, cluster, args.block_tokens, term.present);
  const driver::Grid grid{cluster * pieces, rows, norm_threads(warp, tile), shared, cluster, overlap};
  const char* name = tile == 16 ? "fused_add_rmsnorm_16" : "fused_add_rmsnorm_64";
  driver::launch(name, place.device_id, place.stream, grid, &args, sizeof(args));
}

void rmsnorm(TensorView x, TensorView weight, double eps, TensorView out, bool overlap) {
  check_matrix(x, "x");
  check_matrix(out, "out");
  if (x.size(0) == 0) return;
  NormArgs args{};
  args.x = data<uint16_t>(x);
  args.out = data<uint16_t>(out);
  args.weight = data<const uint16_t>(weight);
  args.x_stride = x.stride(0);
  args.out_stride = out.stride(0);
  args.tokens = static_cast<int32_t>(x.size(0));
  args.hidden = static_cast<int32_t>(x.size(1));
  args.eps = static_cast<float>(eps);
  launch_norm(args, Term(), Place(x), overlap);
}

void fused_add_rmsnorm(TensorView x, TensorView residual, TensorView weight, double eps, ffi::Optional<TensorView> u,
                       int64_t u_slot_stride, ffi::Optional<TensorView> slabs, Shape site, ffi::Optional<TensorView> words,
                       Shape shape, bool overlap) {
  check_matrix(x, "x");
  check_matrix(residual, "residual");
  if (x.size(0) == 0) return;
  NormArgs args{};
  args.x = data<uint16_t>(x);
  args.residual = data<uint16_t>(residual);
  args.weight = data<const uint16_t>(weight);
  args.x_stride = x.stride(0);
  args.residual_stride = residual.stride(0);
  args.tokens = static_cast<int32_t>(x.size(0));
  args.hidden = static_cast<int32_t>(x.size(1));
  args.eps = static_cast<float>(eps);
  const Term term(u, u_slot_stride, slabs, site, words, shape, args.tokens);
  args.delta = term.delta;
  launch_norm(args, term, Place(x), overlap);
}

// Tiles along y and pieces of them along x for a kernel that takes `each` rows a block.
struct Split {
  int pieces, rows;

  Split(const Term& term, int tokens, int each)
      : pieces(term.present ? larger(1, term.tile / each) : 1), rows(term.present ? term.tiles : ceil_div(tokens, each)) {}
};

void silu_and_mul(TensorView x, TensorView out, ffi::Optional<TensorView> u, int64_t u_slot_stride,
                  ffi::Optional<TensorView> slabs, Shape site, ffi::Optional<TensorView> words, Shape shape, bool overlap) {
  check_matrix(x, "x");
  check_matrix(out, "out");
  if (x.size(0) == 0) return;
  const Place place(x);
  ActivationArgs args{};
  args.x = data<const uint16_t>(x);
  args.out = data<uint16_t>(out);
  args.x_stride = x.stride(0);
  args.out_stride = out.stride(0);
  args.tokens = static_cast<int32_t>(x.size(0));
  args.inner = static_cast<int32_t>(out.size(1));
  const Term term(u, u_slot_stride, slabs, site, words, shape, args.tokens);
  args.delta = term.delta;
  const int tile = tile_of(term, args.tokens);
  const Split split(term, args.tokens, activation_tokens(driver::kWarp, tile));
  const driver::Grid grid{ceil_div(args.inner, kActivationColumns) * split.pieces,
                          split.rows,
                          activation_threads(driver::kWarp),
                          activation_shared_bytes(driver::kWarp, tile, term.present),
                          1,
                          overlap};
  driver::launch(tile == 16 ? "silu_and_mul_16" : "silu_and_mul_64", place.device_id, place.stream, grid, &args, sizeof(args));
}

const char* rope_kernel(int head_dim, int tile) {
  switch (head_dim) {
    case 64:
      return tile == 16 ? "qk_norm_rope_64x16" : "qk_norm_rope_64x64";
    case 128:
      return tile == 16 ? "qk_norm_rope_128x16" : "qk_norm_rope_128x64";
    case 256:
      return tile == 16 ? "qk_norm_rope_256x16" : "qk_norm_rope_256x64";
    default:
      TVM_FFI_THROW(ValueError) << "no kernel for heads of " << head_dim << " columns: 64, 128 or 256";
  }
}

void qk_norm_rope(TensorView qkv, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                  ffi::Optional<TensorView> q_weight, ffi::Optional<TensorView> k_weight, double eps, TensorView cos_sin,
                  TensorView positions, ffi::Optional<TensorView> bias, ffi::Optional<TensorView> k_pool,
                  ffi::Optional<TensorView> v_pool, ffi::Optional<TensorView> locs, ffi::Optional<TensorView> u,
                  int64_t u_slot_stride, ffi::Optional<TensorView> slabs, Shape site, ffi::Optional<TensorView> words,
                  Shape shape, bool overlap) {
  check_matrix(qkv, "qkv");
  if (qkv.size(0) == 0) return;
  const Place place(qkv);
  RopeArgs args{};
  args.qkv = data<uint16_t>(qkv);
  args.bias = data<const uint16_t>(bias);
  args.q_weight = data<const uint16_t>(q_weight);
  args.k_weight = data<const uint16_t>(k_weight);
  args.cos_sin = data<const float>(cos_sin);
  args.positions = data<const int64_t>(positions);
  args.k_pool = data<uint16_t>(k_pool);
  args.v_pool = data<uint16_t>(v_pool);
  args.locs = data<const int64_t>(locs);
  args.qkv_stride = qkv.stride(0);
  args.tokens = static_cast<int32_t>(qkv.size(0));
  args.num_heads = static_cast<int32_t>(num_heads);
  args.num_kv_heads = static_cast<int32_t>(num_kv_heads);
  args.eps = static_cast<float>(eps);
  const Term term(u, u_slot_stride, slabs, site, words, shape, args.tokens);
  args.delta = term.delta;
  const int tile = tile_of(term, args.tokens), dim = static_cast<int>(head_dim);
  args.block_heads = tile == 16 ? 1 : 4;  // with many tokens, angles are fetched once for several heads
  const Split split(term, args.tokens, rope_tokens(driver::kWarp, dim, tile));
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  const driver::Grid grid{ceil_div(heads, args.block_heads) * split.pieces,
                          split.rows,
                          rope_threads(driver::kWarp, dim),
                          rope_shared_bytes(driver::kWarp, dim, tile, term.present),
                          1,
                          overlap};
  driver::launch(rope_kernel(dim, tile), place.device_id, place.stream, grid, &args, sizeof(args));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rmsnorm, rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_add_rmsnorm, fused_add_rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, silu_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope, qk_norm_rope);

}  // namespace sgl::host
