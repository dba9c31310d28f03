// From what Python passes to what kernels take. The Python side has checked shapes and dtypes; what is checked here is what would
// read foreign memory.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/optional.h>

#include "driver.h"
#include "sgl_kernel/args.h"

namespace sgl::host {

namespace ffi = tvm::ffi;
using ffi::Shape;
using ffi::TensorView;

// Where an operation runs: the device of its first tensor and torch's current stream there.
struct Place {
  int device_id;
  void* stream;

  explicit Place(const TensorView& tensor)
      : device_id(tensor.device().device_id),
        stream(TVMFFIEnvGetStream(tensor.device().device_type, tensor.device().device_id)) {}
};

inline void check_matrix(const TensorView& tensor, const char* name) {
  const bool is_bf16 = tensor.dtype().code == kDLBfloat && tensor.dtype().bits == 16;
  if (tensor.ndim() != 2 || !is_bf16 || tensor.stride(1) != 1)
    TVM_FFI_THROW(ValueError) << name << " must be a bfloat16 matrix with dense rows";
  if (tensor.stride(0) > INT32_MAX)  // row_at() of the kernels
    TVM_FFI_THROW(ValueError) << "rows of " << name << " are " << tensor.stride(0) << " numbers apart; at most " << INT32_MAX;
}

template <class T>
T* data(const TensorView& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T>
T* data(const ffi::Optional<TensorView>& tensor) {
  return tensor.has_value() ? data<T>(tensor.value()) : nullptr;
}

// `words` are LoraSite.words of Python.
inline LoraSite unpack_site(const TensorView& slabs, const Shape& words) {
  if (words.size() != 12) TVM_FFI_THROW(ValueError) << "a site has 12 words, not " << words.size();
  if (words[11] != 2) TVM_FFI_THROW(ValueError) << "compiled kernels read slabs of dtype word 2 (bfloat16), not " << words[11];
  LoraSite site{};
  site.slabs = data<const uint8_t>(slabs);
  site.slab_bytes = slabs.stride(0);
  site.in_features = static_cast<int32_t>(words[0]);
  site.rank_cap = static_cast<int32_t>(words[1]);
  site.num_slices = static_cast<int32_t>(words[2]);
  site.table_offset = words[6];
  site.a_offset = words[7];
  for (int i = 0; i < kMaxSlices; ++i) {
    site.out_features[i] = static_cast<int32_t>(words[3 + i]);
    site.b_offsets[i] = words[8 + i];
  }
  return site;
}

// `shape` is (max_tokens, num_slots, tile_tokens, max_tiles) and the offsets of perm, token_slot, tiles and live.
struct BatchShape {
  int max_tokens, num_slots, tile_tokens, max_tiles;

  explicit BatchShape(const Shape& shape)
      : max_tokens(static_cast<int>(shape[0])),
        num_slots(static_cast<int>(shape[1])),
        tile_tokens(static_cast<int>(shape[2])),
        max_tiles(static_cast<int>(shape[3])) {}

  // No batch of this many rows has more tiles.
  int tiles(int tokens) const {
    const int bound = (tokens + tile_tokens - 1) / tile_tokens + num_slots + 1;  // a partial one of each, and of the base
    const int most = bound < tokens ? bound : tokens;
    return most < max_tiles ? most : max_tiles;
  }
};

inline LoraBatch unpack_batch(const TensorView& words, const Shape& shape) {
  if (shape.size() != 8) TVM_FFI_THROW(ValueError) << "a batch shape has 8 words, not " << shape.size();
  const int32_t* base = data<const int32_t>(words);
  return {base + shape[4], base + shape[5], base + shape[6], base + shape[7]};
}

inline LoraDelta unpack_delta(const TensorView& u, int64_t u_slot_stride, const TensorView& slabs, const Shape& site,
                              const TensorView& words, const Shape& shape) {
  return {unpack_site(slabs, site), unpack_batch(words, shape), data<const uint16_t>(u), u.stride(0), u_slot_stride};
}

}  // namespace sgl::host
