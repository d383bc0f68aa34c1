// Attention of one new token per row over the row's key-value cache, with rotary positions.
//
// q and out are (rows, heads, size), k and v (rows, kv_heads, size), cosine and sine (rows, size / 2) float32. Caches are
// (slots, kv_heads, capacity, size). Row r uses the slot slots[r], which holds positions[r] tokens. The new rotated key
// and the new value are appended. With window > 0 the query attends only to the last `window` tokens. With cap > 0 a score
// s becomes cap * tanh(s / cap). One thread computes
// one row and one key-value head: results depend neither on the number of threads nor on the other rows.
#include "vectors.h"

constexpr int64_t TOKEN_BLOCK = 16;  // cached tokens per block

template <class T>
static void rotate(int64_t half, const T *from, const float *cosine, const float *sine, float scale, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float first = get(from[i]) * scale, second = get(from[half + i]) * scale;
    to[i] = first * cosine[i] - second * sine[i];
    to[half + i] = second * cosine[i] + first * sine[i];
  }
}

// Converts TOKEN_BLOCK cache rows to rows of `size` numbers (a multiple of LANES); rows from `count` on are zero.
template <class T>
static void load(int64_t count, int64_t width, int64_t size, const T *from, float *to) {
  for (int64_t j = 0; j < TOKEN_BLOCK; j++)
    if (j < count)
#pragma omp simd
      for (int64_t i = 0; i < width; i++) to[j * size + i] = get(from[j * width + i]);
    else
      std::fill(to + j * size, to + j * size + width, 0.0f);
}

// Adds to N vectors of `to` the weighted sum of TOKEN_BLOCK rows.
template <int N>
static inline void add_weighted(int64_t size, const float *weights, const float *rows, float *to) {
  vec sums[N];
  for (int n = 0; n < N; n++) sums[n] = *(const vec *)(to + n * LANES);
#pragma GCC unroll 16
  for (int64_t j = 0; j < TOKEN_BLOCK; j++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sums[n] += *(const vec *)(rows + j * size + n * LANES) * weights[j];
  for (int n = 0; n < N; n++) *(vec *)(to + n * LANES) = sums[n];
}

// `kv_groups` query heads with one key-value head of the cache, each of `width` numbers. `pitch` is the row stride of
// `scores`. The caller passes zeros in `weighted` and in the padding behind `width` of a query.
template <class T>
static void attend_one(int64_t kv_groups, int64_t width, int64_t num_tokens, int64_t pitch, float cap, const float *queries,
                       const T *keys, const T *values, float *scores, float *rows, float *weighted, T *out) {
  const int64_t size = round_up(width, LANES);
  for (int64_t first = 0; first < num_tokens; first += TOKEN_BLOCK) {
    load(std::min(TOKEN_BLOCK, num_tokens - first), width, size, keys + first * width, rows);
    for (int64_t head = 0; head < kv_groups; head++) {
      vec sums[TOKEN_BLOCK] = {};
      for (int64_t i = 0; i < size; i += LANES) {
        const vec query = *(const vec *)(queries + head * size + i);
#pragma GCC unroll 16
        for (int64_t j = 0; j < TOKEN_BLOCK; j++) sums[j] += query * *(const vec *)(rows + j * size + i);
      }
      lane_sums(sums, TOKEN_BLOCK, scores + head * pitch + first);
    }
  }
  for (int64_t head = 0; head < kv_groups; head++) {
    float *row = scores + head * pitch, sum = 0;
    if (cap)
#pragma omp simd
      for (int64_t j = 0; j < num_tokens; j++) row[j] = cap * fast_tanh(row[j] / cap);
    const float high = maximum(row, num_tokens);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < num_tokens; j++) sum += row[j] = fast_exp(row[j] - high);
    const float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < num_tokens; j++) row[j] *= inverse;
    std::fill(row + num_tokens, row + pitch, 0.0f);
  }
  for (int64_t first = 0; first < num_tokens; first += TOKEN_BLOCK) {
    load(std::min(TOKEN_BLOCK, num_tokens - first), width, size, values + first * width, rows);
    for (int64_t head = 0; head < kv_groups; head++) {
      int64_t i = 0;
      for (; i + 4 * LANES <= size; i += 4 * LANES) add_weighted<4>(size, scores + head * pitch + first, rows + i,
                                                                    weighted + head * size + i);
      for (; i < size; i += LANES) add_weighted<1>(size, scores + head * pitch + first, rows + i, weighted + head * size + i);
    }
  }
  for (int64_t head = 0; head < kv_groups; head++)
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(weighted[head * size + i], out[head * width + i]);
}

template <class T>
static void attend_cache(int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window, float cap,
                         const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v,
                         const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads) {
  const int64_t kv_groups = heads / kv_heads, half = size / 2, padded_size = round_up(size, LANES);
  const float scale = 1.0f / std::sqrt(float(size));
  const auto attend = [&](int64_t task) {
    static thread_local Floats workspace;
    const int64_t row = task / kv_heads, last = positions[row] + 1;
    const int64_t first = window ? std::max<int64_t>(0, last - window) : 0, pitch = round_up(last - first, TOKEN_BLOCK);
    const int64_t num_floats = (2 * kv_groups + TOKEN_BLOCK) * padded_size + kv_groups * pitch;
    if (int64_t(workspace.size()) < num_floats) workspace.resize(2 * num_floats);
    float *queries = workspace.data(), *weighted = queries + kv_groups * padded_size,
        *widened = weighted + kv_groups * padded_size, *scores = widened + TOKEN_BLOCK * padded_size;
    std::fill(queries, scores, 0.0f);
    T *keys = k_cache + (slots[row] * kv_heads + task % kv_heads) * capacity * size;
    T *values = v_cache + (slots[row] * kv_heads + task % kv_heads) * capacity * size;
    const float *c = cosine + row * half, *s = sine + row * half;
    rotate(half, k + task * size, c, s, 1.0f, widened);
    for (int64_t i = 0; i < size; i++) put(widened[i], keys[(last - 1) * size + i]);
    std::copy(v + task * size, v + (task + 1) * size, values + (last - 1) * size);
    const int64_t from = task * kv_groups * size;
    for (int64_t head = 0; head < kv_groups; head++) rotate(half, q + from + head * size, c, s, scale,
                                                            queries + head * padded_size);
    attend_one(kv_groups, size, last - first, pitch, cap, queries, keys + first * size, values + first * size, scores, widened,
               weighted, out + from);
  };
  together(threads, [&](Member &me) { me.take_each(rows * kv_heads, attend); });
}
#define PARAMETERS(T) (int64_t rows, int64_t heads, int64_t kv_heads, int64_t size, int64_t capacity, int64_t window, float cap, const int64_t *slots, const int64_t *positions, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *k_cache, T *v_cache, T *out, int threads)
FOR_BOTH_TYPES_TOGETHER(attend_cache, (rows, heads, kv_heads, size, capacity, window, cap, slots, positions, q, k, v, cosine, sine, k_cache, v_cache, out, threads))
#undef PARAMETERS

// Runs `count` recorded calls (model/native/recording.py): NAME_TYPE_words of each kernel, and its arguments.
extern "C" void run_recorded(int64_t count, void (*const *kernels)(const int64_t *, int), const int64_t *const *words, int threads) {
  in_new_team(threads, [&](Member &me) {
    member = &me;
    for (int64_t i = 0; i < count; i++) {
      kernels[i](words[i], threads);
      me.team.wait();
    }
    member = nullptr;
  });
}
