// The small operators of a decode step, each in one pass: with one token a sequence, what they cost in torch is mostly
// the calls. float32; see ops/{norm,activation,attention}.py for the definitions.
//
// Shape legend: T tokens, H hidden size, I MLP size, B sequences, L tokens attended to, D head dimension.

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t kParallelTokens = 8;  // below, waking the other threads costs more than they save

constexpr int64_t kAhead = 16;
constexpr float kLowest = -3.4e38f;

inline float dot(const float* a, const float* b, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

// Asks for a row that is needed `kAhead` tokens later: rows lie anywhere, which no hardware prefetcher foresees.
inline void prefetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(row + i);
}

// One KV head of one sequence, with the `group` query heads that share it; scores has room for `length`. D is the head
// dimension where it is known at compile time, so that a head's output stays in registers, and 0 elsewhere.
template <int D>
void attend(const float* q, const float* k, const float* v, const int64_t* locs, int64_t length, int64_t group,
            int64_t head_dim, int64_t row, float scale, float* scores, float* out) {
  const int64_t dim = D ? D : head_dim;
  for (int64_t g = 0; g < group; ++g) {
    const float* query = q + g * dim;
    float* y = out + g * dim;
    float largest = kLowest, total = 0;
    for (int64_t t = 0; t < length; ++t) {
      if (g == 0 && t + kAhead < length) prefetch(k + locs[t + kAhead] * row, dim);
      scores[t] = scale * dot(query, k + locs[t] * row, dim);
    }
    for (int64_t t = 0; t < length; ++t) largest = scores[t] > largest ? scores[t] : largest;
    for (int64_t t = 0; t < length; ++t) scores[t] = std::exp(scores[t] - largest);
    for (int64_t t = 0; t < length; ++t) total += scores[t];
    if constexpr (D > 0) {
      float sum[D] = {};
      for (int64_t t = 0; t < length; ++t) {
        const float* value = v + locs[t] * row;
        if (g == 0 && t + kAhead < length) prefetch(v + locs[t + kAhead] * row, dim);
        for (int d = 0; d < D; ++d) sum[d] += scores[t] * value[d];
      }
      for (int d = 0; d < D; ++d) y[d] = sum[d] / total;
    } else {
      for (int64_t d = 0; d < dim; ++d) y[d] = 0;
      for (int64_t t = 0; t < length; ++t) {
        const float* value = v + locs[t] * row;
        for (int64_t d = 0; d < dim; ++d) y[d] += scores[t] * value[d];
      }
      for (int64_t d = 0; d < dim; ++d) y[d] /= total;
    }
  }
}

template <int D>
void decode_attention(const float* q, const float* k, const float* v, const int64_t* locs, const int64_t* lengths,
                      float* out, int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim, int64_t width,
                      int64_t q_stride, float scale) {
  const int64_t group = heads / kv_heads, row = kv_heads * dim;
#pragma omp parallel
  {
    std::vector<float> scores(width);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < kv_heads; ++h)
        attend<D>(q + b * q_stride + h * group * dim, k + h * dim, v + h * dim, locs + b * width, lengths[b], group,
                  dim, row, scale, scores.data(), out + (b * heads + h * group) * dim);
  }
}

}  // namespace

// residual[T, H] += x; out = residual / rms(residual) * weight.
extern "C" void sgl_add_rms_norm(const float* x, float* residual, const float* weight, float* out, int64_t tokens,
                                 int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (tokens >= kParallelTokens)
  for (int64_t t = 0; t < tokens; ++t) {
    const float* in = x + t * size;
    float *sum = residual + t * size, *y = out + t * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += in[i];
    const float factor = 1.0f / std::sqrt(dot(sum, sum, size) / size + eps);
    for (int64_t i = 0; i < size; ++i) y[i] = sum[i] * factor * weight[i];
  }
}

// out[T, I] = silu(gate) * up of gate_up[T, 2 I].
extern "C" void sgl_silu_and_mul(const float* gate_up, float* out, int64_t tokens, int64_t size) {
#pragma omp parallel for schedule(static) if (tokens >= kParallelTokens)
  for (int64_t t = 0; t < tokens; ++t) {
    const float *gate = gate_up + 2 * t * size, *up = gate + size;
    float* y = out + t * size;
    for (int64_t i = 0; i < size; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
  }
}

// One new token for each of B sequences: q[B, heads, D] (rows q_stride apart), pools [rows, kv_heads, D],
// locs[B, width] pool rows, of which the first lengths[b] count. out[B, heads, D].
extern "C" void sgl_decode_attention(const float* q, const float* k, const float* v, const int64_t* locs,
                                     const int64_t* lengths, float* out, int64_t batch, int64_t heads,
                                     int64_t kv_heads, int64_t dim, int64_t width, int64_t q_stride, float scale) {
  const auto attention = dim == 64    ? decode_attention<64>
                         : dim == 128 ? decode_attention<128>
                                      : decode_attention<0>;
  attention(q, k, v, locs, lengths, out, batch, heads, kv_heads, dim, width, q_stride, scale);
}
