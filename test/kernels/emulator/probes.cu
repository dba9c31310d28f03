// Small kernels for test_emulator.py, most of them with one mistake. `y` of the arguments is an array of 64 words that
// may be written, `u` one of 64 words that the kernel before has written, `slabs` one of 64 words that nobody writes.
#include "sgl_kernel/lora.h"
#include "sgl_kernel/swizzle.h"

namespace sgl {

SGL_DEVICE uint32_t* words() { return reinterpret_cast<uint32_t*>(shared_memory()); }
SGL_DEVICE uint32_t* out_of(const ExpandArgs& args) { return reinterpret_cast<uint32_t*>(args.y); }
SGL_DEVICE const uint32_t* in_of(const ExpandArgs& args) { return reinterpret_cast<const uint32_t*>(args.delta.u); }
SGL_DEVICE const uint32_t* static_of(const ExpandArgs& args) {
  return reinterpret_cast<const uint32_t*>(args.delta.site.slabs);
}

// A copy of sixteen bytes by every thread, from and to where it belongs; y gets the first word.
template <bool kWaits, bool kBarrier>
SGL_DEVICE void copy_and_read(const ExpandArgs& args, int bytes) {
  wait_for_previous_kernel();
  const int i = thread_id() % 16;
  if (thread_id() < 16) async_copy16(words() + 4 * i, bytes ? in_of(args) + 4 * i : nullptr, bytes);
  async_commit();
  if (kWaits) async_wait<0>();
  if (kBarrier) barrier();
  if (thread_id() < 16)
    for (int j = 0; j < 4; ++j) out_of(args)[4 * i + j] = words()[(4 * i + j) % 64];
  if (!kBarrier && thread_id() < 16) out_of(args)[i] = words()[(4 * i + 4) % 64];
}

}  // namespace sgl

using namespace sgl;

#define PROBE(name) SGL_KERNEL(256) name(SGL_ARGS(ExpandArgs) args)

PROBE(copies) { copy_and_read<true, true>(args, 16); }
PROBE(copies_some_bytes) { copy_and_read<true, true>(args, 6); }
PROBE(copies_nothing) { copy_and_read<true, true>(args, 0); }
PROBE(does_not_wait_for_copy) { copy_and_read<false, true>(args, 16); }
PROBE(no_barrier_after_copy) { copy_and_read<true, false>(args, 16); }
PROBE(copy_is_misaligned) {
  wait_for_previous_kernel();
  async_copy16(words(), in_of(args) + 1, 16);
}
PROBE(copy_before_wait) { async_copy16(words() + 4 * thread_id(), in_of(args), 16); }

PROBE(reads_behind_the_end) {
  if (thread_id() == 3) words()[0] = static_of(args)[64];
}
PROBE(reads_before_the_start) {
  if (thread_id() == 3) words()[0] = static_of(args)[-1];
}
PROBE(reads_null) { words()[thread_id()] = static_cast<uint32_t>(args.delta.batch.perm[0]); }
// A copy that gcc leaves to the C library, which calls nobody: only the forbidden page stops it.
PROBE(reads_behind_the_end_unseen) {
  volatile int bytes = 4 * 65;
  if (thread_id() == 0) __builtin_memcpy(words(), static_of(args), static_cast<unsigned long>(bytes));
}
PROBE(writes_what_is_static) { const_cast<uint32_t*>(static_of(args))[thread_id() % 64] = 0; }
PROBE(reads_before_wait) { words()[thread_id()] = in_of(args)[0]; }
PROBE(writes_before_wait) { out_of(args)[thread_id() % 64] = 0; }
PROBE(one_thread_waits_for_all) {
  if (thread_id() == 0) wait_for_previous_kernel();
  barrier();
  if (thread_id() < 64) out_of(args)[thread_id()] = in_of(args)[thread_id()];
}
PROBE(one_lane_waits_for_its_warp) {
  if (lane_id() == 5) wait_for_previous_kernel();
  warp_barrier();
  if (thread_id() < 64) out_of(args)[thread_id()] = in_of(args)[thread_id()];
}
PROBE(one_warp_waits_for_another) {
  if (warp_id() == 0) wait_for_previous_kernel();
  warp_barrier();
  words()[thread_id()] = in_of(args)[0];
}
PROBE(some_blocks_do_not_wait) {
  if (block_x() != 2) wait_for_previous_kernel();
}
PROBE(reads_unwritten) {
  wait_for_previous_kernel();
  if (thread_id() == 0) out_of(args)[0] = words()[5];
}
PROBE(shared_out_of_bounds) { words()[thread_id() + 1024] = 0; }
PROBE(misaligned) {
  wait_for_previous_kernel();
  if (thread_id() == 0) store_vec(out_of(args), load_vec(in_of(args) + 2));
}
PROBE(local_out_of_bounds) {
  int32_t local[3] = {1, 2, 3};
  words()[thread_id()] = static_cast<uint32_t>(local[thread_id() % 4]);
}

PROBE(race_read_after_write) {
  words()[thread_id()] = 1;
  if (thread_id() == 200) words()[thread_id()] = words()[thread_id() - 70];
}
PROBE(race_within_a_warp) {
  words()[thread_id()] = 1;
  if (thread_id() == 1) words()[1] += words()[0];
}
PROBE(race_write_after_read) {
  words()[thread_id()] = 1;
  barrier();
  const uint32_t other = words()[(thread_id() + 1) % 256];
  words()[thread_id()] = other;
}
PROBE(race_of_blocks) {
  wait_for_previous_kernel();
  if (thread_id() == 0) out_of(args)[block_x() / 2] = 1;
}
PROBE(race_of_blocks_that_read) {
  wait_for_previous_kernel();
  if (thread_id() == 0) out_of(args)[block_x()] = 1 + out_of(args)[(block_x() + 1) % grid_x()];
}

// Every lane writes or copies, reads what its neighbour has, and writes or copies again; y gets what was read.
template <bool kAfterWrite, bool kAfterRead>
SGL_DEVICE void pass_within_a_warp(const ExpandArgs& args) {
  wait_for_previous_kernel();
  const int i = thread_id(), neighbour = i ^ 1;
  for (int turn = 0; turn < 3; ++turn) {
    words()[i] = static_cast<uint32_t>(100 * turn + i);
    if (kAfterWrite) warp_barrier();
    const uint32_t read = words()[neighbour] + words()[i ^ 2] - words()[i ^ 2];
    if (kAfterRead) warp_barrier();
    if (i < 64) out_of(args)[i] = read;
  }
}
template <bool kAfterCopy, bool kAfterRead>
SGL_DEVICE void copy_within_a_warp(const ExpandArgs& args) {
  wait_for_previous_kernel();
  const int i = thread_id();
  for (int turn = 0; turn < 3; ++turn) {
    async_copy16(words() + 4 * i, in_of(args) + 4 * (i % 16), 16);
    async_commit();
    async_wait<0>();
    if (kAfterCopy) warp_barrier();
    const uint32_t read = words()[4 * (i ^ 1)];
    if (kAfterRead) warp_barrier();
    if (i < 64) out_of(args)[i] = read;
  }
}
PROBE(passes_within_a_warp) { pass_within_a_warp<true, true>(args); }
PROBE(no_warp_barrier_after_write) { pass_within_a_warp<false, true>(args); }
PROBE(no_warp_barrier_after_read) { pass_within_a_warp<true, false>(args); }
PROBE(copies_within_a_warp) { copy_within_a_warp<true, true>(args); }
PROBE(no_warp_barrier_after_copy) { copy_within_a_warp<false, true>(args); }
PROBE(no_warp_barrier_before_copy) { copy_within_a_warp<true, false>(args); }
PROBE(race_across_warps) {
  words()[thread_id()] = 1;
  warp_barrier();
  words()[256 + thread_id()] = words()[(thread_id() + kWarp) % 256];
}
PROBE(race_write_after_read_across_warps) {
  words()[thread_id()] = 1;
  barrier();
  const uint32_t other = words()[(thread_id() + kWarp) % 256];
  warp_barrier();
  words()[thread_id()] = other;
}
// Lanes of one warp and then one of another read a word, which the first warp then writes.
PROBE(race_with_one_reader_of_many) {
  if (thread_id() == 0) words()[0] = 1;
  barrier();
  words()[1 + thread_id()] = warp_id() == 0 || thread_id() == 200 ? words()[0] : 0;
  warp_barrier();
  if (thread_id() == 0) words()[0] = words()[0] + 1;
}
PROBE(warp_barrier_of_some) {
  if (thread_id() != 70) warp_barrier();
}

PROBE(barrier_of_some) {
  if (thread_id() >= 64) barrier();
}
PROBE(barriers_apart) {
  if (thread_id() < 128)
    barrier();
  else
    barrier();
}
PROBE(product_by_some) {
  Accumulator sum = {};
  const Fragment zeros = {};
  if (thread_id() != 70) mma(sum, zeros, zeros);
}
PROBE(warp_apart) {
  Accumulator sum = {};
  const Fragment zeros = {};
  if (lane_id() % 2)
    mma(sum, zeros, zeros);
  else
    sum.v[0] = shuffle_xor(1.f, 1);
}

PROBE(shuffles) {
  wait_for_previous_kernel();
  const float sum = shuffle_xor(static_cast<float>(lane_id()), 5);
  if (warp_id() == 0 && lane_id() < 64) out_of(args)[lane_id()] = static_cast<uint32_t>(sum);
}

// Rows of u are A and B, sixteen words of sixteen bf16 each; y is row-major D.
PROBE(multiplies) {
  wait_for_previous_kernel();
  bf16* const tiles = reinterpret_cast<bf16*>(words());
  const bf16* const in = args.delta.u;
  for (int i = thread_id(); i < 512; i += 256) tiles[i / 16 * 24 + i % 16] = in[i];
  barrier();
  if (warp_id() != 1) return;
  const auto tile = [&](int first) {
    return load_fragment([&](int row, int half) { return tiles + (first + row) * 24 + half * 8; });
  };
  Accumulator sum;
  for (int i = 0; i < Accumulator::kSize; ++i)
    sum.v[i] = static_cast<float>(Accumulator::row(i) * 16 + Accumulator::column(i));
  mma(sum, tile(0), tile(16));
  for (int i = 0; i < Accumulator::kSize; ++i)
    reinterpret_cast<float*>(args.y)[Accumulator::row(i) * 16 + Accumulator::column(i)] = sum.v[i];
}
// The registers of one warp as they are: A, B and D of the first matrix instruction, for a test that knows the layouts.
template <int kColumns>
SGL_DEVICE void multiply_registers(const ExpandArgs& args) {
  wait_for_previous_kernel();
  if (warp_id() != 0) return;
  constexpr int kPair = sizeof(Fragment) / 4;
  Fragment a, b;
  Accumulator sum = {};
  for (int i = 0; i < kPair; ++i) {
    a.r[i] = in_of(args)[lane_id() * kPair + i];
    b.r[i] = in_of(args)[(kWarp + lane_id()) * kPair + i];
  }
  mma<kColumns>(sum, a, b);
  float* const out = reinterpret_cast<float*>(args.y) + lane_id() * Accumulator::kSize;
  for (int i = 0; i < Accumulator::kSize; ++i) out[i] = sum.v[i];
}
PROBE(multiplies_registers) { multiply_registers<16>(args); }
PROBE(multiplies_registers_of_eight) { multiply_registers<8>(args); }

template <bool kBarrier, bool kStays>
SGL_DEVICE void read_neighbour(const ExpandArgs& args) {
  wait_for_previous_kernel();
  float* const mine = reinterpret_cast<float*>(shared_memory());
  mine[thread_id()] = static_cast<float>(cluster_rank() * 1000 + thread_id());
  if (kBarrier) cluster_barrier();
  const float other = cluster_load(mine + thread_id(), (cluster_rank() + 1) % cluster_size());
  if (thread_id() < 16) out_of(args)[block_x() * 16 + thread_id()] = static_cast<uint32_t>(other);
  if (kStays) cluster_barrier();
}

template <bool kStarted, bool kBarrier, bool kOwn>
SGL_DEVICE void write_neighbour(const ExpandArgs& args) {
  wait_for_previous_kernel();
  float* const mine = reinterpret_cast<float*>(shared_memory());
  cluster_start();
  if (kStarted) cluster_started();
  if (kOwn) mine[thread_id()] = 1.f;
  cluster_store(mine + thread_id(), (cluster_rank() + 1) % cluster_size(),
                static_cast<float>(cluster_rank() * 1000 + thread_id()));
  if (kBarrier) cluster_barrier();
  else barrier();
  if (thread_id() < 16) out_of(args)[block_x() * 16 + thread_id()] = static_cast<uint32_t>(mine[thread_id()]);
}
PROBE(writes_its_neighbour) { write_neighbour<true, true, false>(args); }
PROBE(writes_before_its_neighbour_starts) { write_neighbour<false, true, false>(args); }
PROBE(writes_its_neighbour_with_a_block_barrier) { write_neighbour<true, false, false>(args); }
PROBE(writes_what_its_neighbour_writes) { write_neighbour<true, true, true>(args); }

PROBE(reads_its_neighbour) { read_neighbour<true, true>(args); }
PROBE(reads_its_neighbour_too_early) { read_neighbour<false, true>(args); }
PROBE(leaves_too_early) { read_neighbour<true, false>(args); }

// ---- warpgroups ----------------------------------------------------------------------------------------------------
// By 160 threads: x is a matrix that the kernel before has written, weight one that nobody writes, y one of floats.

#if SGL_WARPGROUPS
enum class Slip {
  kNone, kNotReady, kNoBarrier, kArrivalsTwice, kStoresArrivals, kMisaligned, kOutside, kTooEarly, kFewBytes, kManyBytes, kArrivesTwice,
  kNeverArrives, kTileOnItsWay, kNoWait, kOneWaits, kWrongParity, kStoresTile, kCopiesOverTile, kNoBegin, kOtherTiles, kThreeWarps,
  kUsesSums, kNoGroupWait, kMultipliesStores, kMapOfItsOwn
};

// y[64 x N] = x weight^T over the first 64 columns.
template <Slip kSlip, int N = 64>
SGL_DEVICE void multiply_once(const GroupGemmArgs& args) {
  const int thread = thread_id();
  if (kSlip != Slip::kTooEarly) wait_for_previous_kernel();
  uint8_t* a = align_shared(shared_memory(), 1024);
  uint8_t* const b = a + 8192;
  Arrivals* const filled = reinterpret_cast<Arrivals*>(b + N * 128);
  if (kSlip == Slip::kMisaligned) a += 512;
  if (kSlip == Slip::kOutside) a += 8192 + N * 128;
  if (thread == 0) {
    arrivals_init(filled, 1);
    if (kSlip == Slip::kArrivalsTwice) arrivals_init(filled, 1);
    if (kSlip == Slip::kStoresArrivals) filled->state = 1;
    if (kSlip != Slip::kNotReady) arrivals_ready();
  }
  if (kSlip == Slip::kMultipliesStores)
    for (int i = thread; i < 512; i += 160) store_vec(a + 16 * i, Vec8{});
  if (kSlip != Slip::kNoBarrier) barrier();
  if (thread == kWarpgroup) {
    const int bytes = (kSlip == Slip::kMultipliesStores ? 0 : 8192) + N * 128;
    if (kSlip != Slip::kNeverArrives)
      arrive_expecting(filled, kSlip == Slip::kFewBytes ? bytes - 16 : kSlip == Slip::kManyBytes ? bytes + 16 : bytes);
    if (kSlip == Slip::kArrivesTwice) arrive(filled);
    const TensorMap own = args.x;
    if (kSlip != Slip::kMultipliesStores)
      copy_tile(a, kSlip == Slip::kMapOfItsOwn ? own : args.x, 0, 0, filled, Reuse::kSoon);
    copy_tile(b, args.weight, 0, 0, filled, Reuse::kNone);
  }
  if (kSlip == Slip::kTooEarly) wait_for_previous_kernel();
  if (thread >= kWarpgroup || kSlip == Slip::kTileOnItsWay) return;
  if (kSlip == Slip::kOneWaits ? thread == 0 : kSlip != Slip::kNoWait) wait_for_arrivals(filled, kSlip == Slip::kWrongParity);
  GroupSums<N> sums = {};
  if (kSlip == Slip::kStoresTile && thread == 0) a[0] = 0;
  if (kSlip != Slip::kNoBegin) group_begin();
  for (int i = 0; i < 4; ++i)
    if (kSlip != Slip::kThreeWarps || warp_id() < 3)
      multiply_tiles(sums, operand_at(a), operand_at(b), kSlip == Slip::kOtherTiles && warp_id() == 2 ? 3 - i : i);
  if (kSlip != Slip::kThreeWarps || warp_id() < 3) group_commit();
  if (kSlip == Slip::kCopiesOverTile && thread == 0) {
    arrive_expecting(filled, 8192);
    copy_tile(a, args.x, 0, 0, filled, Reuse::kSoon);
  }
  if (kSlip == Slip::kUsesSums) sums.v[0] = 1.f;
  if (kSlip != Slip::kNoGroupWait) group_wait<0>(sums);
  for (int i = 0; i < N / 2; ++i)
    reinterpret_cast<float*>(args.y)[sums.row(i / 2) * N + sums.column(i / 2) + i % 2] = sums.v[i];
}

#define GROUP_PROBE(name, ...) \
  SGL_KERNEL(160) name(SGL_ARGS(GroupGemmArgs) args) { multiply_once<__VA_ARGS__>(args); }

GROUP_PROBE(group_multiplies, Slip::kNone)
GROUP_PROBE(group_multiplies_96, Slip::kNone, 96)
GROUP_PROBE(group_multiplies_128, Slip::kNone, 128)
GROUP_PROBE(group_not_ready, Slip::kNotReady)
GROUP_PROBE(group_no_barrier, Slip::kNoBarrier)
GROUP_PROBE(group_arrivals_twice, Slip::kArrivalsTwice)
GROUP_PROBE(group_stores_arrivals, Slip::kStoresArrivals)
GROUP_PROBE(group_misaligned, Slip::kMisaligned)
GROUP_PROBE(group_outside, Slip::kOutside)
GROUP_PROBE(group_too_early, Slip::kTooEarly)
GROUP_PROBE(group_few_bytes, Slip::kFewBytes)
GROUP_PROBE(group_many_bytes, Slip::kManyBytes)
GROUP_PROBE(group_arrives_twice, Slip::kArrivesTwice)
GROUP_PROBE(group_never_arrives, Slip::kNeverArrives)
GROUP_PROBE(group_tile_on_its_way, Slip::kTileOnItsWay)
GROUP_PROBE(group_no_wait, Slip::kNoWait)
GROUP_PROBE(group_one_waits, Slip::kOneWaits)
GROUP_PROBE(group_wrong_parity, Slip::kWrongParity)
GROUP_PROBE(group_stores_tile, Slip::kStoresTile)
GROUP_PROBE(group_copies_over_tile, Slip::kCopiesOverTile)
GROUP_PROBE(group_no_begin, Slip::kNoBegin)
GROUP_PROBE(group_other_tiles, Slip::kOtherTiles)
GROUP_PROBE(group_three_warps, Slip::kThreeWarps)
GROUP_PROBE(group_uses_sums, Slip::kUsesSums)
GROUP_PROBE(group_no_group_wait, Slip::kNoGroupWait)
GROUP_PROBE(group_multiplies_stores, Slip::kMultipliesStores)
GROUP_PROBE(group_map_of_its_own, Slip::kMapOfItsOwn)

// y gets the 64 x 64 elements of the tile of x from row in_features and column out_features on.
SGL_KERNEL(160) group_copies(SGL_ARGS(GroupGemmArgs) args) {
  wait_for_previous_kernel();
  uint8_t* const tile = align_shared(shared_memory(), 1024);
  Arrivals* const filled = reinterpret_cast<Arrivals*>(tile + 8192);
  if (thread_id() == 0) {
    arrivals_init(filled, 1);
    arrivals_ready();
    arrive_expecting(filled, 8192);
    copy_tile(tile, args.x, args.in_features, args.out_features, filled, Reuse::kSoon);
    wait_for_arrivals(filled, 0);
  }
  barrier();
  for (int i = thread_id(); i < 64 * 8; i += 160) store_vec(args.y + i * 8, load_vec(tile + swizzle(i / 8, i % 8)));
}

// Two threads wait for each other, three times.
template <bool kOnceMore>
SGL_DEVICE void wait_for_each_other(const GroupGemmArgs& args) {
  wait_for_previous_kernel();
  Arrivals* const both = reinterpret_cast<Arrivals*>(words());
  if (thread_id() == 0) {
    arrivals_init(both, 2);
    arrivals_ready();
  }
  barrier();
  if (thread_id() != 0 && thread_id() != 64) return;
  for (int turn = 0; turn < 3; ++turn) {
    arrive(both);
    wait_for_arrivals(both, turn % 2);
  }
  if (kOnceMore) wait_for_arrivals(both, 1);
  if (thread_id() == 0) args.y[0] = 3;
}
SGL_KERNEL(160) group_arrives(SGL_ARGS(GroupGemmArgs) args) { wait_for_each_other<false>(args); }
SGL_KERNEL(160) group_waits_once_more(SGL_ARGS(GroupGemmArgs) args) { wait_for_each_other<true>(args); }
#endif
