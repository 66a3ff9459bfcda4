// What stands between the matrix products of a Llama-shaped layer: RMSNorm, rotary embedding with the KV's way into
// the pool, and the gated activation. All in float32; every row by itself.

#include <cmath>

#include "native_vector.h"

namespace {

constexpr int64_t ROWS_WORTH_A_THREAD = 16;

void normalize(const float* x, const float* weight, float epsilon, int64_t size, float* out) {
  Vec sums = {};
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    Vec value = load(x + i);
    sums += value * value;
  }
  float total = sum_lanes(sums);
  for (; i < size; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * scale);
}

// (a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves of the head (Su et al. 2021, in Llama's order).
void rotate(float* head, const float* cosines, const float* sines, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i + half] + a * sines[i + half];
  }
}

template <typename Kv>
void store_head(const float* head, Kv* to, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; ++i) narrow(head[i], to + i);
}

}  // namespace

extern "C" {

void ampd_rms_norm(const float* x, int64_t x_stride, int64_t rows, int64_t size, const float* weight, float epsilon,
                   float* out, int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= ROWS_WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; ++row)
    normalize(x + row * x_stride, weight, epsilon, size, out + row * out_stride);
}

// qkv [rows, (query heads + 2 kv heads) * head_dim]: queries are normalised (if their weight is given) and rotated in
// place, keys too, then keys and values go to their slots of the pool. `pool` points to the keys of block 0.
void ampd_rope_and_store(float* qkv, int64_t stride, int64_t rows, int64_t query_heads, int64_t kv_heads,
                         int64_t head_dim, const float* cosines, const float* sines, const float* query_norm,
                         const float* key_norm, float epsilon, void* pool, int is_bf16, int64_t block_stride,
                         int64_t value_offset, const int64_t* blocks, const int64_t* slots, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= ROWS_WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; ++row) {
    float* heads = qkv + row * stride;
    for (int64_t h = 0; h < query_heads + kv_heads; ++h) {
      float* head = heads + h * head_dim;
      const float* norm = h < query_heads ? query_norm : key_norm;
      if (norm) normalize(head, norm, epsilon, head_dim, head);
      rotate(head, cosines + row * head_dim, sines + row * head_dim, head_dim);
    }
    const float* keys = heads + query_heads * head_dim;
    const int64_t width = kv_heads * head_dim;
    const int64_t offset = blocks[row] * block_stride + slots[row] * width;
    if (is_bf16) {
      store_head(keys, static_cast<Bf16*>(pool) + offset, width);
      store_head(keys + width, static_cast<Bf16*>(pool) + offset + value_offset, width);
    } else {
      store_head(keys, static_cast<float*>(pool) + offset, width);
      store_head(keys + width, static_cast<float*>(pool) + offset + value_offset, width);
    }
  }
}

// gate_up [rows, 2 * up_offset]: gate = silu(gate) * up, in place in the first half.
void ampd_silu_and_multiply(float* gate_up, int64_t stride, int64_t rows, int64_t up_offset, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= ROWS_WORTH_A_THREAD)
  for (int64_t row = 0; row < rows; ++row) {
    float* gate = gate_up + row * stride;
    const float* up = gate + up_offset;
    for (int64_t i = 0; i < up_offset; i += LANES) {
      const Vec x = load(gate + i);
      // silu(x) = x / (1 + e^-x) = x e^min(x,0) / (1 + e^-|x|): the exponent is never positive
      const Vec decayed = exp_nonpositive(x > 0.0f ? -x : x);
      const Vec numerator = x > 0.0f ? x : x * decayed;
      store(gate + i, numerator / (1.0f + decayed) * load(up + i));
    }
  }
}
}
