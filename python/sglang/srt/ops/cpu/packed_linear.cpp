// Products of float32 activations with weights kept in their stored format: y[T, O] = x[T, I] * w[O, I]^T.
//
// Decoding reads every weight for each step and is bound by memory, so weights stay as small as the checkpoint has them
// and are widened in registers. The arithmetic is that of the widened weight in float32: only the order of additions
// differs from a float32 product of the dequantised matrix.
//
// Built for the machine it runs on by ops/cpu/build.py; a plain C interface, called through ctypes. A row of weights is
// contiguous: bfloat16 as it is, Q4_1 and Q8_0 as GGUF blocks of 32 (f16 scale, [f16 minimum,] quants).
// Shape legend: T tokens, I inputs (a multiple of 32), O outputs.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int kBlock = 32;

// A tile is some rows of weights by some tokens, one accumulator each, sized to stay in the vector registers.
#ifdef __AVX512F__
constexpr int kLanes = 16, kRows = 4, kTokens = 4, kRowsForOneToken = 8;
constexpr int kPanelRows[] = {16, 12, 8};  // by vectors of tokens
#else
constexpr int kLanes = 8, kRows = 2, kTokens = 4, kRowsForOneToken = 4;
constexpr int kPanelRows[] = {8, 6, 4};
#endif
constexpr int64_t kPanelTokens = 3 * kLanes;
constexpr int64_t kStripeRows = 48;      // outputs that a thread makes of a panel at a time
constexpr int64_t kSumBlocks = 4;        // blocks that are added up before they are added to the rest
constexpr int64_t kManyTokens = 10;      // from here on, lanes without a token cost less than sums across lanes
constexpr int64_t kChunk = 1 << 14;      // values that a thread unpacks at a time
constexpr int kParts = kBlock / kLanes;  // vectors in a block

typedef float VecF __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint8_t VecU8 __attribute__((vector_size(kLanes), aligned(1)));
typedef int8_t VecI8 __attribute__((vector_size(kLanes), aligned(1)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2), aligned(1)));
typedef uint32_t VecU32 __attribute__((vector_size(kLanes * 4), aligned(4)));

template <typename V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline float half_to_float(const uint8_t* p) {
  _Float16 h;
  std::memcpy(&h, p, 2);
  return static_cast<float>(h);
}

// kLanes bytes to floats. Spelled out where compilers do not find the widening instructions by themselves.
#if defined(__AVX512F__)
inline VecF widen(VecU8 q) { return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)q)); }
inline VecF widen(VecI8 q) { return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)q)); }
#elif defined(__AVX2__)
inline VecF widen(VecU8 q) { return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i*)&q))); }
inline VecF widen(VecI8 q) { return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i*)&q))); }
#else
inline VecF widen(VecU8 q) { return __builtin_convertvector(__builtin_convertvector(q, VecI), VecF); }
inline VecF widen(VecI8 q) { return __builtin_convertvector(__builtin_convertvector(q, VecI), VecF); }
#endif

struct Float32 {
  static constexpr int kBytes = 4 * kBlock;
  static void widen_block(const uint8_t* p, VecF* out) {
    for (int i = 0; i < kParts; ++i) out[i] = load<VecF>(p + 4 * kLanes * i);
  }
};

struct BFloat16 {
  static constexpr int kBytes = 2 * kBlock;
  static void widen_block(const uint8_t* p, VecF* out) {
    for (int i = 0; i < kParts; ++i) {
      VecU32 bits = __builtin_convertvector(load<VecU16>(p + 2 * kLanes * i), VecU32) << 16;
      std::memcpy(&out[i], &bits, sizeof(VecF));
    }
  }
};

struct Q8_0 {
  static constexpr int kBytes = 2 + kBlock;
  static void widen_block(const uint8_t* p, VecF* out) {
    const float scale = half_to_float(p);
    for (int i = 0; i < kParts; ++i) out[i] = widen(load<VecI8>(p + 2 + kLanes * i)) * scale;
  }
};

// Byte j holds value j in its low and value j + 16 in its high half.
struct Q4_1 {
  static constexpr int kBytes = 4 + kBlock / 2;
  static void widen_block(const uint8_t* p, VecF* out) {
    const float scale = half_to_float(p), minimum = half_to_float(p + 2);
    for (int i = 0; i < kParts / 2; ++i) {
      const VecU8 q = load<VecU8>(p + 4 + kLanes * i);
      out[i] = widen(static_cast<VecU8>(q & 15)) * scale + minimum;
      out[i + kParts / 2] = widen(static_cast<VecU8>(q >> 4)) * scale + minimum;
    }
  }
};

inline float sum(VecF v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// R rows of weights with N tokens. x is [N, inputs]; y points at [N, outputs].
template <typename Format, int R, int N>
void tile(const uint8_t* w, int64_t row_bytes, const float* x, int64_t inputs, const float* bias, float* y,
          int64_t outputs) {
  VecF acc[R][N] = {};
  const int64_t blocks = inputs / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    VecF weights[R][kParts];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) Format::widen_block(w + r * row_bytes + b * Format::kBytes, weights[r]);
#pragma GCC unroll 16
    for (int i = 0; i < kParts; ++i) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const VecF value = load<VecF>(x + n * inputs + b * kBlock + i * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][n] += weights[r][i] * value;
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) y[n * outputs + r] = sum(acc[r][n]) + (bias ? bias[r] : 0.0f);
}

// R rows of widened weights with all tokens.
template <int R>
void stripe(const float* w, const float* x, int64_t tokens, int64_t inputs, const float* bias, float* y,
            int64_t outputs) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(w);
  const int64_t row_bytes = inputs * 4;
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens)
    tile<Float32, R, kTokens>(bytes, row_bytes, x + t * inputs, inputs, bias, y + t * outputs, outputs);
  for (; t + 2 <= tokens; t += 2)
    tile<Float32, R, 2>(bytes, row_bytes, x + t * inputs, inputs, bias, y + t * outputs, outputs);
  for (; t < tokens; ++t)
    tile<Float32, R, 1>(bytes, row_bytes, x + t * inputs, inputs, bias, y + t * outputs, outputs);
}

template <typename Format>
void widen_rows(const uint8_t* w, float* out, int64_t count) {
  for (int64_t b = 0; b < count / kBlock; ++b) {
    VecF values[kParts];
    Format::widen_block(w + b * Format::kBytes, values);
    std::memcpy(out + b * kBlock, values, sizeof(values));
  }
}

// One token: every weight is used once, so it is widened in registers.
template <typename Format, int R>
void linear_one(const uint8_t* w, const float* x, const float* bias, float* y, int64_t inputs, int64_t outputs) {
  const int64_t row_bytes = inputs / kBlock * Format::kBytes, whole = outputs / R;
#pragma omp parallel for schedule(static)
  for (int64_t p = 0; p < whole; ++p) {
    const int64_t o = p * R;
    tile<Format, R, 1>(w + o * row_bytes, row_bytes, x, inputs, bias ? bias + o : nullptr, y + o, outputs);
  }
  for (int64_t o = whole * R; o < outputs; ++o)
    tile<Format, 1, 1>(w + o * row_bytes, row_bytes, x, inputs, bias ? bias + o : nullptr, y + o, outputs);
}

// A few tokens: a stripe of weights is widened once, into a buffer that stays in the cache, and used for all of them.
template <typename Format, int R>
void linear_few(const uint8_t* w, const float* x, const float* bias, float* y, int64_t tokens, int64_t inputs,
                int64_t outputs) {
  const int64_t row_bytes = inputs / kBlock * Format::kBytes, whole = outputs / R;
#pragma omp parallel
  {
    std::vector<float> widened(R * inputs);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < whole; ++p) {
      const int64_t o = p * R;
      widen_rows<Format>(w + o * row_bytes, widened.data(), R * inputs);
      stripe<R>(widened.data(), x, tokens, inputs, bias ? bias + o : nullptr, y + o, outputs);
    }
  }
  std::vector<float> widened(inputs);
  for (int64_t o = whole * R; o < outputs; ++o) {
    widen_rows<Format>(w + o * row_bytes, widened.data(), inputs);
    stripe<1>(widened.data(), x, tokens, inputs, bias ? bias + o : nullptr, y + o, outputs);
  }
}

// Many tokens: they lie across the lanes, in panels [inputs][V * kLanes], so that no sum crosses lanes. R rows of
// weights by one panel; a block of each is widened into a buffer of the stack, from which every value is broadcast.
template <typename Format, int R, int V>
void panel_tile(const uint8_t* w, int64_t row_bytes, const float* panel, int64_t inputs, const float* bias, float* y,
                int64_t tokens, int64_t outputs) {
  VecF total[R][V] = {}, acc[R][V] = {};
  const int64_t blocks = inputs / kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    alignas(64) float widened[R][kBlock];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      VecF values[kParts];
      Format::widen_block(w + r * row_bytes + b * Format::kBytes, values);
      std::memcpy(widened[r], values, sizeof(values));
    }
#pragma GCC unroll 1
    for (int i = 0; i < kBlock; ++i, panel += V * kLanes) {
      VecF value[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) value[v] = load<VecF>(panel + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[r][v] += value[v] * widened[r][i];
      }
    }
    // A lane adds all its inputs one after the other: sums of sums keep the rounding error as small as elsewhere.
    if (b % kSumBlocks == kSumBlocks - 1 || b == blocks - 1) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          total[r][v] += acc[r][v];
          acc[r][v] = VecF{};
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float row[V * kLanes];
    std::memcpy(row, total[r], sizeof(row));
    for (int64_t t = 0; t < tokens; ++t) y[t * outputs + r] = row[t] + (bias ? bias[r] : 0.0f);
  }
}

// `rows` rows of weights by one panel.
template <typename Format, int V>
void panel_stripe(const uint8_t* w, int64_t rows, int64_t row_bytes, const float* panel, int64_t inputs,
                  const float* bias, float* y, int64_t tokens, int64_t outputs) {
  constexpr int R = kPanelRows[V - 1];
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    panel_tile<Format, R, V>(w + r * row_bytes, row_bytes, panel, inputs, bias ? bias + r : nullptr, y + r, tokens,
                             outputs);
  for (; r < rows; ++r)
    panel_tile<Format, 1, V>(w + r * row_bytes, row_bytes, panel, inputs, bias ? bias + r : nullptr, y + r, tokens,
                             outputs);
}

// The first `tokens` rows of x as a panel of V vectors; lanes past the last token are zero.
template <int V>
void fill_panel(const float* x, int64_t tokens, int64_t inputs, float* panel) {
  std::memset(panel, 0, inputs * V * kLanes * sizeof(float));
  for (int64_t i = 0; i < inputs; i += kBlock)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t j = i; j < i + kBlock; ++j) panel[j * V * kLanes + t] = x[t * inputs + j];
}

// f(integral constant V, first token, tokens) for panel p of a batch.
template <typename F>
void with_panel(int64_t p, int64_t tokens, F f) {
  const int64_t first = p * kPanelTokens, count = std::min(tokens - first, kPanelTokens);
  if (count > 2 * kLanes) return f(std::integral_constant<int, 3>(), first, count);
  if (count > kLanes) return f(std::integral_constant<int, 2>(), first, count);
  f(std::integral_constant<int, 1>(), first, count);
}

template <typename Format>
void linear_many(const uint8_t* w, const float* x, const float* bias, float* y, int64_t tokens, int64_t inputs,
                 int64_t outputs) {
  const int64_t row_bytes = inputs / kBlock * Format::kBytes;
  const int64_t panels = (tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t stripes = (outputs + kStripeRows - 1) / kStripeRows;
  std::unique_ptr<float[]> packed(new float[panels * kPanelTokens * inputs]);
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      with_panel(p, tokens, [&](auto v, int64_t first, int64_t count) {
        fill_panel<v()>(x + first * inputs, count, inputs, packed.get() + first * inputs);
      });
#pragma omp for schedule(static)
    for (int64_t s = 0; s < stripes; ++s) {
      const int64_t o = s * kStripeRows, rows = std::min(outputs - o, kStripeRows);
      for (int64_t p = 0; p < panels; ++p)
        with_panel(p, tokens, [&](auto v, int64_t first, int64_t count) {
          panel_stripe<Format, v()>(w + o * row_bytes, rows, row_bytes, packed.get() + first * inputs, inputs,
                                    bias ? bias + o : nullptr, y + first * outputs + o, count, outputs);
        });
    }
  }
}

template <typename Format>
void linear(const uint8_t* w, const float* x, const float* bias, float* y, int64_t tokens, int64_t inputs,
            int64_t outputs) {
  if (tokens == 1) {
    linear_one<Format, kRowsForOneToken>(w, x, bias, y, inputs, outputs);
  } else if (tokens < kManyTokens) {
    linear_few<Format, kRows>(w, x, bias, y, tokens, inputs, outputs);
  } else {
    linear_many<Format>(w, x, bias, y, tokens, inputs, outputs);
  }
}

template <typename Format>
void unpack(const uint8_t* w, float* y, int64_t count) {
  const int64_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t start = c * kChunk, size = count - start < kChunk ? count - start : kChunk;
    widen_rows<Format>(w + start / kBlock * Format::kBytes, y + start, size);
  }
}

}  // namespace

#define SGL_EXPORT(name, Format)                                                                                   \
  extern "C" void sgl_linear_##name(const uint8_t* w, const float* x, const float* bias, float* y, int64_t tokens, \
                                    int64_t inputs, int64_t outputs) {                                             \
    linear<Format>(w, x, bias, y, tokens, inputs, outputs);                                                        \
  }                                                                                                                \
  extern "C" void sgl_unpack_##name(const uint8_t* w, float* y, int64_t count) { unpack<Format>(w, y, count); }

SGL_EXPORT(bf16, BFloat16)
SGL_EXPORT(q8_0, Q8_0)
SGL_EXPORT(q4_1, Q4_1)
