// What a kernel may ask of a GPU: the one file with PTX, MFMA and vendor intrinsics in it.
//
// Kernels are written once against this header. Three things implement it: nvcc (sm_80 and newer), clang for AMD's CDNA
// (gfx90a, gfx942, gfx950; freestanding, no ROCm headers), and the CPU emulator of the tests (SGL_EMULATE).
// What an architecture lacks has a defined meaning here: no cluster means a cluster of one, no programmatic launch means that waiting and triggering do nothing,
// no asynchronous copy means a plain one.
#pragma once

#if defined(SGL_EMULATE)
#include "emulator.h"
#else

#if defined(__CUDACC__) && !defined(__HIP__)
#include <cstdint>
#define SGL_CUDA 1
#else
#define SGL_HIP 1
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using size_t = decltype(sizeof(0));
using uintptr_t = unsigned long;
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#endif

#define SGL_DEVICE static __device__ __forceinline__
#define SGL_UNROLL _Pragma("unroll")
#define SGL_NO_UNROLL _Pragma("unroll 1")

// A kernel entry point: SGL_KERNEL(threads) name(SGL_ARGS(Type) args) { ... }
// SGL_KERNEL_OF(threads, blocks) says how many blocks a multiprocessor should have registers for.
#if SGL_CUDA
#define SGL_KERNEL_OF(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define SGL_KERNEL(threads) SGL_KERNEL_OF(threads, 2)
#define SGL_ARGS(type) const __grid_constant__ type
#else
#define SGL_KERNEL(threads) extern "C" __global__ void __attribute__((amdgpu_flat_work_group_size(1, threads)))
#define SGL_KERNEL_OF(threads, blocks) SGL_KERNEL(threads)
#define SGL_ARGS(type) const type
#endif

#include "tensor_map.h"

namespace sgl {

// ---- who am I ------------------------------------------------------------------------------------------------------

#if SGL_CUDA
constexpr int kWarp = 32;
SGL_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
SGL_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
SGL_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
SGL_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
SGL_DEVICE void barrier() { __syncthreads(); }
#else
constexpr int kWarp = 64;
SGL_DEVICE int thread_id() { return static_cast<int>(__builtin_amdgcn_workitem_id_x()); }
SGL_DEVICE int block_x() { return static_cast<int>(__builtin_amdgcn_workgroup_id_x()); }
SGL_DEVICE int block_y() { return static_cast<int>(__builtin_amdgcn_workgroup_id_y()); }
SGL_DEVICE int grid_x() {
  // Code object v5 keeps the number of work-groups at the start of the implicit arguments.
  return *(const __attribute__((address_space(4))) int32_t*)__builtin_amdgcn_implicitarg_ptr();
}
SGL_DEVICE void barrier() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}
#endif
SGL_DEVICE int lane_id() { return thread_id() % kWarp; }
SGL_DEVICE int warp_id() { return thread_id() / kWarp; }

// Whether a kernel's blocks may start while the previous kernel still runs, and find room beside its blocks.
#if SGL_CUDA && __CUDA_ARCH__ >= 900
constexpr bool kStartsEarly = true;
#else
constexpr bool kStartsEarly = false;
#endif

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

SGL_DEVICE float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
SGL_DEVICE float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }
SGL_DEVICE float low_float(uint32_t pair) { return bits_to_float(pair << 16); }
SGL_DEVICE float high_float(uint32_t pair) { return bits_to_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even, the first in the low half.
SGL_DEVICE uint32_t pack_bf16(float low, float high) {
#if SGL_CUDA
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const bf16 l = __builtin_bit_cast(bf16, static_cast<__bf16>(low));
  const bf16 h = __builtin_bit_cast(bf16, static_cast<__bf16>(high));
  return static_cast<uint32_t>(l) | static_cast<uint32_t>(h) << 16;
#endif
}
SGL_DEVICE bf16 to_bf16(float value) { return static_cast<bf16>(pack_bf16(value, 0.f)); }

// a * b + c, rounded once. Said aloud where a sum must have the same bits in every kernel that takes it: what a compiler
// makes of `a * b + c` may depend on the code around it.
SGL_DEVICE float multiply_add(float a, float b, float c) {
#if SGL_CUDA
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
SGL_DEVICE int64_t multiply_wide(int a, int b) {  // one instruction; the compiler makes three of it where b stays the same
#if SGL_CUDA
  int64_t product;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<int64_t>(a) * b;
#endif
}
SGL_DEVICE float reciprocal_approx(float x) {  // 1 / x to about 1 ulp of float32; 0 where that is subnormal
#if SGL_CUDA
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return __builtin_amdgcn_rcpf(x);
#endif
}
SGL_DEVICE float rsqrt(float x) {
#if SGL_CUDA
  return rsqrtf(x);
#else
  return __builtin_amdgcn_rsqf(x);
#endif
}
SGL_DEVICE float exp_approx(float x) {  // e^x to about 2 ulp of float32; 0 where that is subnormal
  constexpr float kLog2E = 1.4426950408889634f;
#if SGL_CUDA
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
  return y;
#else
  return __builtin_amdgcn_exp2f(x * kLog2E);
#endif
}

// ---- memory --------------------------------------------------------------------------------------------------------

SGL_DEVICE Vec8 load_vec(const void* p) { return *static_cast<const Vec8*>(p); }
SGL_DEVICE Vec4 load_vec4(const void* p) {  // of global memory
#if SGL_CUDA
  __builtin_assume(__isGlobal(p));
#endif
  return *static_cast<const Vec4*>(p);
}
SGL_DEVICE void store_vec(void* p, const Vec8& v) { *static_cast<Vec8*>(p) = v; }

// Ask for the cache line at `global` to be on its way to the last cache; nothing where there is no such instruction.
SGL_DEVICE void prefetch_l2(const void* global) {
#if SGL_CUDA
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// The dynamic shared memory of this block, 128-byte aligned.
SGL_DEVICE uint8_t* shared_memory() {
#if SGL_CUDA
  extern __shared__ __align__(128) uint8_t sgl_shared[];
  return sgl_shared;
#else
  extern __shared__ __attribute__((aligned(128))) uint8_t sgl_shared[];
  return (uint8_t*)sgl_shared;
#endif
}

SGL_DEVICE uint8_t* align_shared(uint8_t* p, int bytes) {  // the next multiple, of a power of two
#if SGL_CUDA
  return p + (-static_cast<uint32_t>(__cvta_generic_to_shared(p)) & (bytes - 1));
#else
  return p + (-reinterpret_cast<uintptr_t>(p) & (bytes - 1));
#endif
}

#if SGL_CUDA
SGL_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// Sixteen bytes from global to shared memory, of which only the first `bytes` (0..16, even) are used and the rest become
// zeros. Both addresses are multiples of 16; with 0 bytes the source may be null. Done after async_wait and a barrier.
SGL_DEVICE void async_copy16(void* shared, const void* global, int bytes) {
#if SGL_CUDA
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  Vec8 v = {};
  if (bytes > 0) v = load_vec(global);
  SGL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int left = bytes - 4 * i;
    v.w[i] = left >= 4 ? v.w[i] : left > 0 ? v.w[i] & 0xffffu : 0u;
  }
  store_vec(shared, v);
#endif
}
// Eight bytes, which other threads of the multiprocessor may ask for, too.
SGL_DEVICE void async_copy8(void* shared, const void* global) {
#if SGL_CUDA
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
  *static_cast<Vec4*>(shared) = load_vec4(global);
#endif
}
SGL_DEVICE void async_commit() {
#if SGL_CUDA
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Until at most `kPending` of this thread's commits are unfinished.
template <int kPending>
SGL_DEVICE void async_wait() {
#if SGL_CUDA
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- a warp --------------------------------------------------------------------------------------------------------

// Makes the shared memory that lanes of this warp have written (their finished copies too) visible to all of them.
SGL_DEVICE void warp_barrier() {
#if SGL_CUDA
  __syncwarp();
#else
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
#endif
}

SGL_DEVICE float shuffle_xor(float value, int mask) {
#if SGL_CUDA
  return __shfl_xor_sync(0xffffffffu, value, mask);
#else
  const int bits = __builtin_amdgcn_ds_bpermute((lane_id() ^ mask) * 4, __builtin_bit_cast(int, value));
  return __builtin_bit_cast(float, bits);
#endif
}

SGL_DEVICE int shuffle(int value, int lane) {  // that of another lane
#if SGL_CUDA
  return __shfl_sync(0xffffffffu, value, lane);
#else
  return __builtin_amdgcn_ds_bpermute(lane * 4, value);
#endif
}

// D[16 x 16] += A[16 x 16] B[16 x 16]^T by one warp; A and B are rows of bf16 along the summed dimension.
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

// `chunk(row, half)` is the address in shared memory of eight bf16: columns 8 * half ... of a row, 0..15.
template <class Chunk>
SGL_DEVICE Fragment load_fragment(Chunk chunk) {
  Fragment f;
  const int lane = lane_id();
#if SGL_CUDA
  const void* p = chunk(lane % 16, lane / 16);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.r[0]), "=r"(f.r[1]), "=r"(f.r[2]), "=r"(f.r[3])
               : "r"(shared_address(p))
               : "memory");
#else
  const uint32_t* p = reinterpret_cast<const uint32_t*>(chunk(lane % 16, lane / 32)) + lane / 16 % 2 * 2;
  f.r[0] = p[0];
  f.r[1] = p[1];
#endif
  return f;
}

// Of the columns of D, the rows of B, only the first kColumns are computed: 8 or 16; always 16 on wave-64 GPUs.
template <int kColumns = 16>
SGL_DEVICE void mma(Accumulator& d, const Fragment& a, const Fragment& b) {
#if SGL_CUDA
  SGL_UNROLL
  for (int half = 0; half < kColumns / 8; ++half) {
    float* v = d.v + 4 * half;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(v[0]), "+f"(v[1]), "+f"(v[2]), "+f"(v[3])
        : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[half]), "r"(b.r[half + 2]));
  }
#else
  using Short4 = short __attribute__((ext_vector_type(4)));
  using Float4V = float __attribute__((ext_vector_type(4)));
  const Float4V c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(
      __builtin_bit_cast(Short4, a), __builtin_bit_cast(Short4, b), __builtin_bit_cast(Float4V, d), 0, 0, 0);
  d = __builtin_bit_cast(Accumulator, c);
#endif
}

// D += U B^T by one warp, out of registers: D is 8 or 16 tokens (always 16 on wave-64 GPUs) x 32 columns, U and B have sixteen
// summed elements a row. Each lane has eight neighbouring columns of kRows tokens, as it would load and store them. Lanes take the
// summed dimension in an order of their own, which is the same for U and B.
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
SGL_DEVICE void mma(Strip<kTokens>& d, const Vec4 (&u)[Strip<kTokens>::kRows], const Vec4 (&b)[Strip<kTokens>::kParts]) {
#if SGL_CUDA
  constexpr int kLast = Strip<kTokens>::kRows - 1;
  float unused[2] = {0.f, 0.f};
  SGL_UNROLL
  for (int j = 0; j < Strip<kTokens>::kParts; ++j) {
    float* const low = d.v[0] + 2 * j;
    float* const high = kLast ? d.v[kLast] + 2 * j : unused;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(low[0]), "+f"(low[1]), "+f"(high[0]), "+f"(high[1])
        : "r"(u[0].w[0]), "r"(kLast ? u[kLast].w[0] : 0), "r"(u[0].w[1]), "r"(kLast ? u[kLast].w[1] : 0), "r"(b[j].w[0]),
          "r"(b[j].w[1]));
  }
#else
  using Short4 = short __attribute__((ext_vector_type(4)));
  using Float4V = float __attribute__((ext_vector_type(4)));
  SGL_UNROLL
  for (int j = 0; j < Strip<kTokens>::kParts; ++j) {
    float* v = d.v[0] + 4 * j;
    const Float4V c = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(
        __builtin_bit_cast(Short4, b[j]), __builtin_bit_cast(Short4, u[0]), Float4V{v[0], v[1], v[2], v[3]}, 0, 0, 0);
    SGL_UNROLL
    for (int i = 0; i < 4; ++i) v[i] = c[i];
  }
#endif
}
// The sum over the four lanes that have the 32 columns of a row, the same bits in each.
SGL_DEVICE float sum_strip_row(float value) {
  constexpr int kNext = kWarp == 32 ? 1 : 16;
  value += shuffle_xor(value, 2 * kNext);
  return value + shuffle_xor(value, kNext);
}

// ---- a cluster: blocks that run together and read each other's shared memory ------------------------------------------

SGL_DEVICE int cluster_rank() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
SGL_DEVICE int cluster_x() {  // which of the grid's clusters
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return static_cast<int>(index);
#else
  return block_x();
#endif
}
SGL_DEVICE int cluster_size() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
#else
  return 1;
#endif
}
// A barrier of all threads of the cluster, and so of the block. It waits until what they have stored to global memory has arrived
// there.
SGL_DEVICE void cluster_barrier() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  barrier();
#endif
}
// A barrier in two halves that orders no memory: once it is passed, the others have started.
SGL_DEVICE void cluster_start() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
SGL_DEVICE void cluster_started() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}
// What block `rank` of the cluster has at the place in shared memory that `p` is in this one.
SGL_DEVICE Float4 cluster_load(const Float4* p, int rank) {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  Float4 f;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3])
               : "r"(address)
               : "memory");
  return f;
#else
  return *p;
#endif
}
SGL_DEVICE Float2 cluster_load(const Float2* p, int rank) {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  Float2 f;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(f.v[0]), "=f"(f.v[1]) : "r"(address) : "memory");
  return f;
#else
  return *p;
#endif
}
SGL_DEVICE float cluster_load(const float* p, int rank) {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  float f;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(address) : "memory");
  return f;
#else
  return *p;
#endif
}

// Write that place in block `rank` of the cluster. It has started once the cluster has had a barrier; one more makes the
// value visible.
SGL_DEVICE void cluster_store(float* p, int rank, float value) {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
#else
  *p = value;
#endif
}

// ---- Hopper: a copy engine, and products of four warps out of shared memory -----------------------------------------------
// Only where SGL_WARPGROUPS is 1. Tiles in shared memory are rows of 64 bf16 in the order of swizzle.h, from a multiple of 1024 bytes on.

#if SGL_CUDA && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SGL_WARPGROUPS 1

constexpr int kWarpgroup = 128;  // threads

// In shared memory: counts what a phase still waits for, arrivals and bytes. The first phase has parity 0.
struct alignas(8) Arrivals {
  uint64_t state;
};
// By one thread, which says so with `arrivals_ready` before a barrier lets others use them.
SGL_DEVICE void arrivals_init(Arrivals* a, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(count) : "memory");
}
SGL_DEVICE void arrivals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
SGL_DEVICE void arrive(Arrivals* a) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(a)) : "memory");
}
// Arrive, and let the phase wait for so many bytes of `copy_tile`.
SGL_DEVICE void arrive_expecting(Arrivals* a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over.
SGL_DEVICE void wait_for_arrivals(Arrivals* a, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra OVER;\nbra AGAIN;\nOVER:\n}" ::"r"(
          shared_address(a)),
      "r"(parity)
      : "memory");
}

// What all lanes of a warp have alike, so that the compiler can tell: it then keeps it, and what follows from it, once for the warp.
SGL_DEVICE int same_in_all_lanes(int value) { return shuffle(value, 0); }

// What the caches should do with a tile: its lines are used once, or by other blocks too.
enum class Reuse : uint64_t { kNone = 0x12f0000000000000, kSoon = 0x14f0000000000000 };

// A tile of the matrix that `map` describes, from (row, column) on, to shared memory; what lies beyond the matrix becomes
// zeros. By one thread. `done` counts the bytes of the whole tile.
SGL_DEVICE void copy_tile(void* shared, const TensorMap& map, int row, int column, Arrivals* done, Reuse reuse) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
          shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(done)), "l"(static_cast<uint64_t>(reuse))
      : "memory");
}

// D[64 x N] of a warpgroup: rows are those of A, columns those of B.
template <int N>
struct GroupSums {
  float v[N / 2];
  // Elements 2 i and 2 i + 1 of this thread are neighbours, in this row and from this column on.
  SGL_DEVICE int row(int i) { return thread_id() % kWarpgroup / 32 * 16 + lane_id() / 4 + i % 2 * 8; }
  SGL_DEVICE int column(int i) { return i / 2 * 8 + lane_id() % 4 * 2; }
};

// A tile as products take it: the half of its descriptor that says where. The other half, 0x40000040, says that eight rows take 1024 bytes,
// swizzled.
struct Operand {
  uint32_t low;
};
SGL_DEVICE Operand operand_at(const void* tile) { return {(shared_address(tile) & 0x3ffff) >> 4 | 1u << 16}; }
SGL_DEVICE Operand operand_after(const Operand& tile, int bytes) { return {tile.low + bytes / 16}; }

// Around a run of `multiply_tiles`: before the first, after the last, and until all but the last kPending runs are done. The
// sums may be used, and the tiles overwritten, after that alone.
SGL_DEVICE void group_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SGL_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, int N>
SGL_DEVICE void group_wait(GroupSums<N>& sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  if (kPending == 0)
    SGL_UNROLL
    for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums.v[i])::"memory");
}

#define SGL_SUMS4(i) "+f"(d.v[i]), "+f"(d.v[i + 1]), "+f"(d.v[i + 2]), "+f"(d.v[i + 3])
#define SGL_SUMS16(i) SGL_SUMS4(i), SGL_SUMS4(i + 4), SGL_SUMS4(i + 8), SGL_SUMS4(i + 12)
#define SGL_REGISTERS32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SGL_REGISTERS48 SGL_REGISTERS32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define SGL_REGISTERS64 SGL_REGISTERS48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define SGL_MULTIPLY(columns, registers, low_a, low_b)                                     \
  "{\n.reg .b64 a, b;\nmov.b64 a, {" low_a ", 0x40000040};\nmov.b64 b, {" low_b ", 0x40000040};\n" \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.bf16.bf16 {" registers "}, a, b, 1, 1, 1, 0, 0;\n}"

// D += A B^T over columns 16 step ... 16 step + 15 of a tile of 64 rows and one of N.
SGL_DEVICE void multiply_tiles(GroupSums<64>& d, const Operand& a, const Operand& b, int step) {
  asm volatile(SGL_MULTIPLY("64", SGL_REGISTERS32, "%32", "%33")
               : SGL_SUMS16(0), SGL_SUMS16(16)
               : "r"(a.low + step * 2), "r"(b.low + step * 2));
}
SGL_DEVICE void multiply_tiles(GroupSums<96>& d, const Operand& a, const Operand& b, int step) {
  asm volatile(SGL_MULTIPLY("96", SGL_REGISTERS48, "%48", "%49")
               : SGL_SUMS16(0), SGL_SUMS16(16), SGL_SUMS16(32)
               : "r"(a.low + step * 2), "r"(b.low + step * 2));
}
SGL_DEVICE void multiply_tiles(GroupSums<128>& d, const Operand& a, const Operand& b, int step) {
  asm volatile(SGL_MULTIPLY("128", SGL_REGISTERS64, "%64", "%65")
               : SGL_SUMS16(0), SGL_SUMS16(16), SGL_SUMS16(32), SGL_SUMS16(48)
               : "r"(a.low + step * 2), "r"(b.low + step * 2));
}
#endif

SGL_DEVICE void trap() {  // ends the launch with an error
#if SGL_CUDA
  __trap();
#else
  __builtin_trap();
#endif
}

// ---- the kernels before and after in the stream ------------------------------------------------------------------------

// Before this returns, a kernel may read only what no kernel of the step writes: weights, adapters, the batch.
SGL_DEVICE void wait_for_previous_kernel() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel's blocks may start as soon as all blocks of this one have said so.
SGL_DEVICE void let_next_kernel_start() {
#if SGL_CUDA && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace sgl
#endif
