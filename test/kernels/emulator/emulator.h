// vendor.h for the CPU: the same names with the same meaning, one fiber for every GPU thread (see runtime.h).
//
// Everything that touches memory here is instrumented by the compiler like the kernels themselves, so that the runtime
// sees each access. What a vendor does in one instruction is one call of the runtime, with the operands as the
// instruction takes them: machine.h has instructions, this file knows which ones vendor.h uses.
#pragma once

#include "machine.h"
#include "sgl_kernel/tensor_map.h"

#if defined(SGL_EMULATE_CUDA)
#define SGL_CUDA 1
#elif defined(SGL_EMULATE_HIP)
#define SGL_HIP 1
#else
#error "define SGL_EMULATE_CUDA or SGL_EMULATE_HIP"
#endif

#define __device__
#define __host__
#define __forceinline__ inline
#define SGL_DEVICE static inline
#define SGL_UNROLL
#define SGL_NO_UNROLL

#define SGL_KERNEL(threads) extern "C" __attribute__((visibility("default"))) void
#define SGL_KERNEL_OF(threads, blocks) SGL_KERNEL(threads)
#define SGL_ARGS(type) const type&

namespace sgl {

// ---- who am I ------------------------------------------------------------------------------------------------------

#if SGL_CUDA
constexpr int kWarp = 32;
#else
constexpr int kWarp = 64;
#endif
SGL_DEVICE int thread_id() { return emu::thread_id(); }
SGL_DEVICE int block_x() { return emu::block_x(); }
SGL_DEVICE int block_y() { return emu::block_y(); }
SGL_DEVICE int grid_x() { return emu::grid_x(); }
SGL_DEVICE void barrier(emu::Place place = emu::here()) { emu::barrier(place); }
constexpr bool kStartsEarly = false;
SGL_DEVICE int lane_id() { return thread_id() % kWarp; }
SGL_DEVICE int warp_id() { return thread_id() / kWarp; }

// ---- numbers -------------------------------------------------------------------------------------------------------

using bf16 = uint16_t;  // the bits of a bfloat16

struct alignas(16) Vec8 {  // eight bf16, the widest access of a thread
  uint32_t w[4];
};
struct alignas(8) Vec4 {  // four bf16
  uint32_t w[2];
};
struct alignas(8) Float2 {
  float v[2];
};
struct alignas(16) Float4 {
  float v[4];
};

SGL_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
SGL_DEVICE float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }
SGL_DEVICE float low_float(uint32_t pair) { return bits_to_float(pair << 16); }
SGL_DEVICE float high_float(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

SGL_DEVICE bf16 to_bf16(float value) {  // to nearest even
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<bf16>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
SGL_DEVICE uint32_t pack_bf16(float low, float high) {
  return static_cast<uint32_t>(to_bf16(low)) | static_cast<uint32_t>(to_bf16(high)) << 16;
}
SGL_DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SGL_DEVICE int64_t multiply_wide(int a, int b) { return static_cast<int64_t>(a) * b; }
SGL_DEVICE float reciprocal_approx(float x) { return 1.f / x; }
SGL_DEVICE float rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
SGL_DEVICE float exp_approx(float x) { return __builtin_expf(x); }

// ---- memory --------------------------------------------------------------------------------------------------------

SGL_DEVICE Vec8 load_vec(const void* p) {
  emu::check_vector(p);
  return *static_cast<const Vec8*>(p);
}
SGL_DEVICE Vec4 load_vec4(const void* p) { return *static_cast<const Vec4*>(p); }
SGL_DEVICE void store_vec(void* p, const Vec8& v) {
  emu::check_vector(p);
  *static_cast<Vec8*>(p) = v;
}
SGL_DEVICE void prefetch_l2(const void*) {}
SGL_DEVICE uint8_t* shared_memory() { return emu::shared_memory(); }
SGL_DEVICE uint8_t* align_shared(uint8_t* p, int bytes) { return p + (-emu::shared_address(p) & (bytes - 1)); }

SGL_DEVICE void async_copy16(void* shared, const void* global, int bytes) {
  emu::check_copy(shared, global, bytes, 16);
#if SGL_CUDA
  emu::copy_async(shared, global, bytes, 16);
#else
  Vec8 v = {};
  if (bytes > 0) v = load_vec(global);  // all sixteen bytes, as vendor.h does it
  for (int i = bytes / 2; i < 8; ++i) v.w[i / 2] &= i % 2 ? 0xffffu : 0u;
  store_vec(shared, v);
#endif
}
SGL_DEVICE void async_copy8(void* shared, const void* global) {
  emu::check_copy(shared, global, 8, 8);
#if SGL_CUDA
  emu::copy_async(shared, global, 8, 8);
#else
  *static_cast<Vec4*>(shared) = load_vec4(global);
#endif
}
SGL_DEVICE void async_commit() {
#if SGL_CUDA
  emu::commit_copies();
#endif
}
template <int kPending>
SGL_DEVICE void async_wait() {
#if SGL_CUDA
  emu::wait_for_copies(kPending);
#endif
}

// ---- a warp --------------------------------------------------------------------------------------------------------

SGL_DEVICE void warp_barrier(emu::Place place = emu::here()) { emu::warp_barrier(place); }
SGL_DEVICE int shuffle(int value, int lane, emu::Place place = emu::here()) {
  return __builtin_bit_cast(int, emu::shuffle(__builtin_bit_cast(float, value), lane, place));
}
SGL_DEVICE float shuffle_xor(float value, int mask, emu::Place place = emu::here()) {
  return emu::shuffle(value, lane_id() ^ mask, place);
}

struct Fragment {  // of A or B
#if SGL_CUDA
  uint32_t r[4];
#else
  uint32_t r[2];
#endif
};
struct Accumulator {
#if SGL_CUDA
  static constexpr int kSize = 8;
#else
  static constexpr int kSize = 4;
#endif
  float v[kSize];
  // Where element i of this lane lies: a row is one of A, a column one of B.
  SGL_DEVICE int row(int i) {
#if SGL_CUDA
    return lane_id() / 4 + (i & 2) * 4;
#else
    return lane_id() / 16 * 4 + i;
#endif
  }
  SGL_DEVICE int column(int i) {
#if SGL_CUDA
    return (i & 4) * 2 + lane_id() % 4 * 2 + (i & 1);
#else
    return lane_id() % 16;
#endif
  }
};

template <class Chunk>
SGL_DEVICE Fragment load_fragment(Chunk chunk, emu::Place place = emu::here()) {
  Fragment f;
  const int lane = lane_id();
#if SGL_CUDA
  const void* p = chunk(lane % 16, lane / 16);
  emu::ldmatrix_x4(f.r, p, place);
#else
  (void)place;
  const uint32_t* p = reinterpret_cast<const uint32_t*>(chunk(lane % 16, lane / 32)) + lane / 16 % 2 * 2;
  f.r[0] = p[0];
  f.r[1] = p[1];
#endif
  return f;
}

// Columns from kColumns on become NaN: what a vendor leaves in them is nothing to rely on.
template <int kColumns = 16>
SGL_DEVICE void mma(Accumulator& d, const Fragment& a, const Fragment& b, emu::Place place = emu::here()) {
  static_assert(kColumns == 8 || kColumns == 16, "");
#if SGL_CUDA
  for (int half = 0; half < kColumns / 8; ++half) {
    const uint32_t pair[] = {b.r[half], b.r[half + 2]};
    emu::mma_m16n8k16(d.v + 4 * half, a.r, pair, place);
  }
#else
  emu::mfma_f32_16x16x16_bf16(d.v, a.r, b.r, place);
#endif
  for (int i = 0; i < Accumulator::kSize; ++i)
    if (Accumulator::column(i) >= kColumns) d.v[i] = __builtin_nanf("");
}

template <int kTokens_>
struct Strip {
  static constexpr int kColumns = 32;
#if SGL_CUDA
  static constexpr int kTokens = kTokens_, kRows = kTokens / 8, kParts = 4;
#else
  static constexpr int kTokens = 16, kRows = 1, kParts = 2;
#endif
  float v[kRows][8];
#if SGL_CUDA
  SGL_DEVICE int row(int i) { return lane_id() / 4 + 8 * i; }
  SGL_DEVICE int column() { return lane_id() % 4 * 8; }  // the first of eight
  // A lane brings elements k() ... k() + 3 of its rows of U and of the columns part(0), part(1), ... of B.
  SGL_DEVICE int part(int j) { return lane_id() / 8 * 8 + j * 2 + lane_id() / 4 % 2; }
  SGL_DEVICE int k() { return lane_id() % 4 * 4; }
#else
  SGL_DEVICE int row(int) { return lane_id() % 16; }
  SGL_DEVICE int column() { return lane_id() / 16 * 8; }
  SGL_DEVICE int part(int j) { return lane_id() % 16 / 4 * 8 + j * 4 + lane_id() % 4; }
  SGL_DEVICE int k() { return lane_id() / 16 * 4; }
#endif
};
template <int kTokens>
SGL_DEVICE void mma(Strip<kTokens>& d, const Vec4 (&u)[Strip<kTokens>::kRows], const Vec4 (&b)[Strip<kTokens>::kParts],
                    emu::Place place = emu::here()) {
  for (int j = 0; j < Strip<kTokens>::kParts; ++j) {
#if SGL_CUDA
    constexpr int kLast = Strip<kTokens>::kRows - 1;
    const uint32_t rows[] = {u[0].w[0], kLast ? u[kLast].w[0] : 0, u[0].w[1], kLast ? u[kLast].w[1] : 0};
    float c[4] = {};
    for (int i = 0; i < 2 * (kLast + 1); ++i) c[i] = d.v[i / 2][2 * j + i % 2];
    emu::mma_m16n8k16(c, rows, b[j].w, place);
    for (int i = 0; i < 2 * (kLast + 1); ++i) d.v[i / 2][2 * j + i % 2] = c[i];
#else
    emu::mfma_f32_16x16x16_bf16(d.v[0] + 4 * j, b[j].w, u[0].w, place);
#endif
  }
}
SGL_DEVICE float sum_strip_row(float value, emu::Place place = emu::here()) {
  constexpr int kNext = kWarp == 32 ? 1 : 16;
  value += shuffle_xor(value, 2 * kNext, place);
  return value + shuffle_xor(value, kNext, place);
}

// ---- a cluster -----------------------------------------------------------------------------------------------------

SGL_DEVICE int cluster_rank() { return emu::cluster_rank(); }
SGL_DEVICE int cluster_x() { return emu::block_x() / emu::cluster_size(); }
SGL_DEVICE int cluster_size() { return emu::cluster_size(); }
SGL_DEVICE void cluster_barrier(emu::Place place = emu::here()) { emu::cluster_barrier(place); }
// Blocks meet at the second half alone, as late as they may.
SGL_DEVICE void cluster_start() { emu::cluster_start(); }
SGL_DEVICE void cluster_started(emu::Place place = emu::here()) { emu::cluster_started(place); }
template <class T>
SGL_DEVICE T read_cluster(const T* p, int rank) {
  T value;
  emu::read_cluster(&value, p, rank, sizeof(T));
  return value;
}
SGL_DEVICE Float4 cluster_load(const Float4* p, int rank) { return read_cluster(p, rank); }
SGL_DEVICE Float2 cluster_load(const Float2* p, int rank) { return read_cluster(p, rank); }
SGL_DEVICE float cluster_load(const float* p, int rank) { return read_cluster(p, rank); }

SGL_DEVICE void cluster_store(float* p, int rank, float value) { emu::write_cluster(p, rank, &value, sizeof value); }

// ---- Hopper --------------------------------------------------------------------------------------------------------

#if SGL_CUDA
#define SGL_WARPGROUPS 1

constexpr int kWarpgroup = 128;  // threads

struct alignas(8) Arrivals {
  uint64_t state;
};
SGL_DEVICE void arrivals_init(Arrivals* a, int count) { emu::arrivals_init(a, count); }
SGL_DEVICE void arrivals_ready() { emu::arrivals_ready(); }
SGL_DEVICE void arrive(Arrivals* a) { emu::arrive(a, 0); }
SGL_DEVICE void arrive_expecting(Arrivals* a, int bytes) { emu::arrive(a, bytes); }
SGL_DEVICE void wait_for_arrivals(Arrivals* a, int parity, emu::Place place = emu::here()) {
  emu::wait_for_arrivals(a, parity, place);
}

SGL_DEVICE int same_in_all_lanes(int value, emu::Place place = emu::here()) { return emu::same_in_all_lanes(value, place); }

enum class Reuse : uint64_t { kNone = 0x12f0000000000000, kSoon = 0x14f0000000000000 };

SGL_DEVICE void copy_tile(void* shared, const TensorMap& map, int row, int column, Arrivals* done, Reuse) {
  static_assert(sizeof(TensorMap) == 128, "");
  emu::copy_tile(shared, reinterpret_cast<const uint64_t*>(map.words), row, column, done);
}

template <int N>
struct GroupSums {
  float v[N / 2];
  // Elements 2 i and 2 i + 1 of this thread are neighbours, in this row and from this column on.
  SGL_DEVICE int row(int i) { return thread_id() % kWarpgroup / 32 * 16 + lane_id() / 4 + i % 2 * 8; }
  SGL_DEVICE int column(int i) { return i / 2 * 8 + lane_id() % 4 * 2; }
};

struct Operand {
  const uint8_t* tile;
};
SGL_DEVICE Operand operand_at(const void* tile) { return {static_cast<const uint8_t*>(tile)}; }
SGL_DEVICE Operand operand_after(const Operand& tile, int bytes) { return {tile.tile + bytes}; }

SGL_DEVICE void group_begin(emu::Place place = emu::here()) { emu::group_begin(place); }
SGL_DEVICE void group_commit(emu::Place place = emu::here()) { emu::group_commit(place); }
template <int kPending, int N>
SGL_DEVICE void group_wait(GroupSums<N>& sums, emu::Place place = emu::here()) {
  emu::group_wait(kPending, sums.v, place);
}
template <int N>
SGL_DEVICE void multiply_tiles(GroupSums<N>& d, const Operand& a, const Operand& b, int step, emu::Place place = emu::here()) {
  static_assert(N == 64 || N == 96 || N == 128, "");
  emu::multiply_tiles(d.v, N, a.tile, b.tile, step, place);
}
#endif

SGL_DEVICE void trap() { emu::trap(); }

// ---- the kernels before and after in the stream --------------------------------------------------------------------

SGL_DEVICE void wait_for_previous_kernel() { emu::wait_for_previous_kernel(); }
SGL_DEVICE void let_next_kernel_start() {}

}  // namespace sgl
