// CUDA: the driver API of libcuda.so.1, opened at the first call. Libraries and kernels belong to no context, so one handle
// serves every device; a launch goes to the context that the stream's owner (torch) has made current.
#include <cuda.h>
#include <dlfcn.h>
#include <tvm/ffi/error.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "driver.h"
#include "images.h"

namespace sgl::driver {

const int kWarp = 32;

namespace {

struct Api {
  decltype(&cuInit) Init;
  decltype(&cuGetErrorString) GetErrorString;
  decltype(&cuDeviceGetAttribute) DeviceGetAttribute;
  decltype(&cuCtxGetDevice) CtxGetDevice;
  decltype(&cuCtxPushCurrent) CtxPushCurrent;
  decltype(&cuCtxPopCurrent) CtxPopCurrent;
  decltype(&cuDevicePrimaryCtxRetain) DevicePrimaryCtxRetain;
  decltype(&cuThreadExchangeStreamCaptureMode) ThreadExchangeStreamCaptureMode;
  decltype(&cuLibraryLoadData) LibraryLoadData;
  decltype(&cuLibraryGetKernel) LibraryGetKernel;
  decltype(&cuLibraryGetKernelCount) LibraryGetKernelCount;
  decltype(&cuLibraryEnumerateKernels) LibraryEnumerateKernels;
  decltype(&cuKernelGetFunction) KernelGetFunction;
  decltype(&cuKernelSetAttribute) KernelSetAttribute;
  decltype(&cuLaunchKernelEx) LaunchKernelEx;
  decltype(&cuTensorMapEncodeTiled) TensorMapEncodeTiled;
};

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) TVM_FFI_THROW(RuntimeError) << "libcuda.so.1 lacks " << name << ": sgl-kernel needs a driver of CUDA 12.4 or newer";
}

#define SGL_STRING(x) #x
#define SGL_FIND(function) find(library, SGL_STRING(cu##function), api.function)

const Api& api() {
  static const Api loaded = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) TVM_FFI_THROW(RuntimeError) << "no NVIDIA driver: libcuda.so.1 could not be loaded (" << dlerror() << ")";
    Api api{};
    SGL_FIND(Init);
    SGL_FIND(GetErrorString);
    SGL_FIND(DeviceGetAttribute);
    SGL_FIND(CtxGetDevice);
    find(library, "cuCtxPushCurrent_v2", api.CtxPushCurrent);
    find(library, "cuCtxPopCurrent_v2", api.CtxPopCurrent);
    SGL_FIND(DevicePrimaryCtxRetain);
    SGL_FIND(ThreadExchangeStreamCaptureMode);
    SGL_FIND(LibraryLoadData);
    SGL_FIND(LibraryGetKernel);
    SGL_FIND(LibraryGetKernelCount);
    SGL_FIND(LibraryEnumerateKernels);
    SGL_FIND(KernelGetFunction);
    SGL_FIND(KernelSetAttribute);
    SGL_FIND(LaunchKernelEx);
    SGL_FIND(TensorMapEncodeTiled);
    return api;
  }();
  return loaded;
}

void check(CUresult result, const char* what, const std::string& detail = "") {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  api().GetErrorString(result, &text);
  TVM_FFI_THROW(RuntimeError) << what << (detail.empty() ? "" : " of ") << detail << ": " << (text ? text : "unknown error")
                              << " (CUDA error " << static_cast<int>(result) << ")";
}

// Makes a device's primary context, the one torch uses, current for as long as it lives.
class UseDevice {
 public:
  explicit UseDevice(int device_id) {
    CUdevice current;
    if (api().CtxGetDevice(&current) == CUDA_SUCCESS && current == device_id) return;
    check(api().CtxPushCurrent(context(device_id)), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~UseDevice() {
    CUcontext popped;
    if (pushed_) api().CtxPopCurrent(&popped);
  }

 private:
  static CUcontext context(int device_id) {
    static std::mutex mutex;
    static std::map<int, CUcontext> contexts;
    std::lock_guard<std::mutex> lock(mutex);
    CUcontext& context = contexts[device_id];
    if (!context) check(api().DevicePrimaryCtxRetain(&context, device_id), "cuDevicePrimaryCtxRetain");
    return context;
  }
  bool pushed_ = false;
};

// Loading is no part of what a stream captures.
class RelaxCapture {
 public:
  RelaxCapture() { api().ThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxCapture() { api().ThreadExchangeStreamCaptureMode(&mode_); }

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

int attribute(int device_id, CUdevice_attribute which) {
  int value = 0;
  check(api().DeviceGetAttribute(&value, which, device_id), "cuDeviceGetAttribute");
  return value;
}

struct Kernel {
  CUkernel handle = nullptr;
  int shared_bytes = 0;  // that a launch may ask for
};

struct Loaded {
  Device device;
  std::map<const char*, Kernel> kernels;  // by the address of the name
};

const CUlibrary* libraries() {
  static CUlibrary loaded[kNumImages];
  static const bool done = [] {
    for (int i = 0; i < kNumImages; ++i)
      check(api().LibraryLoadData(&loaded[i], kImages[i], nullptr, nullptr, 0, nullptr, nullptr, 0), "cuLibraryLoadData");
    return true;
  }();
  (void)done;
  return loaded;
}

// Resolves the functions of all kernels for the current device, which loads their code.
void load_functions() {
  for (int i = 0; i < kNumImages; ++i) {
    unsigned count = 0;
    check(api().LibraryGetKernelCount(&count, libraries()[i]), "cuLibraryGetKernelCount");
    const std::unique_ptr<CUkernel[]> kernels(new CUkernel[count]);
    check(api().LibraryEnumerateKernels(kernels.get(), count, libraries()[i]), "cuLibraryEnumerateKernels");
    CUfunction function;
    for (unsigned k = 0; k < count; ++k) check(api().KernelGetFunction(&function, kernels[k]), "cuKernelGetFunction");
  }
}

std::mutex g_mutex;

Loaded& loaded(int device_id) {  // under g_mutex
  static std::map<int, Loaded> devices;
  const auto found = devices.find(device_id);
  if (found != devices.end()) return found->second;
  check(api().Init(0), "cuInit");
  const int major = attribute(device_id, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  if (major < 8)
    TVM_FFI_THROW(RuntimeError) << "sgl-kernel has no code for compute capability " << major << ".x: 8.0 or newer is needed";
  const UseDevice use(device_id);
  const RelaxCapture relax;
  load_functions();
  return devices[device_id] = {{attribute(device_id, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT), major >= 9 ? 8 : 1, major == 9}, {}};
}

CUkernel find_kernel(const char* name) {
  CUkernel kernel = nullptr;
  CUresult result = CUDA_ERROR_NOT_FOUND;
  for (int i = 0; i < kNumImages && result != CUDA_SUCCESS; ++i) result = api().LibraryGetKernel(&kernel, libraries()[i], name);
  check(result, "cuLibraryGetKernel", name);
  return kernel;
}

CUkernel kernel(const char* name, int device_id, int shared_bytes) {
  std::lock_guard<std::mutex> lock(g_mutex);
  Kernel& here = loaded(device_id).kernels[name];
  if (!here.handle) here.handle = find_kernel(name);
  if (shared_bytes > here.shared_bytes) {  // one kernel's launches need more or less, by their shapes
    check(api().KernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes, here.handle, device_id),
          "cuKernelSetAttribute", name);
    here.shared_bytes = shared_bytes;
  }
  return here.handle;
}

}  // namespace

const Device& device(int device_id) {
  std::lock_guard<std::mutex> lock(g_mutex);
  return loaded(device_id).device;
}

void preload(int device_id) { device(device_id); }

void make_tensor_map(TensorMap& map, int device_id, const void* data, int64_t rows, int64_t columns, int64_t stride, int tile_rows) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap), "tensor_map.h");
  const UseDevice use(device_id);
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t tile[] = {64, static_cast<cuuint32_t>(tile_rows)}, step[] = {1, 1};
  check(api().TensorMapEncodeTiled(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data),
                                   size, row_bytes, tile, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
}

void launch(const char* name, int device_id, void* stream, const Grid& grid, const void* args, size_t) {
  const CUkernel function = kernel(name, device_id, grid.shared_bytes);
  const UseDevice use(device_id);
  CUlaunchAttribute attributes[3];
  CUlaunchConfig config{};
  config.gridDimX = grid.x;
  config.gridDimY = grid.y;
  config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.blockDimX = grid.threads;
  config.sharedMemBytes = grid.shared_bytes;
  config.hStream = static_cast<CUstream>(stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    CUlaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    cluster.value.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  if (grid.overlap && device(device_id).max_cluster > 1) {
    CUlaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    overlap.value.programmaticStreamSerializationAllowed = 1;
    // Kernels that overlap share multiprocessors, which they can only where all want the same part of them as shared memory.
    CUlaunchAttribute& carveout = attributes[config.numAttrs++];
    carveout.id = CU_LAUNCH_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    carveout.value.sharedMemCarveout = 100;
  }
  void* parameters[] = {const_cast<void*>(args)};
  check(api().LaunchKernelEx(&config, reinterpret_cast<CUfunction>(function), parameters, nullptr), "launch", name);
}

}  // namespace sgl::driver
