// Arguments of the kernels, as host and device see them: plain data, no pointers to pointers.
#pragma once

#if defined(SGL_EMULATE) || defined(__CUDACC__) || defined(__HIP__)
#include "vendor.h"
#else
#include <cstdint>

#include "tensor_map.h"
#endif

namespace sgl {

constexpr int kMaxSlices = 3;

// Where one group of one layer lies in every slab; see "Slabs" in README.md.
struct LoraSite {
  const uint8_t* slabs;
  int64_t slab_bytes;
  int64_t table_offset;
  int64_t a_offset;
  int64_t b_offsets[kMaxSlices];
  int32_t in_features;
  int32_t rank_cap;
  int32_t num_slices;
  int32_t out_features[kMaxSlices];
};

// The batch buffer of README.md, cut into its parts; null where no row has an adapter.
struct LoraBatch {
  const int32_t* perm;
  const int32_t* token_slot;
  const int32_t* tiles;
  const int32_t* live;
};

// The low-rank term that is still to be added to a projection's output.
struct LoraDelta {
  LoraSite site;
  LoraBatch batch;
  const uint16_t* u;
  int64_t u_stride;       // elements between token rows
  int64_t u_slot_stride;  // elements between slots; 0 when every row holds the u of its own slot only
};

// y = x W^T, and u = x A^T of every live slot for its own rows.
struct GemmArgs {
  const uint16_t* x;
  const uint16_t* weight;
  uint16_t* y;
  int64_t x_stride, weight_stride, y_stride;
  int32_t tokens, in_features, out_features;
  int32_t num_splits;  // blocks of a cluster, each with its part of K
  int32_t base_tiles;  // of y's columns
  int32_t max_live;    // live slots that there may be
  int32_t a_units;     // and tiles of u's columns of all of them
  LoraSite site;
  LoraBatch batch;
  uint16_t* u;
  int64_t u_stride;
};

// y = x W^T by warpgroups.
struct GroupGemmArgs {
  TensorMap x, weight;  // in tiles of 64 columns, and of 64 rows and of the block's rows
  uint16_t* y;
  int64_t y_stride;
  int32_t tokens, in_features, out_features;
  int32_t num_splits;                  // blocks of a cluster
  int32_t part_columns, share_tokens;  // of K that each of them multiplies, in multiples of 64; of the rows that it adds up
};

struct ShrinkArgs {
  const uint16_t* x;
  uint16_t* u;
  int64_t x_stride, u_stride;
  LoraSite site;
  LoraBatch batch;
};

struct ExpandArgs {
  uint16_t* y;
  int64_t y_stride;
  LoraDelta delta;
};

struct NormArgs {
  uint16_t* x;         // [T, H]; with a residual overwritten with the normalised rows
  uint16_t* residual;  // null: plain norm of x into out, which may be x; no low-rank term
  uint16_t* out;       // not used with a residual
  const uint16_t* weight;
  int64_t x_stride, residual_stride, out_stride;
  int32_t tokens, hidden;
  int32_t block_tokens;         // token rows a block takes: a power of two, at most kNormRows
  int32_t parts, turns, staged, held;  // norm_block_parts(), norm_turns(), norm_staged() and norm_held()
  int32_t rehearse;  // see after_previous_kernel(); of this and other kernels for few rows
  float eps, mean;  // mean: 1 / hidden
  LoraDelta delta;
};

struct ActivationArgs {
  const uint16_t* x;  // [T, 2 I], gate first
  uint16_t* out;
  int64_t x_stride, out_stride;
  int32_t tokens, inner;
  int32_t block_tokens, piece_bits;  // rows that a block takes; their pieces make a tile, 1 << piece_bits of them
  int32_t rehearse;
  LoraDelta delta;
};

struct RopeArgs {
  uint16_t* qkv;             // [T, (num_heads + 2 num_kv_heads) D], overwritten
  const uint16_t* bias;      // of every column of qkv, or null
  const uint16_t* q_weight;  // [D] of the norm of every head of q, or null; k_weight of k
  const uint16_t* k_weight;
  const float* cos_sin;  // [P, D]: cosines, then sines, of D/2 angles
  const int64_t* positions;
  uint16_t* k_pool;  // [N, num_kv_heads, D], as v_pool; null: nothing is copied
  uint16_t* v_pool;
  const int64_t* locs;  // row of the pools for every token
  int64_t qkv_stride;
  int32_t tokens, num_heads, num_kv_heads;
  int32_t block_heads;               // that a block takes
  int32_t block_tokens, piece_bits;  // and rows; their pieces make a tile, 1 << piece_bits of them
  int32_t rehearse;
  float eps;
  LoraDelta delta;
};

}  // namespace sgl
