// Attention of one new token a row over the row's cache of keys and values, with rotary positions.
//
// q and out are (rows, heads, size), k and v (rows, kv_heads, size), cosine and sine (rows, size / 2) float32. Row r
// lives in the cache's slot slots[r]; caches are (slots, kv_heads, capacity, size) and hold positions[r] tokens of it.
// The new key, turned, and value are written behind them. With window > 0 only the last `window` tokens are seen. One
// thread does one row and one key-value head: results depend neither on their number nor on the other rows.
#include "common.h"

#include <vector>

template <class T>
static void turn(int64_t half, const T *from, const float *cosine, const float *sine, float scale, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float first = get(from[i]) * scale, second = get(from[half + i]) * scale;
    to[i] = first * cosine[i] - second * sine[i];
    to[half + i] = second * cosine[i] + first * sine[i];
  }
}

// `shared` heads of q against one head of the cache; out may be the memory of q
template <class T>
static void attend_one(int64_t shared, int64_t size, int64_t first, int64_t last, const float *queries, const T *keys,
                       const T *values, float *scores, float *wide, float *mixed, T *out) {
  const int64_t seen = last - first;
  for (int64_t j = 0; j < seen; j++) {
    const T *key = keys + (first + j) * size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) wide[i] = get(key[i]);
    for (int64_t head = 0; head < shared; head++) {
      const float *query = queries + head * size;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; i++) sum += query[i] * wide[i];
      scores[head * seen + j] = sum;
    }
  }
  for (int64_t head = 0; head < shared; head++) {
    float *row = scores + head * seen, high = -INFINITY, sum = 0;
#pragma omp simd reduction(max : high)
    for (int64_t j = 0; j < seen; j++) high = std::max(high, row[j]);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) sum += row[j] = fast_exp(row[j] - high);
    const float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) row[j] *= inverse;
  }
  std::fill(mixed, mixed + shared * size, 0.0f);
  for (int64_t j = 0; j < seen; j++) {
    const T *value = values + (first + j) * size;
#pragma omp simd
    for (int64_t i = 0; i < size; i++) wide[i] = get(value[i]);
    for (int64_t head = 0; head < shared; head++) {
      const float weight = scores[head * seen + j];
      float *sum = mixed + head * size;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) sum[i] += weight * wide[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < shared * size; i++) put(mixed[i], out[i]);
}

template <class T>
static void attend_cache(int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window,
                         const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v,
                         const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads) {
  const int64_t shared = heads / kv_heads, half = size / 2;
  const float scale = 1.0f / std::sqrt(float(size));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < rows * kv_heads; item++) {
    static thread_local std::vector<float> room;
    const int64_t row = item / kv_heads, last = positions[row] + 1;
    const int64_t first = window ? std::max<int64_t>(0, last - window) : 0, need = shared * (last - first);
    if (int64_t(room.size()) < need + (2 * shared + 1) * size) room.resize(2 * need + (2 * shared + 1) * size);
    float *queries = room.data(), *mixed = queries + shared * size, *wide = mixed + shared * size, *scores = wide + size;
    T *keys = k_cache + (slots[row] * kv_heads + item % kv_heads) * capacity * size;
    T *values = v_cache + (slots[row] * kv_heads + item % kv_heads) * capacity * size;
    const float *c = cosine + row * half, *s = sine + row * half;
    turn(half, k + item * size, c, s, 1.0f, wide);
    for (int64_t i = 0; i < size; i++) put(wide[i], keys[(last - 1) * size + i]);
    std::copy(v + item * size, v + (item + 1) * size, values + (last - 1) * size);
    const int64_t from = item * shared * size;
    for (int64_t head = 0; head < shared; head++)
      turn(half, q + from + head * size, c, s, scale, queries + head * size);
    attend_one(shared, size, first, last, queries, keys, values, scores, wide, mixed, out + from);
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window, const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads)
FOR_BOTH_TYPES(attend_cache, (rows, heads, kv_heads, size, capacity, window, slots, positions, q, k, v, cosine, sine, k_cache, v_cache, out, threads))
#undef PARAMETERS
