// libcuda.so.1 without a GPU: the driver API that sgl-kernel uses, and what a real one refuses.
#include <cuda.h>

#include "record.h"

#define LOG(...) write_log("{\"call\": \"" __VA_ARGS__)
#define TRY(function)                  \
  do {                                 \
    const int code = fails(#function); \
    if (code) return (CUresult)code;   \
  } while (0)

enum { kPlainShared = 48 << 10, kMostShared = 227 << 10 };

// Contexts are addresses of these; each thread has a stack of current ones.
static int primary[MAX_DEVICES] = {0, 1, 2, 3};
static _Thread_local int* stack[16];
static _Thread_local int depth;
static int initialised;

static int current(void) { return depth ? *stack[depth - 1] : -1; }

// What the owner of the streams does: makes a device current for the calling thread, or with -1 none.
EXPORT void mock_make_current(int device) {
  depth = 0;
  if (device >= 0) stack[depth++] = &primary[device];
}
EXPORT int mock_depth(void) { return depth; }
EXPORT int mock_current(void) { return current(); }

EXPORT CUresult cuInit(unsigned flags) {
  TRY(cuInit);
  LOG("cuInit\"}\n");
  initialised = 1;
  return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char** string) {
  *string = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : error == CUDA_ERROR_NOT_FOUND ? "named symbol not found" : NULL;
  return *string ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  TRY(cuDeviceGetAttribute);
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = major;
  else if (which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) *value = multiprocessors;
  else return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  if (!initialised) return CUDA_ERROR_NOT_INITIALIZED;
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  *device = current();
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  TRY(cuCtxPushCurrent);
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  stack[depth++] = (int*)context;
  LOG("push\", \"device\": %d}\n", current());
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* context) {
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  LOG("pop\", \"device\": %d}\n", current());
  *context = (CUcontext)stack[--depth];
  return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  TRY(cuDevicePrimaryCtxRetain);
  if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
  LOG("retain\", \"device\": %d}\n", device);
  *context = (CUcontext)&primary[device];
  return CUDA_SUCCESS;
}

static _Thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

EXPORT CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  const CUstreamCaptureMode before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* a, void** b, unsigned num_a,
                                  CUlibraryOption* c, void** d, unsigned num_c) {
  (void)a, (void)b, (void)c, (void)d;
  TRY(cuLibraryLoadData);
  Image* image = identify(code);
  if (!image || num_a || num_c) return CUDA_ERROR_INVALID_IMAGE;
  LOG("load\", \"image\": \"%s\"}\n", image->name);
  *library = (CUlibrary)image;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  TRY(cuLibraryGetKernel);
  Kernel* found = look_up((Image*)library, name);
  if (!found) return CUDA_ERROR_NOT_FOUND;
  LOG("kernel\", \"kernel\": \"%s\"}\n", name);
  *kernel = (CUkernel)found;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernelCount(unsigned* count, CUlibrary library) {
  *count = (unsigned)((Image*)library)->count;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryEnumerateKernels(CUkernel* kernels, unsigned count, CUlibrary library) {
  for (unsigned i = 0; i < count; ++i) kernels[i] = (CUkernel)&((Image*)library)->kernels[i];
  return CUDA_SUCCESS;
}

// Brings the code to the current device, which a stream that is being captured does not allow.
EXPORT CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  TRY(cuKernelGetFunction);
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  if (capture_mode != CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  LOG("function\", \"kernel\": \"%s\", \"device\": %d}\n", ((Kernel*)kernel)->name, current());
  ((Kernel*)kernel)->loaded[current()]++;
  *function = (CUfunction)kernel;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute which, int value, CUkernel kernel, CUdevice device) {
  TRY(cuKernelSetAttribute);
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > kMostShared) return CUDA_ERROR_INVALID_VALUE;
  if (device < 0 || device >= devices) return CUDA_ERROR_INVALID_DEVICE;
  LOG("shared\", \"kernel\": \"%s\", \"device\": %d, \"bytes\": %d}\n", ((Kernel*)kernel)->name, device, value);
  ((Kernel*)kernel)->shared[device] = value;
  return CUDA_SUCCESS;
}

// The map's words are what went into it: address, rows, columns, bytes from row to row, rows and columns of a tile.
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                       const cuuint64_t* size, const cuuint64_t* row_bytes, const cuuint32_t* tile,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  TRY(cuTensorMapEncodeTiled);
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  if (major < 9) return CUDA_ERROR_NOT_SUPPORTED;
  (void)promotion;
  const uint64_t at = (uint64_t)(uintptr_t)address;
  if ((uintptr_t)map % 64 || !at || at % 16 || type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || rank != 2 ||
      interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || row_bytes[0] % 16 || row_bytes[0] >> 40 || row_bytes[0] < 2 * size[0])
    return CUDA_ERROR_INVALID_VALUE;
  for (int i = 0; i < 2; ++i)
    if (!size[i] || size[i] >> 32 || !tile[i] || tile[i] > 256 || steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  if (tile[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;  // a row of the swizzle
  const cuuint64_t words[16] = {at, size[1], size[0], row_bytes[0], tile[1], tile[0]};
  LOG("map\", \"address\": %llu, \"device\": %d}\n", (unsigned long long)at, current());
  memcpy(map, words, sizeof(words));
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  TRY(cuLaunchKernelEx);
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  const Kernel* kernel = (const Kernel*)function;
  const int device = current();
  int cluster = 1, overlap = 0;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute* attribute = &config->attrs[i];
    if (major < 9) return CUDA_ERROR_NOT_SUPPORTED;
    if (attribute->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      cluster = (int)attribute->value.clusterDim.x;
      if (attribute->value.clusterDim.y != 1 || attribute->value.clusterDim.z != 1) return CUDA_ERROR_INVALID_VALUE;
    } else if (attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      overlap = attribute->value.programmaticStreamSerializationAllowed;
    } else if (attribute->id == CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
      if (attribute->value.sharedMemCarveout > 100) return CUDA_ERROR_INVALID_VALUE;
      LOG("carveout\", \"percent\": %d}\n", (int)attribute->value.sharedMemCarveout);
    } else {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const int allowed = kernel->shared[device] > kPlainShared ? kernel->shared[device] : kPlainShared;
  const unsigned threads = block[0] * block[1] * block[2];
  if (extra || !parameters || !grid[0] || !grid[1] || !grid[2] || !threads || grid[1] > 65535 || grid[2] > 65535 ||
      threads > (unsigned)kernel->threads || (int)config->sharedMemBytes > allowed || cluster < 1 || cluster > 8 ||
      grid[0] % (unsigned)cluster)
    return CUDA_ERROR_INVALID_VALUE;
  log_launch(kernel->name, device, grid, block, config->sharedMemBytes, config->hStream, cluster, overlap, kernel->loaded[device],
             parameters[0], (size_t)kernel->args);
  return CUDA_SUCCESS;
}
