// Instructions that a whole warp executes, from their operands in registers, by the layouts that the vendors document:
// PTX ISA, "Matrix fragments for mma.m16n8k16" and "ldmatrix"; CDNA3 ISA, V_MFMA_F32_16X16X16_BF16 and DS_BPERMUTE_B32.
#include "runtime.h"

namespace emu {
namespace {

float bf16_of(uint32_t word, int half) {
  const uint32_t bits = half ? word & 0xffff0000u : word << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// d[m][n] += sum of a[m][k] b[n][k]. Products of bf16 are exact in float32; the sum is rounded once.
template <int kM, int kN, int kK>
void multiply(float (&d)[kM][kN], const float (&a)[kM][kK], const float (&b)[kN][kK]) {
  for (int m = 0; m < kM; ++m)
    for (int n = 0; n < kN; ++n) {
      double sum = d[m][n];
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(a[m][k] * b[n][k]);
      d[m][n] = static_cast<float>(sum);
    }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

void run_mma(void** lanes) {
  float a[16][16], b[8][16], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(lanes[lane]);
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = group + ((i >= 2 && i < 4) || i >= 6 ? 8 : 0);
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][column] = bf16_of(p.a[i / 2], i & 1);
    }
    for (int i = 0; i < 4; ++i) b[group][in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)] = bf16_of(p.b[i / 2], i & 1);
    for (int i = 0; i < 4; ++i) d[group + (i >= 2 ? 8 : 0)][in_group * 2 + (i & 1)] = p.d[i];
  }
  multiply(d, a, b);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Product*>(lanes[lane])->d[i] = d[(lane >> 2) + (i >= 2 ? 8 : 0)][lane % 4 * 2 + (i & 1)];
}

void run_mfma(void** lanes) {
  float a[16][16], b[16][16], d[16][16];
  for (int lane = 0; lane < 64; ++lane) {
    const Product& p = *static_cast<Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      a[lane % 16][lane / 16 * 4 + i] = bf16_of(p.a[i / 2], i & 1);
      b[lane % 16][lane / 16 * 4 + i] = bf16_of(p.b[i / 2], i & 1);
      d[lane / 16 * 4 + i][lane % 16] = p.d[i];
    }
  }
  multiply(d, a, b);
  for (int lane = 0; lane < 64; ++lane)
    for (int i = 0; i < 4; ++i) static_cast<Product*>(lanes[lane])->d[i] = d[lane / 16 * 4 + i][lane % 16];
}

struct MatrixRow {
  uint32_t* r;
  const void* row;
};

// Matrix i has the rows that lanes 8 i ... 8 i + 7 name, and lands in register i.
void run_ldmatrix(void** lanes) {
  uint32_t words[4];
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int row = 0; row < 8; ++row) {
      __builtin_memcpy(words, static_cast<MatrixRow*>(lanes[matrix * 8 + row])->row, 16);
      for (int i = 0; i < 4; ++i) static_cast<MatrixRow*>(lanes[row * 4 + i])->r[matrix] = words[i];
    }
}

struct Exchange {
  float value, result;
  int lane;
};

void run_shuffle(void** lanes) {
  for (int lane = 0; lane < machine.launch->warp; ++lane) {
    Exchange& e = *static_cast<Exchange*>(lanes[lane]);
    e.result = static_cast<Exchange*>(lanes[e.lane])->value;
  }
}

}  // namespace

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Place place) {
  Product p{d, a, b};
  together("mma", place, &p, run_mma);
}
void mfma_f32_16x16x16_bf16(float* d, const uint32_t* a, const uint32_t* b, Place place) {
  Product p{d, a, b};
  together("mma", place, &p, run_mfma);
}
void ldmatrix_x4(uint32_t* r, const void* row, Place place) {
  check_shared(*machine.current, row, 16, 16, kRead);
  MatrixRow m{r, row};
  together("load_fragment", place, &m, run_ldmatrix);
}
float shuffle(float value, int lane, Place place) {
  if (lane < 0 || lane >= machine.launch->warp) fail("shuffle reads lane %d of %d", lane, machine.launch->warp);
  Exchange e{value, 0.f, lane};
  together("shuffle", place, &e, run_shuffle);
  return e.result;
}

int same_in_all_lanes(int value, Place place) {
  const int first = __builtin_bit_cast(int, shuffle(__builtin_bit_cast(float, value), 0, place));
  if (first != value) fail("same_in_all_lanes of %d, and of %d in the first lane", value, first);
  return value;
}

}  // namespace emu
