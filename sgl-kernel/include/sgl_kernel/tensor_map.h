// A matrix as Hopper's copy engine takes it. Made by the driver on the host, read by the engine alone.
#pragma once

namespace sgl {

struct alignas(128) TensorMap {
  unsigned long long words[16];
};

}  // namespace sgl
