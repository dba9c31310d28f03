// The machine: what a launch consists of, and what each part of the runtime offers to the others.
//
// One cluster runs at a time, each of its threads on a fiber of its own. A fiber runs until it waits: at a barrier, or
// at an instruction that a whole warp executes. Who runs next is drawn from the seed of the launch, and a warp runs as
// far as it can before another does, so that warps drift apart as far as the kernel lets them.
//
// Kernels are compiled for the compiler's thread sanitizer, but its calls land in hooks.cpp: every load and store is
// checked for bounds, alignment and races. Races are judged by what orders two accesses, which is barriers (and, of what
// warpgroup.cpp does, arrivals), and not by what happened: one run finds them whatever its order was.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "machine.h"

namespace emu {

constexpr int kStackBytes = 64 << 10;

// What Python passes; emulator/__init__.py has the same.
struct Region {
  const uint8_t* begin;
  int64_t bytes;
  const char* name;
  int32_t writable;
  int32_t dependent;  // written by the kernel before, so not to be touched before wait_for_previous_kernel
};
struct Launch {
  const char* kernel;
  const void* args;
  int64_t args_bytes;
  const Region* regions;
  int32_t num_regions, grid_x, grid_y, threads, shared_bytes, cluster, warp;
  uint32_t seed;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, room, group;
};

// What somebody knows to be over: phases of each of the block's arrivals, and runs of products of its warpgroup.
constexpr int kMostArrivals = 32;
struct Known {
  uint16_t phases[kMostArrivals];
  uint16_t runs;
  void join(const Known& other);
};

// A bf16 matrix as the tests put it into the words of a TensorMap: address, rows, columns, elements from row to row, rows
// of a tile. GPUs keep it in a form of their own.
struct TileMap {
  const uint8_t* data;
  int64_t rows, columns, stride;
  int tile_rows;
};
struct TileCopy {
  uint8_t* to;
  TileMap map;
  int row, column;
};

struct Thread;
struct Arrivals {
  const uint8_t* at;
  int by;              // the thread that has made them
  int count, pending;  // of a phase; that are missing
  int expected, brought;  // bytes of this phase
  uint16_t phase;      // those before it are over
  bool ready;
  Known told, over;    // by who has arrived; what is known once the phases before this one are over
  std::vector<TileCopy> tiles;  // on their way
  std::vector<Thread*> waiting;
};

struct Multiply {
  const uint8_t *a, *b;
  int columns, step;
  bool operator==(const Multiply& other) const;
};
struct Run {
  std::vector<Multiply> multiplies;
  int committed;  // warps that have
};
struct Warpgroup {  // the first 128 threads of a block
  std::vector<Run> runs;
  int over;       // runs that have been computed
  int issued[4];  // runs that a warp has committed
  int open[4];    // products of the run that it has begun
  std::vector<Thread*> waiting;
};

struct Block;
struct Thread {
  jmp_buf context;
  int id;
  Block* block;
  const char* waits_at;  // what it waits for, or null
  Place place;
  void* operands;  // of the instruction that the warp executes together
  bool done, waited;
  std::vector<Copy> copies;  // not done yet
  int group;  // that the next commit closes
  Known known;
  float sums[64];  // that products on their way add to
  float* sums_at;
  int num_sums;     // 0 for none
  bool begun;       // a run of products
  bool started;     // a meeting of the cluster
  const uint8_t* stack;
};

struct Warp {
  uint64_t ready;  // lanes that can run
  int arrived;     // lanes that wait at a common instruction
  int barriers;    // that the warp has had alone
};

// What is known about two bytes of shared memory. Threads are counted from 1, barriers of blocks and clusters too.
struct SharedCell {
  uint16_t writer, write_barrier, write_cluster_barrier;
  uint16_t reader;  // since the last barrier: a thread, or kLanes + warp for some of its lanes, or kSeveral
  uint16_t read_barrier;
  uint16_t remote_read, remote_write;  // cluster barrier of the last access from another block
  uint16_t read_cluster_barrier;       // and from the block itself
  uint16_t in_flight;    // a copy is on its way, and this thread started it
  uint16_t write_warp_barrier, read_warp_barrier;  // of the writer's and the reader's warp
  uint16_t tile, tile_phase;  // brought by the copy engine: which arrivals, counted from 1, and which phase tell so
  uint16_t run;               // the last run of products that reads it
  bool counts;                // part of arrivals
};
constexpr uint16_t kLanes = 0x8000, kSeveral = 0xffff;

struct Block {
  int x, y, rank, index;
  int arrived, left, barriers;
  bool waited;  // some thread of it, for the kernel before
  int remote_reads_at;  // meeting of the cluster at the last access from another block, 0 for never
  uint8_t* shared;
  Thread* threads;
  Warp* warps;
  std::vector<SharedCell> cells;
  std::vector<Arrivals> arrivals;
  Warpgroup group;
};

struct Machine {
  const Launch* launch;
  std::vector<Block> blocks;  // of the running cluster
  Thread* current;
  int cluster_barriers, cluster_meetings, cluster_arrived;  // barriers, with those that order nothing, threads at the next one
};
extern Machine machine;

// launch.cpp
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();
void wait_at(const char* what, Place place, void* operands);
void release(Thread& thread);
// Wait until all lanes of the warp are here; the last one runs `work` with the operands of each.
void together(const char* what, Place place, void* operands, void (*work)(void** lanes));

// memory.cpp
enum Access { kRead, kWrite };
void prepare_memory(const Launch& launch);
void prepare_block(Block& block);
void check_access(Thread& thread, const void* p, int bytes, int alignment, Access access);
void check_shared(Thread& thread, const void* p, int bytes, int alignment, Access access);
void check_global(Thread& thread, const uint8_t* p, int bytes, Access access);
void check_leaving(const Block& block);
const char* describe(const void* p);  // where an address is, in words
// What becomes of bytes of shared memory: eight that count arrivals, and who may; some that a tile will arrive in; sixteen
// that it has arrived in; sixteen that a run of products of a warp reads.
void start_counter(Block& block, const void* at);
void check_counter(Thread& thread, const void* at);
void send_to_cells(Thread& thread, const void* to, int bytes);
void arrive_in_cells(Block& block, const void* to, uint16_t arrivals, uint16_t phase);
void multiply_cells(Block& block, int warp, const void* from, uint16_t run);

// warpgroup.cpp
void check_leaving_thread(const Thread& thread);
void check_leaving_copies(const Block& block);

}  // namespace emu
