// Fibers, the order in which they run, barriers, and the launch itself.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "runtime.h"

namespace emu {

Machine machine;

namespace {

struct Bounds {  // of what the vendors allow a block
  int threads, shared_bytes, cluster;
};
constexpr Bounds kCuda = {1024, 227 << 10, 8}, kHip = {1024, 64 << 10, 1};

jmp_buf scheduler, escape;
char* error_text;
int error_size;
std::vector<Thread> fibers;  // of earlier launches too; empty after a failure, whose fibers never come back
std::vector<Warp> warps;
void (*kernel)(const void*);
uint64_t random_state;

uint32_t draw(uint32_t below) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((random_state >> 33) % below);
}

Warp& warp_of(const Thread& thread) { return thread.block->warps[thread.id / machine.launch->warp]; }
uint64_t lane_bit(const Thread& thread) { return uint64_t{1} << thread.id % machine.launch->warp; }

// ---- fibers --------------------------------------------------------------------------------------------------------

void leave() {
  Block& block = *machine.current->block;
  check_leaving_thread(*machine.current);
  machine.current->done = true;
  if (++block.left == machine.launch->threads) check_leaving(block);
  warp_of(*machine.current).ready &= ~lane_bit(*machine.current);
  yield();
}

void fiber_main() {
  for (;;) {
    kernel(machine.launch->args);
    leave();
  }
}

// A fiber stops in the scheduler as soon as it has a stack of its own, with a page below that nobody may touch.
void make_fiber(Thread& thread) {
  void* const memory = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks of %d threads", machine.launch->threads);
  mprotect(memory, 4096, PROT_NONE);
  thread.stack = static_cast<uint8_t*>(memory) + 4096;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = const_cast<uint8_t*>(thread.stack);
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, [] { yield(); fiber_main(); }, 0);
  machine.current = &thread;
  if (_setjmp(scheduler) == 0) setcontext(&start);
}

void free_fibers() {
  for (const Thread& thread : fibers)
    if (thread.stack) munmap(const_cast<uint8_t*>(thread.stack) - 4096, kStackBytes + 4096);
  fibers.clear();
}

// ---- the scheduler -------------------------------------------------------------------------------------------------

// Run the warp until none of its lanes can.
void run_warp(Thread* lanes, Warp& warp) {
  while (warp.ready) {
    const int first = static_cast<int>(draw(64));
    const uint64_t turned = warp.ready >> first | warp.ready << (64 - first) % 64;
    machine.current = &lanes[(first + __builtin_ctzll(turned)) % 64];
    if (_setjmp(scheduler) == 0) _longjmp(machine.current->context, 1);
  }
}

[[noreturn]] void report_deadlock() {
  const Thread* waiting = nullptr;
  int count = 0, left = 0;
  const Thread* other = nullptr;
  for (const Block& block : machine.blocks)
    for (int i = 0; i < machine.launch->threads; ++i) {
      const Thread& t = block.threads[i];
      left += t.done;
      if (t.done) continue;
      if (!waiting) waiting = &t;
      if (std::strcmp(t.waits_at, waiting->waits_at) || t.place.line != waiting->place.line)
        other = &t;
      else
        ++count;
    }
  machine.current = nullptr;
  char more[200] = "";
  if (other)
    std::snprintf(more, sizeof more, ", others at %s (%s:%d)", other->waits_at, other->place.file, other->place.line);
  fail("deadlock: %d threads wait at %s (%s:%d)%s; %d have left", count, waiting->waits_at, waiting->place.file,
       waiting->place.line, more, left);
}

void run_cluster() {
  const int warps_each = machine.launch->threads / machine.launch->warp;
  for (;;) {
    int left = 0, runnable = 0, chosen = -1;
    for (const Block& block : machine.blocks) left += block.left;
    for (int i = 0; i < static_cast<int>(warps.size()); ++i)
      if (warps[i].ready && draw(++runnable) == 0) chosen = i;
    if (chosen < 0 && left == machine.launch->threads * machine.launch->cluster) return;
    if (chosen < 0) report_deadlock();
    Block& block = machine.blocks[chosen / warps_each];
    run_warp(block.threads + chosen % warps_each * machine.launch->warp, warps[chosen]);
  }
}

// Whether `other` waits at the same place of the kernel as this thread.
bool is_with(const Thread& other) {
  const Thread& me = *machine.current;
  return other.waits_at == me.waits_at && other.place.line == me.place.line && other.place.file == me.place.file;
}

// After a barrier everyone knows what one of them knew.
void share_knowledge(Block& block, int first, int count) {
  if (block.arrivals.empty()) return;
  Known all = {};
  for (int i = first; i < first + count; ++i) all.join(block.threads[i].known);
  for (int i = first; i < first + count; ++i) block.threads[i].known = all;
}

void check_all_are_here(const Block& block) {
  for (int i = 0; i < machine.launch->threads; ++i)
    if (!is_with(block.threads[i]))
      fail("divergence at %s (%s:%d): thread %d is at line %d", machine.current->waits_at, machine.current->place.file,
           machine.current->place.line, i, block.threads[i].place.line);
}
void release_block(Block& block) {
  check_all_are_here(block);
  block.arrived = 0;
  ++block.barriers;
  bool waited = false;
  for (int i = 0; i < machine.launch->threads; ++i) waited |= block.threads[i].waited;
  for (int i = 0; i < machine.launch->threads; ++i) block.threads[i].waited = waited;
  share_knowledge(block, 0, machine.launch->threads);
}
void wake_block(Block& block) {
  for (int i = 0; i < machine.launch->threads; ++i) release(block.threads[i]);
}
// Whether this thread is the last one; the others wait.
bool meet_cluster(const char* what, Place place) {
  wait_at(what, place, nullptr);
  if (++machine.cluster_arrived < machine.launch->threads * machine.launch->cluster) {
    yield();
    return false;
  }
  machine.cluster_arrived = 0;
  ++machine.cluster_meetings;
  return true;
}

// ---- the launch ----------------------------------------------------------------------------------------------------

// Room for the shared memory of a block and a gap before it, in which nobody may write. Aligned to 128 and no more.
size_t shared_room(const Launch& launch) { return (launch.shared_bytes + 127) / 128 * 128 + 128; }

void place_cluster(const Launch& launch, int index, uint8_t* shared) {
  const int warps_each = launch.threads / launch.warp, clusters_x = launch.grid_x / launch.cluster;
  machine.cluster_barriers = machine.cluster_meetings = 1;
  machine.cluster_arrived = 0;
  for (int rank = 0; rank < launch.cluster; ++rank) {
    Block& block = machine.blocks[rank];
    block.x = index % clusters_x * launch.cluster + rank;
    block.y = index / clusters_x;
    block.rank = rank;
    block.index = block.y * launch.grid_x + block.x;
    block.arrived = block.left = block.remote_reads_at = 0;
    block.barriers = 1;
    block.waited = false;
    for (int i = 0; i < warps_each; ++i) warps[rank * warps_each + i].barriers = 0;
    block.shared = shared + rank * shared_room(launch) + 128;
    block.threads = &fibers[rank * launch.threads];
    block.warps = &warps[rank * warps_each];
    prepare_block(block);
    for (int i = 0; i < launch.threads; ++i) {
      Thread& thread = block.threads[i];
      thread.id = i;
      thread.block = &block;
      thread.done = thread.waited = false;
      thread.copies.clear();
      thread.group = 0;
      thread.known = {};
      thread.num_sums = 0;
      thread.begun = thread.started = false;
      release(thread);
    }
  }
}

void check_launch(const Launch& launch) {
  const Bounds& bounds = launch.warp == 64 ? kHip : kCuda;
  if (launch.threads < 1 || launch.threads > bounds.threads || launch.threads % launch.warp)
    fail("launched with %d threads; whole warps of %d, at most %d", launch.threads, launch.warp, bounds.threads);
  if (launch.shared_bytes < 0 || launch.shared_bytes > bounds.shared_bytes)
    fail("launched with %d bytes of shared memory of %d", launch.shared_bytes, bounds.shared_bytes);
  if (launch.cluster < 1 || launch.cluster > bounds.cluster || launch.grid_x % launch.cluster)
    fail("launched with clusters of %d, at most %d, over %d blocks", launch.cluster, bounds.cluster, launch.grid_x);
  if (launch.grid_x < 1 || launch.grid_y < 1) fail("launched with a grid of %d x %d", launch.grid_x, launch.grid_y);
}

void run_launch(const Launch& launch) {
  check_launch(launch);
  prepare_memory(launch);
  const int threads = launch.threads * launch.cluster;
  machine.blocks.resize(launch.cluster);
  warps.assign(threads / launch.warp, Warp{});
  if (static_cast<int>(fibers.size()) < threads) {
    free_fibers();
    fibers.resize(threads);
    for (Thread& thread : fibers) make_fiber(thread);
  }
  static std::vector<uint8_t> shared;
  shared.resize(launch.cluster * shared_room(launch) + 256);
  uint8_t* const aligned = shared.data() + (-reinterpret_cast<uintptr_t>(shared.data()) & 127);
  std::vector<int> order(launch.grid_x / launch.cluster * launch.grid_y);
  for (int i = 0; i < static_cast<int>(order.size()); ++i) {
    order[i] = i;
    std::swap(order[i], order[draw(i + 1)]);
  }
  for (const int index : order) {
    place_cluster(launch, index, aligned);
    run_cluster();
  }
}

void on_fault(int, siginfo_t* info, void*) { fail("touches %s", describe(info->si_addr)); }

}  // namespace

// ---- what the other parts use --------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  int used = std::snprintf(error_text, error_size, "%s", machine.launch->kernel);
  if (const Thread* t = machine.current)
    used += std::snprintf(error_text + used, error_size - used, ", block (%d, %d), thread %d", t->block->x, t->block->y,
                          t->id);
  used += std::snprintf(error_text + used, error_size - used, ": ");
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text + used, error_size - used, format, values);
  va_end(values);
  _longjmp(escape, 1);
}

void yield() {
  if (_setjmp(machine.current->context) == 0) _longjmp(scheduler, 1);
}

void wait_at(const char* what, Place place, void* operands) {
  Thread& thread = *machine.current;
  thread.waits_at = what;
  thread.place = place;
  thread.operands = operands;
  warp_of(thread).ready &= ~lane_bit(thread);
}

void release(Thread& thread) {
  thread.waits_at = nullptr;
  warp_of(thread).ready |= lane_bit(thread);
}

void together(const char* what, Place place, void* operands, void (*work)(void** lanes)) {
  Thread& thread = *machine.current;
  Warp& warp = warp_of(thread);
  const int size = machine.launch->warp;
  wait_at(what, place, operands);
  if (++warp.arrived < size) return yield();
  warp.arrived = 0;
  Thread* const lanes = thread.block->threads + thread.id / size * size;
  void* all[64];
  for (int i = 0; i < size; ++i) {
    if (!is_with(lanes[i]))
      fail("divergence: lane %d is at %s (%s:%d), this one at %s (%s:%d)", i, lanes[i].waits_at, lanes[i].place.file,
           lanes[i].place.line, what, place.file, place.line);
    all[i] = lanes[i].operands;
  }
  work(all);
  for (int i = 0; i < size; ++i) release(lanes[i]);
}

void barrier(Place place) {
  Block& block = *machine.current->block;
  wait_at("barrier", place, nullptr);
  if (++block.arrived < machine.launch->threads) return yield();
  release_block(block);
  wake_block(block);
}

void warp_barrier(Place place) {
  together("warp_barrier", place, nullptr, [](void**) {
    Thread& thread = *machine.current;
    const int size = machine.launch->warp;
    Thread* const lanes = thread.block->threads + thread.id / size * size;
    bool waited = false;
    for (int i = 0; i < size; ++i) waited |= lanes[i].waited;
    for (int i = 0; i < size; ++i) lanes[i].waited = waited;
    ++warp_of(thread).barriers;
    share_knowledge(*thread.block, thread.id / size * size, size);
  });
}

void cluster_barrier(Place place) {
  if (machine.current->started) fail("cluster_barrier before the cluster_started of a cluster_start");
  if (!meet_cluster("cluster_barrier", place)) return;
  ++machine.cluster_barriers;
  for (Block& block : machine.blocks) release_block(block);
  for (Block& block : machine.blocks) wake_block(block);
}
void cluster_start() {
  if (machine.current->started) fail("cluster_start before the cluster_started of the last one");
  machine.current->started = true;
}
void cluster_started(Place place) {
  if (!machine.current->started) fail("cluster_started with no cluster_start before it");
  machine.current->started = false;
  if (!meet_cluster("cluster_started", place)) return;
  for (Block& block : machine.blocks) check_all_are_here(block);
  for (Block& block : machine.blocks) wake_block(block);
}

int thread_id() { return machine.current->id; }
int block_x() { return machine.current->block->x; }
int block_y() { return machine.current->block->y; }
int grid_x() { return machine.launch->grid_x; }
int cluster_rank() { return machine.current->block->rank; }
int cluster_size() { return machine.launch->cluster; }
uint8_t* shared_memory() { return machine.current->block->shared; }
void trap() { fail("trap"); }
void wait_for_previous_kernel() { machine.current->waited = machine.current->block->waited = true; }

}  // namespace emu

// Run a kernel of this library. Returns 0, or 1 with the reason in `error`.
extern "C" __attribute__((visibility("default"))) int emu_launch(const emu::Launch* launch, void (*kernel)(const void*),
                                                                 char* error, int error_bytes) {
  using namespace emu;
  error_text = error;
  error_size = error_bytes;
  machine.launch = launch;
  machine.current = nullptr;
  emu::kernel = kernel;
  random_state = launch->seed;
  struct sigaction action = {}, before_segv, before_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  static char signal_stack[64 << 10];
  stack_t stack = {}, stack_before;
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &stack_before);
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  const bool failed = _setjmp(escape) != 0;
  if (!failed) run_launch(*launch);
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  sigaltstack(&stack_before, nullptr);
  if (failed) free_fibers();
  machine.launch = nullptr;
  return failed;
}
