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

  // Of a kernel for no term, and those for tiles of 16 and 64 rows and ranks up to 16 and 64 in registers.
  const char* choose(const char* none, const char* few, const char* few_64, const char* many, const char* many_64) const {
    if (!present) return none;
    const bool high = delta.site.rank_cap > 16;
    return tile == 16 ? (high ? few_64 : few) : (high ? many_64 : many);
  }
  // Rows that a block takes, and blocks that a tile then needs.
  int rows() const { return tile == 16 ? strip_tokens(driver::kWarp, tile) : tile; }
  int pieces() const { return tile / rows(); }
  int piece_bits() const { return pieces() == 1 ? 0 : 1; }
};

// Without a batch, from this many rows on kernels take as many at once as for prompts. With fewer, 256 say, blocks would be too
// few to keep every multiprocessor busy.
constexpr int kManyTokens = 1024;

// Whether there is time for a rehearsal (after_previous_kernel): behind products of ours, which let the next kernel start early.
bool rehearse(int tokens, bool overlap, const Place& place) {
  const driver::Device& device = driver::device(place.device_id);
  return overlap && device.max_cluster > 1 && tokens <= (device.warpgroups ? 64 : 16);
}

int tile_of(const Term& term, int tokens) { return term.present ? term.tile : tokens < kManyTokens ? 16 : 64; }

void launch_norm(NormArgs& args, const Term& term, const Place& place, bool overlap) {
  const int tile = tile_of(term, args.tokens), warp = driver::kWarp;
  int cluster = 1, pieces = 1, rows = 0, strip = 0;
  if (term.present) {
    cluster = smaller(norm_cluster(tile, args.hidden), driver::device(place.device_id).max_cluster);
    args.block_tokens = strip = strip_tokens(warp, tile);
    pieces = tile / args.block_tokens;
    rows = term.tiles;
  } else {
    args.block_tokens = tile == 16 ? 1 : 4;
    rows = ceil_div(args.tokens, args.block_tokens);
  }
  args.rehearse = rehearse(args.tokens, overlap, place);
  args.mean = 1.f / static_cast<float>(args.hidden);
  args.parts = norm_block_parts(args.hidden, cluster);
  args.turns = norm_turns(warp, args.hidden, cluster, args.block_tokens, strip);
  args.staged = norm_staged(args.hidden, cluster);
  args.held = norm_held(warp, args.hidden, cluster, args.block_tokens, strip);
  const int shared = norm_shared_bytes(warp, args.hidden, cluster, args.block_tokens, strip);
  const driver::Grid grid{cluster * pieces, rows, norm_threads(warp, strip), shared, cluster, overlap};
  const char* name = term.choose("fused_add_rmsnorm", "fused_add_rmsnorm_16x16", "fused_add_rmsnorm_16x64",
                                 "fused_add_rmsnorm_64x16", "fused_add_rmsnorm_64x64");
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
  args.rehearse = rehearse(args.tokens, overlap, place);
  const Term term(u, u_slot_stride, slabs, site, words, shape, args.tokens);
  args.delta = term.delta;
  const int warp = driver::kWarp, rows = term.present ? term.tiles * term.pieces() : ceil_div(args.tokens, kActivationRows);
  if (term.present) args.block_tokens = term.rows(), args.piece_bits = term.piece_bits();
  const int shared = term.present && term.tile == kWalkTokens ? walk_shared_bytes(warp, activation_threads(warp), 2) : 0;
  const driver::Grid grid{activation_blocks(warp, args.inner, term.present), rows, activation_threads(warp), shared, 1, overlap};
  const char* name = term.choose("silu_and_mul", "silu_and_mul_16x16", "silu_and_mul_16x64", "silu_and_mul_64x16", "silu_and_mul_64x64");
  driver::launch(name, place.device_id, place.stream, grid, &args, sizeof(args));
}

const char* rope_kernel(int head_dim, const Term& term) {
#define SGL_ROPE(dim)                                                                                \
  case dim:                                                                                          \
    return term.choose("qk_norm_rope_" #dim, "qk_norm_rope_" #dim "x16x16", "qk_norm_rope_" #dim "x16x64", \
                       "qk_norm_rope_" #dim "x64x16", "qk_norm_rope_" #dim "x64x64");
  switch (head_dim) {
    SGL_ROPE(64)
    SGL_ROPE(128)
    SGL_ROPE(256)
    default:
      TVM_FFI_THROW(ValueError) << "no kernel for heads of " << head_dim << " columns: 64, 128 or 256";
  }
#undef SGL_ROPE
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
  args.rehearse = rehearse(args.tokens, overlap, place);
  args.eps = static_cast<float>(eps);
  const Term term(u, u_slot_stride, slabs, site, words, shape, args.tokens);
  args.delta = term.delta;
  const int tile = tile_of(term, args.tokens), warp = driver::kWarp, dim = static_cast<int>(head_dim);
  const char* kernel = rope_kernel(dim, term);
  args.block_heads = rope_block_heads(dim, tile, term.present);
  const int heads = args.num_heads + 2 * args.num_kv_heads;
  if (term.present) args.block_tokens = term.rows(), args.piece_bits = term.piece_bits();
  const driver::Grid grid{ceil_div(heads, args.block_heads),
                          term.present ? term.tiles * term.pieces() : ceil_div(args.tokens, kRopeRows),
                          rope_threads(warp, dim, args.block_heads, term.present),
                          rope_shared_bytes(warp, dim, args.block_heads, tile, term.present),
                          1,
                          overlap};
  driver::launch(kernel, place.device_id, place.stream, grid, &args, sizeof(args));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rmsnorm, rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fused_add_rmsnorm, fused_add_rmsnorm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_and_mul, silu_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope, qk_norm_rope);

}  // namespace sgl::host
