// ROCm: the module API of libamdhip64, found at the first call: the one that torch has loaded already, else the newest
// that the system offers. No ROCm headers and no link-time dependency, so one wheel serves every ROCm release.
#include <dlfcn.h>
#include <link.h>
#include <tvm/ffi/error.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "driver.h"
#include "images.h"

namespace sgl::driver {

const int kWarp = 64;

namespace {

using hipError = int;
using hipModule = void*;
using hipFunction = void*;
constexpr int kMultiprocessorCount = 63;  // hipDeviceAttributeMultiprocessorCount, the same in ROCm 5 to 7

struct Api {
  const char* (*GetErrorString)(hipError);
  hipError (*GetDevice)(int*);
  hipError (*SetDevice)(int);
  hipError (*DeviceGetAttribute)(int*, int, int);
  hipError (*ModuleLoadData)(hipModule*, const void*);
  hipError (*ModuleGetFunction)(hipFunction*, hipModule, const char*);
  hipError (*ModuleLaunchKernel)(hipFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                                 void**, void**);
};

std::string loaded_runtime() {
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const char* slash = std::strrchr(info->dlpi_name, '/');
        const char* name = slash ? slash + 1 : info->dlpi_name;
        if (std::strncmp(name, "libamdhip64", 11) != 0) return 0;
        *static_cast<std::string*>(found) = info->dlpi_name;
        return 1;
      },
      &path);
  return path;
}

void* open_runtime() {
  const std::string path = loaded_runtime();
  if (!path.empty())
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD)) return library;
  for (const char* name : {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"})
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  TVM_FFI_THROW(RuntimeError) << "no ROCm runtime: libamdhip64.so could not be loaded; install ROCm or a ROCm build of torch";
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) TVM_FFI_THROW(RuntimeError) << "libamdhip64.so lacks " << name;
}

const Api& api() {
  static const Api loaded = [] {
    void* library = open_runtime();
    Api api{};
    find(library, "hipGetErrorString", api.GetErrorString);
    find(library, "hipGetDevice", api.GetDevice);
    find(library, "hipSetDevice", api.SetDevice);
    find(library, "hipDeviceGetAttribute", api.DeviceGetAttribute);
    find(library, "hipModuleLoadData", api.ModuleLoadData);
    find(library, "hipModuleGetFunction", api.ModuleGetFunction);
    find(library, "hipModuleLaunchKernel", api.ModuleLaunchKernel);
    return api;
  }();
  return loaded;
}

void check(hipError result, const char* what, const std::string& detail = "") {
  if (result == 0) return;
  TVM_FFI_THROW(RuntimeError) << what << (detail.empty() ? "" : " of ") << detail << ": " << api().GetErrorString(result)
                              << " (HIP error " << result << ")";
}

class UseDevice {
 public:
  explicit UseDevice(int device_id) {
    check(api().GetDevice(&previous_), "hipGetDevice");
    if (previous_ == device_id) return;
    check(api().SetDevice(device_id), "hipSetDevice");
    changed_ = true;
  }
  ~UseDevice() {
    if (changed_) api().SetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct Loaded {
  Device device;
  hipModule modules[kNumImages];
  std::map<const char*, hipFunction> kernels;  // by the address of the name
};

std::mutex g_mutex;

Loaded& loaded(int device_id) {  // under g_mutex
  static std::map<int, Loaded> devices;
  const auto found = devices.find(device_id);
  if (found != devices.end()) return found->second;
  const UseDevice use(device_id);
  Loaded made{{1, 1, false}, {}, {}};
  check(api().DeviceGetAttribute(&made.device.multiprocessors, kMultiprocessorCount, device_id), "hipDeviceGetAttribute");
  for (int i = 0; i < kNumImages; ++i)
    check(api().ModuleLoadData(&made.modules[i], kImages[i]), "hipModuleLoadData (is this GPU a gfx90a, gfx942 or gfx950?)");
  return devices[device_id] = made;
}

hipFunction kernel(const char* name, int device_id) {
  std::lock_guard<std::mutex> lock(g_mutex);
  Loaded& here = loaded(device_id);
  const auto found = here.kernels.find(name);
  if (found != here.kernels.end()) return found->second;
  hipFunction function = nullptr;
  hipError result = 1;
  for (int i = 0; i < kNumImages && result != 0; ++i) result = api().ModuleGetFunction(&function, here.modules[i], name);
  check(result, "hipModuleGetFunction", name);
  return here.kernels[name] = function;
}

}  // namespace

const Device& device(int device_id) {
  std::lock_guard<std::mutex> lock(g_mutex);
  return loaded(device_id).device;
}

void preload(int device_id) { device(device_id); }

void make_tensor_map(TensorMap&, int, const void*, int64_t, int64_t, int64_t, int) {
  TVM_FFI_THROW(RuntimeError) << "no AMD GPU has tensor maps";
}

void launch(const char* name, int device_id, void* stream, const Grid& grid, const void* args, size_t) {
  const UseDevice use(device_id);
  const hipFunction function = kernel(name, device_id);
  void* parameters[] = {const_cast<void*>(args)};
  check(api().ModuleLaunchKernel(function, grid.x, grid.y, 1, grid.threads, 1, 1, grid.shared_bytes, stream, parameters,
                                 nullptr),
        "launch", name);
}

}  // namespace sgl::driver
