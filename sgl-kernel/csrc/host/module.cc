// What the library says about itself.
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "driver.h"

namespace sgl::host {
namespace {

tvm::ffi::String target() { return SGL_KERNEL_TARGET; }

// (multiprocessors, largest cluster) of a device; loads all of its kernels.
tvm::ffi::Tuple<int64_t, int64_t> preload(int64_t device_id) {
  driver::preload(static_cast<int>(device_id));
  const driver::Device& device = driver::device(static_cast<int>(device_id));
  return tvm::ffi::Tuple<int64_t, int64_t>(device.multiprocessors, device.max_cluster);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(target, target);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(preload, preload);

}  // namespace sgl::host
