// libamdhip64 without a GPU: the module API that sgl-kernel uses, and what a real one refuses.
#include "record.h"

#define LOG(...) write_log("{\"call\": \"" __VA_ARGS__)
#define TRY(function)                  \
  do {                                 \
    const int code = fails(#function); \
    if (code) return code;             \
  } while (0)

enum { kInvalidValue = 1, kNoDevice = 100, kInvalidDevice = 101, kNoBinary = 209, kNotFound = 500 };
enum { kMostShared = 64 << 10, kMostThreads = 1024, kMultiprocessorCount = 63 };

typedef struct {
  Image* image;
  int device;
} Module;

typedef struct {
  Kernel* kernel;
  int device;
} Function;

static _Thread_local int current;

EXPORT void mock_make_current(int device) { current = device; }
EXPORT int mock_current(void) { return current; }

EXPORT const char* hipGetErrorString(int error) {
  return error == 2 ? "out of memory" : error == kNoBinary ? "no kernel image is available for execution on the device" : "an error";
}

EXPORT int hipGetDevice(int* device) {
  TRY(hipGetDevice);
  if (!devices) return kNoDevice;
  *device = current;
  return 0;
}

EXPORT int hipSetDevice(int device) {
  TRY(hipSetDevice);
  if (device < 0 || device >= devices) return kInvalidDevice;
  LOG("set\", \"device\": %d}\n", device);
  current = device;
  return 0;
}

EXPORT int hipDeviceGetAttribute(int* value, int which, int device) {
  TRY(hipDeviceGetAttribute);
  if (which != kMultiprocessorCount) return kInvalidValue;
  if (device < 0 || device >= devices) return kInvalidDevice;
  *value = multiprocessors;
  return 0;
}

EXPORT int hipModuleLoadData(void** module, const void* code) {
  TRY(hipModuleLoadData);
  Image* image = identify(code);
  if (!image) return kNoBinary;
  LOG("load\", \"image\": \"%s\", \"device\": %d}\n", image->name, current);
  Module* made = malloc(sizeof(Module));
  *made = (Module){image, current};
  *module = made;
  return 0;
}

EXPORT int hipModuleGetFunction(void** function, void* module, const char* name) {
  TRY(hipModuleGetFunction);
  const Module* from = module;
  Kernel* found = look_up(from->image, name);
  if (!found) return kNotFound;
  LOG("kernel\", \"kernel\": \"%s\", \"device\": %d}\n", name, from->device);
  Function* made = malloc(sizeof(Function));
  *made = (Function){found, from->device};
  *function = made;
  return 0;
}

EXPORT int hipModuleLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                 unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                                 void** extra) {
  TRY(hipModuleLaunchKernel);
  const Function* called = function;
  const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
  const unsigned threads = block_x * block_y * block_z;
  if (extra || !parameters || !grid_x || !grid_y || !grid_z || !threads || grid_y > 65535 || threads > kMostThreads ||
      threads > (unsigned)called->kernel->threads || shared > kMostShared)
    return kInvalidValue;
  if (called->device != current) return kInvalidDevice;
  log_launch(called->kernel->name, current, grid, block, shared, stream, 1, 0, 1, parameters[0], (size_t)called->kernel->args);
  return 0;
}
