// What code for the emulated machine can ask of it: who it is, barriers, and the instructions of both vendors.
#pragma once

#include <cstdint>

namespace emu {

struct Place {  // in the source of a kernel
  const char* file;
  int line;
};
inline Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

// Of the fiber that runs.
int thread_id();
int block_x();
int block_y();
int grid_x();
int cluster_rank();
int cluster_size();
uint8_t* shared_memory();

void barrier(Place place);
void warp_barrier(Place place);  // orders accesses to shared memory of the lanes of this warp
void cluster_barrier(Place place);
void cluster_start();
void cluster_started(Place place);  // orders nothing
// What another block of the cluster has at the same place.
void read_cluster(void* value, const void* shared, int rank, int bytes);
void write_cluster(void* shared, int rank, const void* value, int bytes);

void check_vector(const void* p);  // that it is a multiple of 16
void check_copy(const void* shared, const void* global, int bytes, int room);  // what async_copy16 and 8 ask of their arguments
void copy_async(void* shared, const void* global, int bytes, int room);        // cp.async, of 8 or 16 bytes
void commit_copies();                                                          // cp.async.commit_group
void wait_for_copies(int pending);                                             // cp.async.wait_group
void wait_for_previous_kernel();
void trap();

int same_in_all_lanes(int value, Place place);  // refuses what is not
float shuffle(float value, int lane, Place place);               // ds_bpermute, shfl.sync.idx
void ldmatrix_x4(uint32_t* r, const void* row, Place place);     // ldmatrix.m8n8.x4.b16
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Place place);            // bf16, warp of 32
void mfma_f32_16x16x16_bf16(float* d, const uint32_t* a, const uint32_t* b, Place place);  // wave of 64


// Hopper's copy engine and products of four warps, as vendor.h describes them.
uint32_t shared_address(const void* p);
void arrivals_init(void* at, int count);                          // mbarrier.init
void arrivals_ready();                                            // fence.mbarrier_init
void arrive(void* at, int bytes);                                 // mbarrier.arrive, .expect_tx
void wait_for_arrivals(void* at, int parity, Place place);        // mbarrier.try_wait.parity
void copy_tile(void* shared, const uint64_t* map, int row, int column, void* done);  // cp.async.bulk.tensor, swizzle 128B
void group_begin(Place place);                                    // wgmma.fence
void multiply_tiles(float* sums, int columns, const void* a, const void* b, int step, Place place);  // wgmma.mma_async
void group_commit(Place place);                                   // wgmma.commit_group
void group_wait(int pending, float* sums, Place place);           // wgmma.wait_group

}  // namespace emu
