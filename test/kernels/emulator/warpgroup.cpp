// Hopper's copy engine, the arrivals that its copies and threads are counted by, and the products of a warpgroup.
//
// What is asynchronous happens at the latest moment that a GPU may choose: a tile arrives when somebody waits for it, a
// product reads its tiles when somebody waits for it. Who may touch what before is judged by what each thread knows to be
// over (see Known), which it learns by waiting and passes on by arriving and at barriers, and not by what happened.
//
// PTX ISA, "mbarrier", "cp.async.bulk.tensor", "Asynchronous warpgroup level matrix instructions" and "Swizzling modes".
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace emu {
namespace {

constexpr int kRowBytes = 128, kTileAlign = 1024, kGroupWarps = 4, kGroupTokens = 64;
constexpr uint32_t kPoison = 0x7fc0dead;  // of sums that a product still adds to: a NaN that nobody computes

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Where sixteen bytes of a row lie: the swizzle is one of addresses.
uint8_t* chunk_of(const uint8_t* tile, int row, int chunk) {
  const uint32_t address = shared_address(tile) + row * kRowBytes + chunk * 16;
  return const_cast<uint8_t*>(tile) + static_cast<int>((address ^ (address >> 7 & 7) << 4) - shared_address(tile));
}

void check_tile(const uint8_t* tile, int rows) {
  const Block& block = *machine.current->block;
  if (tile < block.shared || tile + rows * kRowBytes > block.shared + machine.launch->shared_bytes)
    fail("a tile of %d rows at %s", rows, describe(tile));
  if (shared_address(tile) % kTileAlign) fail("misaligned: a tile at %s, which is not a multiple of 1024", describe(tile));
}

void wake(std::vector<Thread*>& waiting) {
  for (Thread* thread : waiting) release(*thread);
  waiting.clear();
}

// ---- arrivals ------------------------------------------------------------------------------------------------------

Arrivals& find(const void* at) {
  Thread& thread = *machine.current;
  for (Arrivals& a : thread.block->arrivals)
    if (a.at == at) {
      if (!a.ready) fail("uses arrivals at %s before arrivals_ready", describe(at));
      check_counter(thread, at);
      return a;
    }
  fail("no arrivals are at %s", describe(at));
}

void deliver(Block& block, const TileCopy& copy, uint16_t index, uint16_t phase) {
  for (int r = 0; r < copy.map.tile_rows; ++r)
    for (int c = 0; c < 8; ++c) {
      uint8_t* const to = chunk_of(copy.to, r, c);
      const int64_t row = copy.row + r, column = copy.column + 8 * c;
      const int64_t present = row < copy.map.rows ? std::clamp<int64_t>(copy.map.columns - column, 0, 8) : 0;
      std::memset(to, 0, 16);
      if (present) std::memcpy(to, copy.map.data + (row * copy.map.stride + column) * 2, present * 2);
      arrive_in_cells(block, to, index, phase);
    }
}

// End the phase if nothing is missing.
void complete(Block& block, Arrivals& a) {
  if (a.pending) return;
  if (a.brought > a.expected)
    fail("%d bytes are brought to arrivals at %s, which expect %d", a.brought, describe(a.at), a.expected);
  if (a.brought < a.expected) return;
  const uint16_t index = static_cast<uint16_t>(&a - block.arrivals.data());
  ++a.phase;
  for (const TileCopy& copy : a.tiles) deliver(block, copy, index, a.phase);
  a.tiles.clear();
  a.over.join(a.told);
  a.over.phases[index] = a.phase;
  a.pending = a.count;
  a.expected = a.brought = 0;
}

// ---- products ------------------------------------------------------------------------------------------------------

struct Operands {
  float* sums;
  Multiply multiply;
};

float bf16_at(const uint8_t* tile, int row, int k) {
  const uint8_t* const p = chunk_of(tile, row, k / 8) + k % 8 * 2;
  uint32_t bits = 0;
  std::memcpy(reinterpret_cast<uint8_t*>(&bits) + 2, p, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Products of bf16 are exact in float32; sixteen of them and what was there are rounded once.
void compute(Block& block, const Multiply& m) {
  static float a[kGroupTokens][16], b[256][16];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < kGroupTokens; ++row) a[row][k] = bf16_at(m.a, row, 16 * m.step + k);
    for (int row = 0; row < m.columns; ++row) b[row][k] = bf16_at(m.b, row, 16 * m.step + k);
  }
  for (int row = 0; row < kGroupTokens; ++row)
    for (int column = 0; column < m.columns; ++column) {
      const int lane = row % 8 * 4 + column % 8 / 2;
      float& sum = block.threads[row / 16 * 32 + lane].sums[column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
      double exact = sum;
      for (int k = 0; k < 16; ++k) exact += static_cast<double>(a[row][k] * b[column][k]);
      sum = static_cast<float>(exact);
    }
}

// Whether the first `runs` are over; those that can be are computed now.
bool are_over(Block& block, int runs) {
  Warpgroup& group = block.group;
  for (; group.over < runs; ++group.over) {
    const Run& run = group.runs[group.over];
    if (run.committed < kGroupWarps) return false;
    for (const Multiply& m : run.multiplies) compute(block, m);
  }
  return true;
}

void check_sums(const Thread& thread, const float* sums) {
  if (sums != thread.sums_at) fail("other sums than those that products on their way add to");
  for (int i = 0; i < thread.num_sums; ++i)
    if (bits_of(sums[i]) != kPoison) fail("race: writes sums while a product that adds to them is on its way");
}

// From here on the sums are the product's.
void take_sums(Thread& thread, float* sums, int count) {
  if (thread.num_sums) {
    check_sums(thread, sums);
    if (count != thread.num_sums) fail("a product of another size is on its way");
    return;
  }
  thread.sums_at = sums;
  thread.num_sums = count;
  for (int i = 0; i < count; ++i) {
    thread.sums[i] = sums[i];
    std::memcpy(&sums[i], &kPoison, 4);
  }
}

Warpgroup& my_group() {
  Thread& thread = *machine.current;
  if (thread.id >= 32 * kGroupWarps) fail("multiplies as thread %d; the first 128 of a block may", thread.id);
  return thread.block->group;
}

void run_multiply(void** lanes) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  Warpgroup& group = my_group();
  const int warp = thread.id / 32;
  const Multiply& m = static_cast<Operands*>(lanes[0])->multiply;
  for (int lane = 0; lane < 32; ++lane) {
    Thread& other = block.threads[warp * 32 + lane];
    const Operands& o = *static_cast<Operands*>(lanes[lane]);
    if (!other.begun) fail("multiply_tiles with no group_begin before it");
    if (!(o.multiply == m)) fail("lanes of a warp multiply different tiles");
    take_sums(other, o.sums, m.columns / 2);
  }
  const size_t run = group.issued[warp];
  if (group.runs.size() <= run) group.runs.resize(run + 1);
  std::vector<Multiply>& known = group.runs[run].multiplies;
  const size_t index = group.open[warp]++;
  if (index == known.size() && group.runs[run].committed == 0) known.push_back(m);
  if (index >= known.size() || !(known[index] == m)) fail("warps of a warpgroup multiply different tiles");
  for (int half = 0; half < 2; ++half) {
    for (int row = 0; row < kGroupTokens; ++row)
      multiply_cells(block, warp, chunk_of(m.a, row, 2 * m.step + half), static_cast<uint16_t>(run + 1));
    for (int row = 0; row < m.columns; ++row)
      multiply_cells(block, warp, chunk_of(m.b, row, 2 * m.step + half), static_cast<uint16_t>(run + 1));
  }
}

void run_begin(void**) {
  Thread* const lanes = machine.current->block->threads + machine.current->id / 32 * 32;
  for (int lane = 0; lane < 32; ++lane) lanes[lane].begun = true;
}

void run_commit(void**) {
  Block& block = *machine.current->block;
  Warpgroup& group = my_group();
  const int warp = machine.current->id / 32;
  const size_t run = group.issued[warp]++;
  if (group.runs.size() <= run) group.runs.resize(run + 1);
  if (group.open[warp] != static_cast<int>(group.runs[run].multiplies.size()) && group.runs[run].committed)
    fail("warps of a warpgroup multiply different tiles");
  ++group.runs[run].committed;
  group.open[warp] = 0;
  for (int lane = 0; lane < 32; ++lane) block.threads[warp * 32 + lane].begun = false;
  wake(group.waiting);
}

}  // namespace

bool Multiply::operator==(const Multiply& other) const {
  return a == other.a && b == other.b && columns == other.columns && step == other.step;
}

void Known::join(const Known& other) {
  runs = std::max(runs, other.runs);
  for (int i = 0; i < kMostArrivals; ++i) phases[i] = std::max(phases[i], other.phases[i]);
}

// As a block sees its own shared memory; no multiple of 1024 but for some seeds.
uint32_t shared_address(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - machine.current->block->shared;
  return static_cast<uint32_t>((64 << 10) + machine.launch->seed % 8 * 128 + offset);
}

void arrivals_init(void* at, int count) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  check_shared(thread, at, 8, 8, kWrite);  // where arrivals are already it is refused
  if (count < 1 || block.arrivals.size() == kMostArrivals) fail("arrivals of %d threads", count);
  start_counter(block, at);
  Arrivals a = {};
  a.at = static_cast<const uint8_t*>(at);
  a.by = thread.id;
  a.count = a.pending = count;
  block.arrivals.push_back(a);
}
void arrivals_ready() {
  for (Arrivals& a : machine.current->block->arrivals)
    if (a.by == machine.current->id) a.ready = true;
}

void arrive(void* at, int bytes) {
  Thread& thread = *machine.current;
  Arrivals& a = find(at);
  if (!a.pending) fail("arrives at %s, where a phase that nothing but copies is missing from is not over", describe(at));
  a.told.join(thread.known);
  a.expected += bytes;
  --a.pending;
  if (a.tiles.empty()) complete(*thread.block, a);  // tiles arrive as late as they may
  wake(a.waiting);
}

void wait_for_arrivals(void* at, int parity, Place place) {
  Thread& thread = *machine.current;
  if (parity != 0 && parity != 1) fail("waits for a phase of parity %d", parity);
  for (;;) {
    Arrivals& a = find(at);
    if (a.phase % 2 == parity) complete(*thread.block, a);
    if (a.phase % 2 != parity) return thread.known.join(a.over);
    a.waiting.push_back(&thread);
    wait_at("wait_for_arrivals", place, nullptr);
    yield();
  }
}

void copy_tile(void* shared, const uint64_t* words, int row, int column, void* done) {
  Thread& thread = *machine.current;
  const uint8_t* const map_at = reinterpret_cast<const uint8_t*>(words);
  const uint8_t* const args = static_cast<const uint8_t*>(machine.launch->args);
  if (map_at < args || map_at + 128 > args + machine.launch->args_bytes || reinterpret_cast<uintptr_t>(map_at) % 64)
    fail("the map of a copy must be an argument at a multiple of 64");
  const TileMap map = {reinterpret_cast<const uint8_t*>(words[0]), static_cast<int64_t>(words[1]),
                       static_cast<int64_t>(words[2]), static_cast<int64_t>(words[3]), static_cast<int>(words[4])};
  if (map.tile_rows < 1 || map.tile_rows > 256 || map.stride % 8 || reinterpret_cast<uintptr_t>(map.data) % 16)
    fail("a map of rows of %d elements in tiles of %d rows", static_cast<int>(map.stride), map.tile_rows);
  uint8_t* const to = static_cast<uint8_t*>(shared);
  check_tile(to, map.tile_rows);
  const int64_t columns = std::min<int64_t>(map.columns - column, 64);
  for (int64_t r = row; columns > 0 && r < std::min<int64_t>(row + map.tile_rows, map.rows); ++r)
    check_global(thread, map.data + (r * map.stride + column) * 2, static_cast<int>(columns * 2), kRead);
  check_shared(thread, to, map.tile_rows * kRowBytes, 16, kWrite);
  send_to_cells(thread, to, map.tile_rows * kRowBytes);
  Arrivals& a = find(done);
  a.tiles.push_back({to, map, row, column});
  a.brought += map.tile_rows * kRowBytes;
  if (!a.pending && a.brought > a.expected)
    fail("%d bytes are brought to arrivals at %s, which expect %d", a.brought, describe(done), a.expected);
  wake(a.waiting);
}

void group_begin(Place place) {
  my_group();
  together("group_begin", place, nullptr, run_begin);
}

void multiply_tiles(float* sums, int columns, const void* a, const void* b, int step, Place place) {
  my_group();
  check_tile(static_cast<const uint8_t*>(a), kGroupTokens);
  check_tile(static_cast<const uint8_t*>(b), columns);
  if (step < 0 || step > 3) fail("columns from %d on of a tile of 64", 16 * step);
  Operands o{sums, {static_cast<const uint8_t*>(a), static_cast<const uint8_t*>(b), columns, step}};
  together("multiply_tiles", place, &o, run_multiply);
}

void group_commit(Place place) {
  my_group();
  together("group_commit", place, nullptr, run_commit);
}

void group_wait(int pending, float* sums, Place place) {
  Warpgroup& group = my_group();
  Thread& thread = *machine.current;
  const int warp = thread.id / 32;
  together("group_wait", place, nullptr, [](void**) {});
  const int runs = std::max(group.issued[warp] - pending, 0);
  while (!are_over(*thread.block, runs)) {
    group.waiting.push_back(&thread);
    wait_at("group_wait", place, nullptr);
    yield();
  }
  thread.known.runs = std::max(thread.known.runs, static_cast<uint16_t>(runs));
  if (!thread.num_sums) return;
  check_sums(thread, sums);
  if (runs < group.issued[warp] || group.open[warp]) return;
  std::memcpy(sums, thread.sums, 4 * thread.num_sums);
  thread.num_sums = 0;
}

void check_leaving_thread(const Thread& thread) {
  if (thread.num_sums) fail("leaves while a product of its warpgroup is on its way");
}
void check_leaving_copies(const Block& block) {
  for (const Arrivals& a : block.arrivals)
    if (!a.tiles.empty()) fail("leaves while a tile is on its way to %s", describe(a.tiles[0].to));
}

}  // namespace emu
