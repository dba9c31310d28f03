// Loading the embedded code objects and launching their kernels, through a driver library found at run time.
//
// One of driver_cuda.cc, driver_rocm.cc and driver_none.cc implements it. Nothing here runs before the first launch, so importing the package
// needs neither a GPU nor a driver. Errors are exceptions that become Python's RuntimeError.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sgl_kernel/tensor_map.h"

namespace sgl::driver {

struct Grid {
  int x, y;
  int threads;
  int shared_bytes;
  int cluster;     // blocks along x that run together; 1 for none
  bool overlap;    // may start while the previous kernel of the stream is still running
};

// What the host code has to know about a device.
struct Device {
  int multiprocessors;
  int max_cluster;  // 1 where blocks cannot form clusters
  bool warpgroups;  // whether there are kernels of group_gemm.h
};

extern const int kWarp;

const Device& device(int device_id);

// Load every kernel for a device: nothing is left to be loaded when a graph is captured.
void preload(int device_id);

// What the copy engine of a device with warpgroups has to know of a bf16 matrix [rows, columns] that it brings in tiles of 64 columns.
// The address and the bytes from row to row are multiples of 16. Made in place: g++ 12 does not align what a call returns.
void make_tensor_map(TensorMap& map, int device_id, const void* data, int64_t rows, int64_t columns, int64_t stride, int tile_rows);

// `name` is a string literal: kernels are remembered by its address.
void launch(const char* name, int device_id, void* stream, const Grid& grid, const void* args, size_t args_size);

}  // namespace sgl::driver
