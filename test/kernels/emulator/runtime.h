// The machine: what a launch consists of, and what each part of the runtime offers to the others.
//
// One cluster runs at a time, each of its threads on a fiber of its own. A fiber runs until it waits: at a barrier, or
// at an instruction that a whole warp executes. Who runs next is drawn from the seed of the launch, and a warp runs as
// far as it can before another does, so that warps drift apart as far as the kernel lets them.
//
// Kernels are compiled for the compiler's thread sanitizer, but its calls land in hooks.cpp: every load and store is
// checked for bounds, alignment and races. Races are judged by what orders two accesses, which is barriers alone, and
// not by what happened: one run finds them whatever its order was.
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
  int bytes, group;
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
};
constexpr uint16_t kLanes = 0x8000, kSeveral = 0xffff;

struct Block {
  int x, y, rank, index;
  int arrived, left, barriers;
  bool waited;  // some thread of it, for the kernel before
  int remote_reads_at;  // cluster barrier of the last access from another block, 0 for never
  uint8_t* shared;
  Thread* threads;
  Warp* warps;
  std::vector<SharedCell> cells;
};

struct Machine {
  const Launch* launch;
  std::vector<Block> blocks;  // of the running cluster
  Thread* current;
  int cluster_barriers, cluster_arrived;
};
extern Machine machine;

// launch.cpp
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void yield();
void release(Thread& thread);
// Wait until all lanes of the warp are here; the last one runs `work` with the operands of each.
void together(const char* what, Place place, void* operands, void (*work)(void** lanes));

// memory.cpp
enum Access { kRead, kWrite };
void prepare_memory(const Launch& launch);
void prepare_block(Block& block);
void check_access(Thread& thread, const void* p, int bytes, int alignment, Access access);
void check_shared(Thread& thread, const void* p, int bytes, int alignment, Access access);
void check_leaving(const Block& block);
const char* describe(const void* p);  // where an address is, in words

}  // namespace emu
