// Attention of one new token per row over the row's cache of keys and values, with rotary positions.
//
// q and out are (rows, heads, size), k and v (rows, kv_heads, size), cosine and sine (rows, size / 2) float32. Row r
// has the cache's slot slots[r]; caches are (slots, kv_heads, capacity, size) and hold positions[r] tokens of it.
// The new key, rotated, and value are appended. With window > 0 a query attends to the last `window` tokens only. One
// thread computes one row and one key-value head: results depend neither on the threads nor on the other rows.
#include "vectors.h"

#include <vector>

constexpr int64_t TOGETHER = 16;  // tokens of a cache whose products with one query are computed at a time

template <class T>
static void turn(int64_t half, const T *from, const float *cosine, const float *sine, float scale, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float first = get(from[i]) * scale, second = get(from[half + i]) * scale;
    to[i] = first * cosine[i] - second * sine[i];
    to[half + i] = second * cosine[i] + first * sine[i];
  }
}

// TOGETHER rows of a cache from `from` on, of which `count` exist, as rows of `size` numbers, a multiple of LANES
template <class T>
static void load(int64_t count, int64_t width, int64_t size, const T *from, float *to) {
  for (int64_t j = 0; j < TOGETHER; j++)
    if (j < count)
#pragma omp simd
      for (int64_t i = 0; i < width; i++) to[j * size + i] = get(from[j * width + i]);
    else
      std::fill(to + j * size, to + j * size + width, 0.0f);
}

// Adds to N vectors of `to` those of TOGETHER rows, each multiplied by its weight
template <int N>
static inline void mix(int64_t size, const float *weights, const float *rows, float *to) {
  vec sums[N];
  for (int n = 0; n < N; n++) sums[n] = *(const vec *)(to + n * LANES);
#pragma GCC unroll 16
  for (int64_t j = 0; j < TOGETHER; j++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[n] += *(const vec *)(rows + j * size + n * LANES) * weights[j];
  for (int n = 0; n < N; n++) *(vec *)(to + n * LANES) = sums[n];
}

// `shared` heads of queries against one head of the cache, of `width` numbers each; rows of scores are `pitch` apart.
// The caller sets `mixed`, and the numbers after `width` in each row, to zero.
template <class T>
static void attend_one(int64_t shared, int64_t width, int64_t seen, int64_t pitch, const float *queries, const T *keys,
                       const T *values, float *scores, float *rows, float *mixed, T *out) {
  const int64_t size = padded(width, LANES);
  for (int64_t first = 0; first < seen; first += TOGETHER) {
    load(std::min(TOGETHER, seen - first), width, size, keys + first * width, rows);
    for (int64_t head = 0; head < shared; head++) {
      vec sums[TOGETHER] = {};
      for (int64_t i = 0; i < size; i += LANES) {
        const vec query = *(const vec *)(queries + head * size + i);
#pragma GCC unroll 16
        for (int64_t j = 0; j < TOGETHER; j++) sums[j] += query * *(const vec *)(rows + j * size + i);
      }
      totals(sums, TOGETHER, scores + head * pitch + first);
    }
  }
  for (int64_t head = 0; head < shared; head++) {
    float *row = scores + head * pitch, sum = 0;
    const float high = largest(row, seen);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) sum += row[j] = fast_exp(row[j] - high);
    const float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) row[j] *= inverse;
    std::fill(row + seen, row + pitch, 0.0f);
  }
  for (int64_t first = 0; first < seen; first += TOGETHER) {
    load(std::min(TOGETHER, seen - first), width, size, values + first * width, rows);
    for (int64_t head = 0; head < shared; head++) {
      int64_t i = 0;
      for (; i + 4 * LANES <= size; i += 4 * LANES) mix<4>(size, scores + head * pitch + first, rows + i, mixed + head * size + i);
      for (; i < size; i += LANES) mix<1>(size, scores + head * pitch + first, rows + i, mixed + head * size + i);
    }
  }
  for (int64_t head = 0; head < shared; head++)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(mixed[head * size + i], out[head * width + i]);
}

template <class T>
static void attend_cache(int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window,
                         const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v,
                         const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads) {
  const int64_t shared = heads / kv_heads, half = size / 2, whole = padded(size, LANES);
  const float scale = 1.0f / std::sqrt(float(size));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < rows * kv_heads; item++) {
    static thread_local std::vector<float> room;
    const int64_t row = item / kv_heads, last = positions[row] + 1;
    const int64_t first = window ? std::max<int64_t>(0, last - window) : 0, pitch = padded(last - first, TOGETHER);
    const int64_t need = (2 * shared + TOGETHER) * whole + shared * pitch;
    if (int64_t(room.size()) < need) room.resize(2 * need);
    float *queries = room.data(), *mixed = queries + shared * whole, *wide = mixed + shared * whole, *scores = wide + TOGETHER * whole;
    std::fill(queries, scores, 0.0f);
    T *keys = k_cache + (slots[row] * kv_heads + item % kv_heads) * capacity * size;
    T *values = v_cache + (slots[row] * kv_heads + item % kv_heads) * capacity * size;
    const float *c = cosine + row * half, *s = sine + row * half;
    turn(half, k + item * size, c, s, 1.0f, wide);
    for (int64_t i = 0; i < size; i++) put(wide[i], keys[(last - 1) * size + i]);
    std::copy(v + item * size, v + (item + 1) * size, values + (last - 1) * size);
    const int64_t from = item * shared * size;
    for (int64_t head = 0; head < shared; head++) turn(half, q + from + head * size, c, s, scale, queries + head * whole);
    attend_one(shared, size, last - first, pitch, queries, keys + first * size, values + first * size, scores, wide, mixed, out + from);
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window, const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads)
FOR_BOTH_TYPES(attend_cache, (rows, heads, kv_heads, size, capacity, window, slots, positions, q, k, v, cosine, sine, k_cache, v_cache, out, threads))
#undef PARAMETERS
