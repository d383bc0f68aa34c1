// Causal attention of packed documents with rotary positions, forward and backward, in blocks of queries.
//
// q and o are (tokens, heads, size), k and v (tokens, kv_heads, size), cosine and sine (tokens, size / 2) float32,
// lse (tokens, heads) float32. Document d holds the tokens index[starts[d]] .. index[starts[d + 1] - 1]: documents with
// a common prefix share tokens, which are numbered in the order in which they first occur. A query attends to the keys
// of its document up to itself, and with window > 0 to the last `window` of them only. Scores exist for one block of queries
// at a time, in float32 (the scheme of FlashAttention, Dao 2023). One thread computes one document and one
// key-value head, so results depend neither on the number of threads nor on the other documents of the pack.
#include "documents.h"
#include "dots.h"
#include "vectors.h"

#include <cstdlib>
#include <type_traits>
#include <vector>

constexpr int ROWS = LANES / 2;
constexpr int64_t QUERIES = 64;      // queries of one block
constexpr int64_t PAD = 2 * LANES;   // columns are padded to multiples of this

// C[m, n] (+)= sum_k A[m * a_row + k * a_column] * B[k, n] for ROWS rows and COLUMNS vectors
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

// rows is a multiple of ROWS, columns of LANES
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
  float scale;
};

static void transpose(int64_t rows, int64_t columns, const float *from, float *to, int64_t to_row) {
  for (int64_t block = 0; block < rows; block += 16)
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = block; i < std::min(block + 16, rows); i++) to[j * to_row + i] = from[i * columns + j];
}

// The keys that a block of queries first..first+count attends to: from `low` (a multiple of PAD) to `high` (padded)
struct Range {
  int64_t low, high;
  Range(int64_t first, int64_t count, int64_t window)
      : low(window ? std::max<int64_t>(0, first - window + 1) / PAD * PAD : 0), high(padded(first + count, PAD)) {}
};

#include "attention_dots.h"

template <class T>
static void attend_one(const Shape &shape, const Document &document, int64_t group, const T *q, const T *k, const T *v,
                       const float *cosine, const float *sine, T *o, float *lse) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, all = padded(length, PAD), shared = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size;
  std::vector<float> keys(all * size), keys_t(all * size), values(all * size), queries(QUERIES * size),
      scores(QUERIES * all), mixed(QUERIES * size);
  load(length, size, rows_of, k + group * size, kv_row, cosine, sine, 1.0f, keys.data());
  transpose(length, size, keys.data(), keys_t.data(), all);
  load(length, size, rows_of, v + group * size, kv_row, nullptr, nullptr, 1.0f, values.data());
  for (int64_t head = group * shared; head < (group + 1) * shared; head++)
    for (int64_t first = document.own, count; first < length; first += count) {
      count = std::min(QUERIES - first % QUERIES, length - first);
      const int64_t rows = padded(count, ROWS);
      const Range range(first, count, shape.window);
      const int64_t width = range.high - range.low;
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, queries.data());
      std::fill(queries.begin() + count * size, queries.begin() + rows * size, 0.0f);
      product(rows, width, size, queries.data(), size, 1, keys_t.data() + range.low, all, scores.data(), width, false);
      for (int64_t t = 0; t < rows; t++) {
        float *row = scores.data() + t * width;
        const int64_t at = first + t, last = at + 1 - range.low;
        const int64_t begin = shape.window ? std::max<int64_t>(0, at - shape.window + 1 - range.low) : 0;
        if (t >= count) {
          std::fill(row, row + width, 0.0f);
          continue;
        }
        std::fill(row, row + begin, 0.0f);
        std::fill(row + last, row + width, 0.0f);
        float sum = 0;
        const float high = largest(row + begin, last - begin);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = begin; j < last; j++) sum += row[j] = fast_exp(row[j] - high);
        lse[rows_of[at] * shape.heads + head] = high + std::log(sum);
        const float inverse = 1.0f / sum;
#pragma omp simd
        for (int64_t j = begin; j < last; j++) row[j] *= inverse;
      }
      product(rows, size, width, scores.data(), width, 1, values.data() + range.low * size, size, mixed.data(), size, false);
      store(count, size, mixed.data(), rows_of + first, nullptr, nullptr, 1.0f, o + head * size, q_row);
    }
}

template <class T>
static void attend_one_backward(const Shape &shape, const Document &document, int64_t group, const T *q, const T *k,
                                const T *v, const T *d_o, const float *lse, const float *cosine, const float *sine, T *dq,
                                T *dk, T *dv, float *slots_k, float *slots_v) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, all = padded(length, PAD), shared = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size;
  std::vector<float> keys(all * size), keys_t(all * size), values(all * size), values_t(all * size), d_keys(all * size),
      d_values(all * size), queries(QUERIES * size), grad_output(QUERIES * size), d_queries(QUERIES * size),
      scores(QUERIES * all), d_scores(QUERIES * all);
  load(length, size, rows_of, k + group * size, kv_row, cosine, sine, 1.0f, keys.data());
  transpose(length, size, keys.data(), keys_t.data(), all);
  load(length, size, rows_of, v + group * size, kv_row, nullptr, nullptr, 1.0f, values.data());
  transpose(length, size, values.data(), values_t.data(), all);
  for (int64_t head = group * shared; head < (group + 1) * shared; head++)
    for (int64_t first = document.own, count; first < length; first += count) {
      count = std::min(QUERIES - first % QUERIES, length - first);
      const int64_t rows = padded(count, ROWS);
      const Range range(first, count, shape.window);
      const int64_t width = range.high - range.low;
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, queries.data());
      load(count, size, rows_of + first, d_o + head * size, q_row, nullptr, nullptr, 1.0f, grad_output.data());
      std::fill(queries.begin() + count * size, queries.begin() + rows * size, 0.0f);
      std::fill(grad_output.begin() + count * size, grad_output.begin() + rows * size, 0.0f);
      product(rows, width, size, queries.data(), size, 1, keys_t.data() + range.low, all, scores.data(), width, false);
      product(rows, width, size, grad_output.data(), size, 1, values_t.data() + range.low, all, d_scores.data(), width, false);
      for (int64_t t = 0; t < rows; t++) {
        float *row = scores.data() + t * width, *d_row = d_scores.data() + t * width;
        const int64_t at = first + t, last = at + 1 - range.low;
        const int64_t begin = shape.window ? std::max<int64_t>(0, at - shape.window + 1 - range.low) : 0;
        if (t >= count) {
          std::fill(row, row + width, 0.0f);
          std::fill(d_row, d_row + width, 0.0f);
          continue;
        }
        std::fill(row, row + begin, 0.0f);
        std::fill(row + last, row + width, 0.0f);
        std::fill(d_row, d_row + begin, 0.0f);
        std::fill(d_row + last, d_row + width, 0.0f);
        float along = 0;  // the grad_output along the row's own sum, which is fixed at 1
        const float total = lse[rows_of[at] * shape.heads + head];
#pragma omp simd reduction(+ : along)
        for (int64_t j = begin; j < last; j++) {
          row[j] = fast_exp(row[j] - total);
          along += row[j] * d_row[j];
        }
#pragma omp simd
        for (int64_t j = begin; j < last; j++) d_row[j] = row[j] * (d_row[j] - along);
      }
      product(width, size, count, scores.data(), 1, width, grad_output.data(), size, d_values.data() + range.low * size, size, true);
      product(width, size, count, d_scores.data(), 1, width, queries.data(), size, d_keys.data() + range.low * size, size, true);
      product(rows, size, width, d_scores.data(), width, 1, keys.data() + range.low * size, size, d_queries.data(), size, false);
      store(count, size, d_queries.data(), rows_of + first, cosine, sine, shape.scale, dq + head * size, q_row);
    }
  store_gradients(document, size, d_keys.data(), cosine, sine, dk + group * size, slots_k + group * size, kv_row);
  store_gradients<T>(document, size, d_values.data(), nullptr, nullptr, dv + group * size, slots_v + group * size, kv_row);
}

template <class T>
static void attend(int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads, int64_t size,
                   int64_t window, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *o, float *lse,
                   int threads) {
  const Shape shape{heads, kv_heads, size, window, 1.0f / std::sqrt(float(size))};
  const auto documents = costliest_first(documents_of(count, starts, index));
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
#define PARAMETERS(T) (int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, const T *q, const T *k, const T *v, const float *cosine, const float *sine, T *o, float *lse, int threads)
FOR_BOTH_TYPES(attend, (count, starts, index, heads, kv_heads, size, window, q, k, v, cosine, sine, o, lse, threads))
#undef PARAMETERS

template <class T>
static void attend_backward(int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads,
                            int64_t size, int64_t window, const T *q, const T *k, const T *v, const T *d_o, const float *lse,
                            const float *cosine, const float *sine, T *dq, T *dk, T *dv, int threads) {
  const Shape shape{heads, kv_heads, size, window, 1.0f / std::sqrt(float(size))};
  const auto in_order = documents_of(count, starts, index), documents = costliest_first(in_order);
  const int64_t slots = (in_order.back().slot + in_order.back().alone) * kv_heads * size;
  std::vector<float> slots_k(slots), slots_v(slots);
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
    add_slots(in_order, kv_heads * size, size, item / 2, (item % 2 ? slots_v : slots_k).data(), item % 2 ? dv : dk);
}
#define PARAMETERS(T) (int64_t count, const int64_t *starts, const int64_t *index, int64_t heads, int64_t kv_heads, int64_t size, int64_t window, const T *q, const T *k, const T *v, const T *d_o, const float *lse, const float *cosine, const float *sine, T *dq, T *dk, T *dv, int threads)
FOR_BOTH_TYPES(attend_backward, (count, starts, index, heads, kv_heads, size, window, q, k, v, d_o, lse, cosine, sine, dq, dk, dv, threads))
#undef PARAMETERS
