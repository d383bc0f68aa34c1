// Causal attention of packed documents with rotary positions, forward and backward, in blocks of queries.
//
// q and o are (tokens, heads, size), k and v (tokens, kv_heads, size), cosine and sine (tokens, size / 2) float32,
// lse (tokens, heads) float32. Document d holds the tokens index[starts[d]] .. index[starts[d + 1] - 1]. Documents with a
// common prefix share its tokens, and tokens are numbered in the order in which they first occur. A query attends to the
// keys of its document up to its own position, and with window > 0 only to the last `window` of them. With cap > 0 a score
// s becomes cap * tanh(s / cap). Scores exist for
// one block of queries at a time, in float32 (FlashAttention, Dao 2023). One thread computes one document and one
// key-value head. Thus results depend neither on the number of threads nor on the other documents of the pack.
#include "documents.h"
#include "dots.h"
#include "vectors.h"

#include <cstdlib>
#include <type_traits>

constexpr int ROWS = LANES / 2;
constexpr int64_t QUERIES = 64;      // queries of one block
constexpr int64_t PAD = 2 * LANES;   // the number of columns is a multiple of this

// C[m, n] (+)= sum_k A[m * a_row + k * a_column] * B[k, n] for ROWS rows and COLUMNS vectors.
template <int COLUMNS>
static inline void tile(int64_t depth, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                        float *c, int64_t c_row, bool add) {
  vec sum[ROWS][COLUMNS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < COLUMNS; n++) sum[m][n] = add ? *(const vec *)(c + m * c_row + n * LANES) : vec{};
  for (int64_t k = 0; k < depth; k++) {
    vec row[COLUMNS];
    for (int n = 0; n < COLUMNS; n++) row[n] = *(const vec *)(b + k * b_row + n * LANES);
    for (int m = 0; m < ROWS; m++) {
      float factor = a[m * a_row + k * a_column];
      for (int n = 0; n < COLUMNS; n++) sum[m][n] += row[n] * factor;
    }
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < COLUMNS; n++) *(vec *)(c + m * c_row + n * LANES) = sum[m][n];
}

// rows is a multiple of ROWS, columns is a multiple of LANES.
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                    const float *b, int64_t b_row, float *c, int64_t c_row, bool add) {
  for (int64_t n = 0; n < columns;) {
    bool wide = columns - n >= 2 * LANES;
    for (int64_t m = 0; m < rows; m += ROWS) {
      if (wide)
        tile<2>(depth, a + m * a_row, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, add);
      else
        tile<1>(depth, a + m * a_row, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row, add);
    }
    n += wide ? 2 * LANES : LANES;
  }
}

struct Shape {
  int64_t heads, kv_heads, size, window;
  float scale, cap;
};

// Replaces scores by cap * tanh(score / cap); `slopes`, if given, gets the derivatives.
static void cap_scores(int64_t count, float cap, float *scores, float *slopes) {
  const float inverse = 1.0f / cap;
#pragma omp simd
  for (int64_t i = 0; i < count; i++) {
    const float ratio = fast_tanh(scores[i] * inverse);
    scores[i] = cap * ratio;
    if (slopes) slopes[i] = 1.0f - ratio * ratio;
  }
}

static void transpose(int64_t rows, int64_t columns, const float *from, float *to, int64_t to_row) {
  for (int64_t block = 0; block < rows; block += 16)
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = block; i < std::min(block + 16, rows); i++) to[j * to_row + i] = from[i * columns + j];
}

// The keys for the queries first .. first + count - 1: from `low` (a multiple of PAD) to `high` (rounded up to PAD).
struct Range {
  int64_t low, high;
  Range(int64_t first, int64_t count, int64_t window)
      : low(window ? std::max<int64_t>(0, first - window + 1) / PAD * PAD : 0), high(round_up(first + count, PAD)) {}
};

#include "attention_dots.h"

template <class T>
static void attend_one(const Shape &shape, const Document &document, int64_t kv_head, const T *q, const T *k, const T *v,
                       const float *cosine, const float *sine, T *o, float *lse) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, padded = round_up(length, PAD), kv_groups = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size;
  Floats keys(padded * size), keys_t(padded * size), values(padded * size), queries(QUERIES * size),
      scores(QUERIES * padded), weighted(QUERIES * size);
  load(length, size, rows_of, k + kv_head * size, kv_row, cosine, sine, 1.0f, keys.data());
  transpose(length, size, keys.data(), keys_t.data(), padded);
  load(length, size, rows_of, v + kv_head * size, kv_row, nullptr, nullptr, 1.0f, values.data());
  for (int64_t head = kv_head * kv_groups; head < (kv_head + 1) * kv_groups; head++)
    for (int64_t first = document.first_own, count; first < length; first += count) {
      count = std::min(QUERIES - first % QUERIES, length - first);
      const int64_t rows = round_up(count, ROWS);
      const Range range(first, count, shape.window);
      const int64_t num_keys = range.high - range.low;
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, queries.data());
      std::fill(queries.begin() + count * size, queries.begin() + rows * size, 0.0f);
      product(rows, num_keys, size, queries.data(), size, 1, keys_t.data() + range.low, padded, scores.data(), num_keys, false);
      for (int64_t t = 0; t < rows; t++) {
        float *row = scores.data() + t * num_keys;
        const int64_t position = first + t, end_key = position + 1 - range.low;
        const int64_t first_key = shape.window ? std::max<int64_t>(0, position - shape.window + 1 - range.low) : 0;
        if (t >= count) {
          std::fill(row, row + num_keys, 0.0f);
          continue;
        }
        std::fill(row, row + first_key, 0.0f);
        std::fill(row + end_key, row + num_keys, 0.0f);
        float sum = 0;
        if (shape.cap) cap_scores(end_key - first_key, shape.cap, row + first_key, nullptr);
        const float high = maximum(row + first_key, end_key - first_key);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = first_key; j < end_key; j++) sum += row[j] = fast_exp(row[j] - high);
        lse[rows_of[position] * shape.heads + head] = high + std::log(sum);
        const float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = first_key; j < end_key; j++) row[j] *= inverse;
      }
      product(rows, size, num_keys, scores.data(), num_keys, 1, values.data() + range.low * size, size, weighted.data(), size,
              false);
      store(count, size, weighted.data(), rows_of + first, nullptr, nullptr, 1.0f, o + head * size, q_row);
    }
}

template <class T>
static void attend_one_backward(const Shape &shape, const Document &document, int64_t kv_head, const T *q, const T *k,
                                const T *v, const T *d_o, const float *lse, const float *cosine, const float *sine, T *dq,
                                T *dk, T *dv, float *slots_k, float *slots_v) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, padded = round_up(length, PAD), kv_groups = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size;
  Floats keys(padded * size), keys_t(padded * size), values(padded * size), values_t(padded * size),
      d_keys(padded * size),
      d_values(padded * size), queries(QUERIES * size), grad_output(QUERIES * size), d_queries(QUERIES * size),
      scores(QUERIES * padded), d_scores(QUERIES * padded), slopes(shape.cap ? padded : 0);
  load(length, size, rows_of, k + kv_head * size, kv_row, cosine, sine, 1.0f, keys.data());
  transpose(length, size, keys.data(), keys_t.data(), padded);
  load(length, size, rows_of, v + kv_head * size, kv_row, nullptr, nullptr, 1.0f, values.data());
  transpose(length, size, values.data(), values_t.data(), padded);
  for (int64_t head = kv_head * kv_groups; head < (kv_head + 1) * kv_groups; head++)
    for (int64_t first = document.first_own, count; first < length; first += count) {
      count = std::min(QUERIES - first % QUERIES, length - first);
      const int64_t rows = round_up(count, ROWS);
      const Range range(first, count, shape.window);
      const int64_t num_keys = range.high - range.low;
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, queries.data());
      load(count, size, rows_of + first, d_o + head * size, q_row, nullptr, nullptr, 1.0f, grad_output.data());
      std::fill(queries.begin() + count * size, queries.begin() + rows * size, 0.0f);
      std::fill(grad_output.begin() + count * size, grad_output.begin() + rows * size, 0.0f);
      product(rows, num_keys, size, queries.data(), size, 1, keys_t.data() + range.low, padded, scores.data(), num_keys, false);
      product(rows, num_keys, size, grad_output.data(), size, 1, values_t.data() + range.low, padded, d_scores.data(), num_keys,
              false);
      for (int64_t t = 0; t < rows; t++) {
        float *row = scores.data() + t * num_keys, *d_row = d_scores.data() + t * num_keys;
        const int64_t position = first + t, end_key = position + 1 - range.low;
        const int64_t first_key = shape.window ? std::max<int64_t>(0, position - shape.window + 1 - range.low) : 0;
        if (t >= count) {
          std::fill(row, row + num_keys, 0.0f);
          std::fill(d_row, d_row + num_keys, 0.0f);
          continue;
        }
        std::fill(row, row + first_key, 0.0f);
        std::fill(row + end_key, row + num_keys, 0.0f);
        std::fill(d_row, d_row + first_key, 0.0f);
        std::fill(d_row + end_key, d_row + num_keys, 0.0f);
        if (shape.cap) cap_scores(end_key - first_key, shape.cap, row + first_key, slopes.data());
        float delta = 0;  // sum_j p_j dp_j of the row (softmax backward)
        const float log_sum = lse[rows_of[position] * shape.heads + head];
#pragma omp simd reduction(+ : delta)
        for (int64_t j = first_key; j < end_key; j++) {
          row[j] = fast_exp(row[j] - log_sum);
          delta += row[j] * d_row[j];
        }
#pragma omp simd
        for (int64_t j = first_key; j < end_key; j++) d_row[j] = row[j] * (d_row[j] - delta);
        if (shape.cap)
#pragma omp simd
          for (int64_t j = first_key; j < end_key; j++) d_row[j] *= slopes[j - first_key];
      }
      product(num_keys, size, count, scores.data(), 1, num_keys, grad_output.data(), size, d_values.data() + range.low * size,
              size, true);
      product(num_keys, size, count, d_scores.data(), 1, num_keys, queries.data(), size, d_keys.data() + range.low * size, size,
              true);
      product(rows, size, num_keys, d_scores.data(), num_keys, 1, keys.data() + range.low * size, size, d_queries.data(), size,
              false);
      store(count, size, d_queries.data(), rows_of + first, cosine, sine, shape.scale, dq + head * size, q_row);
    }
  store_gradients(document, size, d_keys.data(), cosine, sine, dk + kv_head * size, slots_k + kv_head * size, kv_row);
  store_gradients<T>(document, size, d_values.data(), nullptr, nullptr, dv + kv_head * size, slots_v + kv_head * size, kv_row);
}

template <class T>
static void attend(int64_t count, const int64_t *starts, const int64_t *index, int64_t known, int64_t heads, int64_t kv_heads,
                   int64_t size, int64_t window, float cap, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *o,
                   float *lse, int threads) {
  const Shape shape{heads, kv_heads, size, window, 1.0f / std::sqrt(float(size)), cap};
  const auto documents = costliest_first(documents_of(count, starts, index, known));
  [[maybe_unused]] const bool on_tiles = may_use_tiles();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < count * kv_heads; item++) {
    const Document &document = documents[item / kv_heads];
#ifdef HAS_DOTS
    if constexpr (std::is_same_v<T, bf16>)
      if (size % 32 == 0) {
        const Tiles tiles(on_tiles);
        attend_one_dots(on_tiles, shape, document, item % kv_heads, q, k, v, cosine, sine, o, lse);
        continue;
      }
#endif
    attend_one(shape, document, item % kv_heads, q, k, v, cosine, sine, o, lse);
  }
}
#define PARAMETERS(T) (int64_t count, const int64_t *starts, const int64_t *index, int64_t known, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, float cap, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *o, float *lse, int threads)
FOR_BOTH_TYPES(attend, (count, starts, index, known, heads, kv_heads, size, window, cap, q, k, v, cosine, sine, o, lse, threads))
#undef PARAMETERS

template <class T>
static void attend_backward(int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads,
                            int64_t size, int64_t window, float cap, const T *q, const T *k, const T *v, const T *d_o, const float *lse,
                            const float *cosine, const float *sine, T *dq, T *dk, T *dv, int threads) {
  const Shape shape{heads, kv_heads, size, window, 1.0f / std::sqrt(float(size)), cap};
  const auto in_pack_order = documents_of(count, starts, index), documents = costliest_first(in_pack_order);
  const int64_t slots = (in_pack_order.back().slot + in_pack_order.back().first_unshared) * kv_heads * size;
  Floats slots_k(slots), slots_v(slots);
  [[maybe_unused]] const bool on_tiles = may_use_tiles();
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < count * kv_heads; item++) {
    const Document &document = documents[item / kv_heads];
#ifdef HAS_DOTS
    if constexpr (std::is_same_v<T, bf16>)
      if (size % 32 == 0) {
        const Tiles tiles(on_tiles);
        attend_one_backward_dots(on_tiles, shape, document, item % kv_heads, q, k, v, d_o, lse, cosine, sine, dq, dk, dv,
                                 slots_k.data(), slots_v.data());
        continue;
      }
#endif
    attend_one_backward(shape, document, item % kv_heads, q, k, v, d_o, lse, cosine, sine, dq, dk, dv, slots_k.data(),
                        slots_v.data());
  }
#pragma omp parallel for num_threads(threads) schedule(static) if (slots)
  for (int64_t item = 0; item < 2 * kv_heads; item++)
    add_slots(in_pack_order, kv_heads * size, size, item / 2, (item % 2 ? slots_v : slots_k).data(), item % 2 ? dv : dk);
}
#define PARAMETERS(T) (int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, float cap, const T *q, const T *k, const T *v, const T *d_o, const float *lse, const float *cosine, const float *sine, T *dq, T *dk, T *dv, int threads)
FOR_BOTH_TYPES(attend_backward, (count, starts, index, heads, kv_heads, size, window, cap, q, k, v, d_o, lse, cosine, sine, dq, dk, dv, threads))
#undef PARAMETERS
