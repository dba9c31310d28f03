// A build without device code: everything that would run on a GPU says so.
#include <tvm/ffi/error.h>

#include "driver.h"

namespace sgl::driver {

const int kWarp = 32;

namespace {
[[noreturn]] void refuse() {
  TVM_FFI_THROW(RuntimeError) << "this build of sgl-kernel holds no GPU code: install its +cu or +rocm wheel";
}
}  // namespace

const Device& device(int) { refuse(); }
void preload(int) { refuse(); }
void make_tensor_map(TensorMap&, int, const void*, int64_t, int64_t, int64_t, int) { refuse(); }
void launch(const char*, int, void*, const Grid&, const void*, size_t) { refuse(); }

}  // namespace sgl::driver
