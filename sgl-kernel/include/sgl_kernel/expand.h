// The low-rank term of a strip, 32 columns of 8 or 16 token rows: scale * (B u), added where the lanes have the rows
// anyway.
//
// Used by the plain expand kernel and by every kernel that reads a projection's output. A warp multiplies
// out of registers: no shared memory, no barrier. B is static, so a kernel fetches it before the one ahead of it has
// finished, and keeps it while it walks over token rows. A sum runs over the rank in steps of sixteen and depends on
// nothing else.
#pragma once

#include "lora.h"

namespace sgl {

struct Float8 {
  float v[8];
};

// One slice of the adapter of a block's rows. Rank 0: nothing, and then not even a zero is added, so that rows keep the
// bits they have without adapters.
struct Module {
  const bf16 *b, *u;
  int64_t u_stride;
  int rank, b_stride;
  float scale;
};
SGL_DEVICE Module module_of(const LoraDelta& delta, int slot, int rank, int slice) {
  if (slot < 0) return {nullptr, nullptr, 0, 0, 0, 0.f};
  const Slice own = read_slice(delta.site, slot, slice);
  const bf16* u = delta.u + slot * delta.u_slot_stride + slice * delta.site.rank_cap;
  return {b_of(delta.site, slot, slice), u, delta.u_stride, own.rank, b_stride(rank), own.scale};
}

// B of 32 columns of a slice, from `first` on, of which `columns` exist: the first 16 kSteps ranks. What is not there is
// replaced by what is, which costs less than asking: those columns are nobody's, and those ranks meet zeros of u.
template <class Strip, int kSteps>
struct BStrip {
  int first, last;
  Vec4 held[kSteps][Strip::kParts];

  __device__ __forceinline__ void fetch(const Module& module, int first_, int columns) {
    first = first_;
    last = columns - 1;
    SGL_UNROLL
    for (int step = 0; step < kSteps; ++step) load(held[step], module, 16 * step + Strip::k());
  }
  __device__ __forceinline__ void load(Vec4 (&parts)[Strip::kParts], const Module& module, int k) const {
    const bf16* b = module.b + (k < module.b_stride ? k : 0);
    SGL_UNROLL
    for (int j = 0; j < Strip::kParts; ++j) {
      const int column = Strip::part(j) < last ? Strip::part(j) : last;
      parts[j] = load_vec4(b + (first + column) * module.b_stride);
    }
  }
};

// u of this lane's rows, the same ranks; what there is from the module's rank on is masked when it is multiplied, so that the
// loads may be on their way until then.
template <class Strip, int kSteps>
struct UStrip {
  const bf16* row[Strip::kRows];
  Vec4 held[kSteps][Strip::kRows];

  __device__ __forceinline__ void fetch(const Module& module, const int (&rows)[Strip::kRows]) {
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) row[i] = row_at(module.u, rows[i], module.u_stride);
    SGL_UNROLL
    for (int step = 0; step < kSteps; ++step) load(held[step], module, 16 * step);
  }
  __device__ __forceinline__ void load(Vec4 (&rows)[Strip::kRows], const Module& module, int begin) const {
    SGL_UNROLL
    for (int i = 0; i < Strip::kRows; ++i) rows[i] = load_vec4(row[i] + this_lanes(module, begin));
  }
  // Where this lane's four ranks of sixteen from `begin` on are in a row, or some others, if the module does not have them.
  SGL_DEVICE int this_lanes(const Module& module, int begin) {
    const int k = begin + Strip::k();
    return k < module.rank ? k : 0;
  }
};
// Sixteen ranks from `begin` on. Without a branch: it would become predicates of every instruction, and they are more than the masks.
template <class Strip>
SGL_DEVICE void multiply_add(Strip& sum, const Module& module, const Vec4 (&u)[Strip::kRows], const Vec4 (&b)[Strip::kParts], int begin) {
  const int left = module.rank - begin - Strip::k();
  const uint32_t low = left >= 2 ? ~0u : left == 1 ? 0xffffu : 0u, high = left >= 4 ? ~0u : left == 3 ? 0xffffu : 0u;
  Vec4 rows[Strip::kRows];
  SGL_UNROLL
  for (int i = 0; i < Strip::kRows; ++i) rows[i] = {{u[i].w[0] & low, u[i].w[1] & high}};
  mma(sum, rows, b);
}

// B u for this lane's columns and rows. All lanes of a warp take part. With kSteps 1 there are no higher ranks: the code
// for them would be fetched by everybody.
template <class Strip, int kSteps>
SGL_DEVICE Strip multiply(const Module& module, const BStrip<Strip, kSteps>& b, const UStrip<Strip, kSteps>& u) {
  Strip sum = {};
  multiply_add(sum, module, u.held[0], b.held[0], 0);  // of rank 0, too: nobody adds it
  SGL_UNROLL
  for (int step = 1; step < kSteps; ++step)
    if (16 * step < module.rank) multiply_add(sum, module, u.held[step], b.held[step], 16 * step);
  if constexpr (kSteps > 1) {
    SGL_NO_UNROLL
    for (int k = 16 * kSteps; k < module.rank; k += 16) {
      Vec4 rows[Strip::kRows], parts[Strip::kParts];
      u.load(rows, module, k);
      b.load(parts, module, k + Strip::k());
      multiply_add(sum, module, rows, parts, k);
    }
  }
  return sum;
}
// y of row i, with its term.
template <class Strip>
SGL_DEVICE void add_term(Float8& y, const Module& module, const Strip& product, int i) {
  if (module.rank == 0) return;
  SGL_UNROLL
  for (int c = 0; c < 8; ++c) y.v[c] = multiply_add(module.scale, product.v[i][c], y.v[c]);
}

}  // namespace sgl
