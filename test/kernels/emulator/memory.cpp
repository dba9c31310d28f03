// What is known about every byte that a kernel may touch, and the checks of each access.
#include <cstdio>
#include <cstring>

#include "runtime.h"

// The first and the last byte of this library, whose constants a kernel may read.
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));
extern "C" const char _end __attribute__((visibility("hidden")));

namespace emu {
namespace {

// What is known about two bytes of a global array that is written: who did so, and who read it. Threads and blocks are
// counted from 1; kSeveral stands for more than one.
struct GlobalCell {
  int32_t writer_block, reader_block;
  uint16_t writer, write_barrier, reader, read_barrier;
};

struct Array {
  Region region;
  std::vector<GlobalCell> cells;
};
std::vector<Array> arrays;
Array* last_used;

const char* verb(Access access) { return access == kRead ? "reads" : "writes"; }

int64_t distance(const Region& region, const uint8_t* p) {
  const uint8_t* const end = region.begin + region.bytes;
  return p < region.begin ? region.begin - p : p < end ? 0 : p - end + 1;
}

Array* nearest(const uint8_t* p) {
  Array* best = nullptr;
  for (Array& array : arrays)
    if (!best || distance(array.region, p) < distance(best->region, p)) best = &array;
  return best;
}

Array& find(const uint8_t* p, int bytes, Access access) {
  if (last_used && p >= last_used->region.begin && p + bytes <= last_used->region.begin + last_used->region.bytes)
    return *last_used;
  Array* const array = nearest(p);
  if (!array || distance(array->region, p) || p + bytes > array->region.begin + array->region.bytes)
    fail("%s %d bytes at %s", verb(access), bytes, describe(p));
  last_used = array;
  return *array;
}

// ---- global memory -------------------------------------------------------------------------------------------------

bool is_ordered(const Thread& thread, int32_t block, uint16_t other, uint16_t barrier) {
  if (block == 0) return true;
  if (block != thread.block->index + 1) return false;
  return other == thread.id + 1 || barrier != thread.block->barriers;
}

void note_read(Thread& thread, GlobalCell& cell) {
  const int32_t block = thread.block->index + 1;
  const uint16_t me = static_cast<uint16_t>(thread.id + 1), barrier = static_cast<uint16_t>(thread.block->barriers);
  if (cell.reader_block && cell.reader_block != block) {
    cell.reader_block = -1;
    return;
  }
  cell.reader = cell.reader_block && cell.read_barrier == barrier && cell.reader != me ? kSeveral : me;
  cell.reader_block = block;
  cell.read_barrier = barrier;
}

}  // namespace

void check_global(Thread& thread, const uint8_t* p, int bytes, Access access) {
  Array& array = find(p, bytes, access);
  if (array.region.dependent && !thread.waited)
    fail("%s %s before wait_for_previous_kernel", verb(access), describe(p));
  if (!array.region.writable) {
    if (access == kWrite) fail("writes %s, which is not to be written", describe(p));
    return;
  }
  const int64_t first = (p - array.region.begin) / 2, last = (p + bytes - 1 - array.region.begin) / 2;
  for (int64_t i = first; i <= last; ++i) {
    GlobalCell& cell = array.cells[i];
    if (!is_ordered(thread, cell.writer_block, cell.writer, cell.write_barrier))
      fail("race: %s %s, which thread %d of block number %d writes", verb(access), describe(p), cell.writer - 1,
           cell.writer_block - 1);
    if (access == kRead) {
      note_read(thread, cell);
    } else {
      if (!is_ordered(thread, cell.reader_block, cell.reader, cell.read_barrier))
        fail("race: writes %s, which another thread reads", describe(p));
      cell.writer_block = thread.block->index + 1;
      cell.writer = static_cast<uint16_t>(thread.id + 1);
      cell.write_barrier = static_cast<uint16_t>(thread.block->barriers);
    }
  }
}

// ---- shared memory -------------------------------------------------------------------------------------------------

namespace {

int warp_number(const Thread& thread) { return thread.id / machine.launch->warp; }
uint16_t warp_barriers(const Thread& thread) {
  return static_cast<uint16_t>(thread.block->warps[warp_number(thread)].barriers);
}

// Whether a barrier lies between what `other` did (a thread or more, see SharedCell) and what this thread does.
bool is_behind(const Thread& thread, uint16_t other, uint16_t barrier, uint16_t warp_barrier) {
  if (barrier != static_cast<uint16_t>(thread.block->barriers) || other == thread.id + 1) return true;
  const int warp = other >= kLanes ? other - kLanes : (other - 1) / machine.launch->warp;
  return warp == warp_number(thread) && warp_barrier != warp_barriers(thread);
}

void note_read(const Thread& thread, SharedCell& cell) {
  const int warp = warp_number(thread), size = machine.launch->warp;
  const bool lanes = cell.reader == kLanes + warp || (cell.reader < kLanes && (cell.reader - 1) / size == warp);
  if (is_behind(thread, cell.reader, cell.read_barrier, cell.read_warp_barrier))
    cell.reader = static_cast<uint16_t>(thread.id + 1);
  else
    cell.reader = static_cast<uint16_t>(lanes ? kLanes + warp : kSeveral);
  cell.read_barrier = static_cast<uint16_t>(thread.block->barriers);
  cell.read_warp_barrier = warp_barriers(thread);
  cell.read_cluster_barrier = static_cast<uint16_t>(machine.cluster_barriers);
}

void check_cell(Thread& thread, SharedCell& cell, const uint8_t* p, Access access) {
  if (cell.in_flight)
    fail("%s %s while a copy that thread %d started is on its way", verb(access), describe(p), cell.in_flight - 1);
  if (cell.counts) fail("%s %s, which counts arrivals", verb(access), describe(p));
  if (cell.tile && thread.known.phases[cell.tile - 1] < cell.tile_phase)
    fail("race: %s %s, whose copy this thread has not waited for", verb(access), describe(p));
  if (access == kWrite && cell.run > thread.known.runs)
    fail("race: writes %s, which a product that this thread has not waited for reads", describe(p));
  if (access == kRead && !cell.write_barrier) fail("reads %s, which nobody has written", describe(p));
  if (cell.remote_write == machine.cluster_barriers)
    fail("race: %s %s, which another block writes with no cluster barrier between", verb(access), describe(p));
  if (!cell.tile && !is_behind(thread, cell.writer, cell.write_barrier, cell.write_warp_barrier))
    fail("race: %s %s, which thread %d writes with no barrier between", verb(access), describe(p), cell.writer - 1);
  if (access == kRead) return note_read(thread, cell);
  if (!is_behind(thread, cell.reader, cell.read_barrier, cell.read_warp_barrier))
    fail("race: writes %s, which %s reads with no barrier between", describe(p),
         cell.reader >= kLanes ? "more than one thread" : "another thread");
  if (cell.remote_read == machine.cluster_barriers)
    fail("race: writes %s, which another block reads with no cluster barrier between", describe(p));
  cell.writer = static_cast<uint16_t>(thread.id + 1);
  cell.write_barrier = static_cast<uint16_t>(thread.block->barriers);
  cell.write_warp_barrier = warp_barriers(thread);
  cell.write_cluster_barrier = static_cast<uint16_t>(machine.cluster_barriers);
  cell.tile = cell.run = 0;
}

SharedCell* cells_of(Block& block, const void* p) {
  return &block.cells[(static_cast<const uint8_t*>(p) - block.shared) / 2];
}

void check_alignment(const void* p, int alignment, Access access) {
  if (reinterpret_cast<uintptr_t>(p) % alignment)
    fail("misaligned: %s %s, which is not a multiple of %d", verb(access), describe(p), alignment);
}

bool is_shared(const Block& block, const void* p) {
  const uint8_t* const byte = static_cast<const uint8_t*>(p);
  return byte >= block.shared - 128 && byte < block.shared + machine.launch->shared_bytes + 128;
}

// The block in whose shared memory an address is, or else this one if it is not far.
const Block* block_near(const uint8_t* p) {
  for (const Block& block : machine.blocks)
    if (p >= block.shared && p < block.shared + machine.launch->shared_bytes) return &block;
  const Block* const mine = machine.current ? machine.current->block : nullptr;
  constexpr int kFar = 64 << 10;
  const bool near = mine && p >= mine->shared - kFar && p < mine->shared + machine.launch->shared_bytes + kFar;
  return near ? mine : nullptr;
}

void finish(Thread& thread, const Copy& copy) {
  SharedCell* const cells = cells_of(*thread.block, copy.to);
  for (int i = 0; i < copy.room / 2; ++i) cells[i].in_flight = 0;
  check_shared(thread, copy.to, copy.room, copy.room, kWrite);
  std::memset(copy.to, 0, copy.room);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

const char* describe(const void* address) {
  static char text[200];
  const uint8_t* const p = static_cast<const uint8_t*>(address);
  const Array* const array = nearest(p);
  if (const Block* const block = array && !distance(array->region, p) ? nullptr : block_near(p))
    std::snprintf(text, sizeof text, "byte %td of %d of shared memory%s", p - block->shared,
                  machine.launch->shared_bytes,
                  machine.current && block != machine.current->block ? " of another block" : "");
  else if (!p || !array || distance(array->region, p) > 1 << 20)
    std::snprintf(text, sizeof text, "address %p, which is nowhere near an array", address);
  else
    std::snprintf(text, sizeof text, "byte %td of %td of %s", p - array->region.begin,
                  static_cast<ptrdiff_t>(array->region.bytes), array->region.name);
  return text;
}

void prepare_memory(const Launch& launch) {
  arrays.clear();
  last_used = nullptr;
  for (int i = 0; i < launch.num_regions; ++i) {
    const Region& region = launch.regions[i];
    arrays.push_back({region, std::vector<GlobalCell>(region.writable ? region.bytes / 2 + 1 : 0)});
  }
  arrays.push_back({{static_cast<const uint8_t*>(launch.args), launch.args_bytes, "args", 0, 0}, {}});
  arrays.push_back({{reinterpret_cast<const uint8_t*>(&__ehdr_start), &_end - &__ehdr_start, "the library", 0, 0}, {}});
}

void prepare_block(Block& block) {
  std::memset(block.shared - 128, 0xff, machine.launch->shared_bytes + 128);  // NaN in every format
  block.cells.assign(machine.launch->shared_bytes / 2 + 1, SharedCell{});
  block.arrivals.clear();
  block.group = {};
}

void check_shared(Thread& thread, const void* p, int bytes, int alignment, Access access) {
  const uint8_t* const byte = static_cast<const uint8_t*>(p);
  if (byte < thread.block->shared || byte + bytes > thread.block->shared + machine.launch->shared_bytes)
    fail("%s %d bytes at %s", verb(access), bytes, describe(p));
  check_alignment(p, alignment, access);
  SharedCell* const cells = cells_of(*thread.block, p);
  for (int i = 0; i < (bytes + 1) / 2; ++i) check_cell(thread, cells[i], byte + 2 * i, access);
}

void check_access(Thread& thread, const void* p, int bytes, int alignment, Access access) {
  const uint8_t* const byte = static_cast<const uint8_t*>(p);
  if (byte >= thread.stack && byte < thread.stack + kStackBytes) return;
  for (const Block& block : machine.blocks)
    if (is_shared(block, p)) return check_shared(thread, p, bytes, alignment, access);
  check_alignment(p, alignment, access);
  check_global(thread, byte, bytes, access);
}

void check_vector(const void* p) { check_alignment(p, 16, kRead); }

// ---- copies --------------------------------------------------------------------------------------------------------

void check_copy(const void* shared, const void* global, int bytes, int room) {
  if (bytes < 0 || bytes > room || bytes % 2) fail("async_copy%d of %d bytes", room, bytes);
  check_alignment(shared, room, kWrite);
  check_alignment(global, room, kRead);
}

// The source is read when the thread waits, at the latest moment; touching either end in between is an error at any.
void copy_async(void* shared, const void* global, int bytes, int room) {
  Thread& thread = *machine.current;
  if (bytes) check_global(thread, static_cast<const uint8_t*>(global), bytes, kRead);
  check_shared(thread, shared, room, room, kWrite);
  SharedCell* const cells = cells_of(*thread.block, shared);
  for (int i = 0; i < room / 2; ++i) cells[i].in_flight = static_cast<uint16_t>(thread.id + 1);
  thread.copies.push_back({shared, global, bytes, room, thread.group});
}
void commit_copies() { ++machine.current->group; }
void wait_for_copies(int pending) {
  Thread& thread = *machine.current;
  size_t done = 0;
  while (done < thread.copies.size() && thread.copies[done].group < thread.group - pending)
    finish(thread, thread.copies[done++]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(done));
}

// ---- tiles and products --------------------------------------------------------------------------------------------

void start_counter(Block& block, const void* at) {
  for (int i = 0; i < 4; ++i) cells_of(block, at)[i].counts = true;
}
void check_counter(Thread& thread, const void* at) {
  const SharedCell& cell = *cells_of(*thread.block, at);
  if (!is_behind(thread, cell.writer, cell.write_barrier, cell.write_warp_barrier))
    fail("race: uses arrivals at %s, which thread %d makes with no barrier between", describe(at), cell.writer - 1);
}
void send_to_cells(Thread& thread, const void* to, int bytes) {
  for (int i = 0; i < bytes / 2; ++i) cells_of(*thread.block, to)[i].in_flight = static_cast<uint16_t>(thread.id + 1);
}
void arrive_in_cells(Block& block, const void* to, uint16_t arrivals, uint16_t phase) {
  for (int i = 0; i < 8; ++i) {
    SharedCell& cell = cells_of(block, to)[i];
    cell.in_flight = 0;
    cell.tile = static_cast<uint16_t>(arrivals + 1);
    cell.tile_phase = phase;
  }
}
void multiply_cells(Block& block, int warp, const void* from, uint16_t run) {
  const Thread* const lanes = block.threads + warp * machine.launch->warp;
  const uint8_t* const byte = static_cast<const uint8_t*>(from);
  for (int i = 0; i < 8; ++i) {
    SharedCell& cell = cells_of(block, from)[i];
    if (cell.in_flight) fail("multiplies %s while a copy is on its way", describe(byte + 2 * i));
    if (!cell.tile) fail("multiplies %s, which no copy has brought", describe(byte + 2 * i));
    if (i && cell.tile == (&cell)[-1].tile && cell.tile_phase == (&cell)[-1].tile_phase) continue;
    for (int lane = 0; lane < machine.launch->warp; ++lane)
      if (lanes[lane].known.phases[cell.tile - 1] < cell.tile_phase)
        fail("race: multiplies %s, whose copy thread %d has not waited for", describe(byte + 2 * i), lanes[lane].id);
  }
  for (int i = 0; i < 8; ++i) cells_of(block, from)[i].run = run;
}

// ---- clusters ------------------------------------------------------------------------------------------------------

void read_cluster(void* value, const void* shared, int rank, int bytes) {
  Thread& thread = *machine.current;
  if (rank < 0 || rank >= machine.launch->cluster)
    fail("reads block %d of a cluster of %d", rank, machine.launch->cluster);
  if (rank == thread.block->rank) {
    check_shared(thread, shared, bytes, bytes, kRead);
    std::memcpy(value, shared, bytes);
    return;
  }
  Block& block = machine.blocks[rank];
  const ptrdiff_t offset = static_cast<const uint8_t*>(shared) - thread.block->shared;
  const uint8_t* const place = block.shared + offset;
  if (offset < 0 || offset + bytes > machine.launch->shared_bytes) fail("reads %d bytes at %s", bytes, describe(place));
  check_alignment(place, bytes, kRead);
  if (block.left == machine.launch->threads)
    fail("reads shared memory of block %d of its cluster, which has left", rank);
  block.remote_reads_at = machine.cluster_meetings;
  for (int i = 0; i < bytes / 2; ++i) {
    SharedCell& cell = cells_of(block, place)[i];
    if (!cell.write_barrier) fail("reads %s, which nobody has written", describe(place));
    if (cell.in_flight || cell.write_cluster_barrier == machine.cluster_barriers)
      fail("race: reads %s, written with no cluster barrier between", describe(place));
    cell.remote_read = static_cast<uint16_t>(machine.cluster_barriers);
  }
  std::memcpy(value, place, bytes);
}

void write_cluster(void* shared, int rank, const void* value, int bytes) {
  Thread& thread = *machine.current;
  if (rank < 0 || rank >= machine.launch->cluster)
    fail("writes block %d of a cluster of %d", rank, machine.launch->cluster);
  if (rank == thread.block->rank) {
    check_shared(thread, shared, bytes, bytes, kWrite);
    std::memcpy(shared, value, bytes);
    return;
  }
  Block& block = machine.blocks[rank];
  const ptrdiff_t offset = static_cast<uint8_t*>(shared) - thread.block->shared;
  uint8_t* const place = block.shared + offset;
  if (offset < 0 || offset + bytes > machine.launch->shared_bytes) fail("writes %d bytes at %s", bytes, describe(place));
  check_alignment(place, bytes, kWrite);
  if (machine.cluster_meetings == 1)
    fail("writes shared memory of block %d of its cluster, which may not have started", rank);
  if (block.left) fail("writes shared memory of block %d of its cluster, which has left", rank);
  block.remote_reads_at = machine.cluster_meetings;
  const uint16_t now = static_cast<uint16_t>(machine.cluster_barriers);
  for (int i = 0; i < bytes / 2; ++i) {
    SharedCell& cell = cells_of(block, place)[i];
    if (cell.in_flight || cell.remote_write == now || cell.remote_read == now ||
        (cell.write_barrier && cell.write_cluster_barrier == now) || cell.read_cluster_barrier == now)
      fail("race: writes %s, which somebody else uses with no cluster barrier between", describe(place));
    cell.remote_write = now;
    cell.writer = 0;
    cell.tile = cell.run = 0;
    cell.write_barrier = static_cast<uint16_t>(block.barriers);
    cell.write_cluster_barrier = now;
  }
  std::memcpy(place, value, bytes);
}

void check_leaving(const Block& block) {
  check_leaving_copies(block);
  if (!block.waited) fail("leaves without wait_for_previous_kernel: the kernel after this one would not wait either");
  if (block.remote_reads_at == machine.cluster_meetings)
    fail("leaves while another block may still use its shared memory");
}

}  // namespace emu
