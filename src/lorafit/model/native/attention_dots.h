// Attention of one document and one key-value head with bfloat16 products, on matrix tiles or in vectors; accumulators
// and softmax are float32.
//
// The first factor of a product has rows of 32 numbers. The second factor is packed: blocks of depth 32 and 16 columns,
// with pairs of neighbours in depth interleaved (VNNI layout). The backward pass computes transposed scores,
// (keys, queries), because the probabilities and their gradients are first factors of the next products.
// Included by attention.cpp.
#pragma once
#include "dots.h"

#ifdef HAS_DOTS
constexpr int64_t TILE_DEPTH = TILE_BYTES / 2;  // depth of a tile, in numbers
constexpr int64_t BLOCK = 2 * TILE_ROWS;   // rows and columns of C per block

#ifdef HAS_TILES
static void tile_product(int64_t rows, int64_t columns, int64_t depth, const bf16 *a, int64_t a_row, const bf16 *b,
                         int64_t b_depth, float *c, int64_t c_row, bool add) {
  const int64_t steps = depth / TILE_DEPTH, column_offset = b_depth / TILE_DEPTH * (TILE / 2);  // offset of the next 16 columns of B
  for (int64_t n = 0; n < columns; n += BLOCK)
    for (int64_t m = 0; m < rows; m += BLOCK) {
      float *to = c + m * c_row + n, *lower = to + TILE_ROWS * c_row;
      if (add) {
        _tile_loadd(0, to, c_row * 4);
        _tile_loadd(1, to + TILE_ROWS, c_row * 4);
        _tile_loadd(2, lower, c_row * 4);
        _tile_loadd(3, lower + TILE_ROWS, c_row * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const bf16 *left = a + m * a_row, *right = b + n / TILE_ROWS * column_offset;
      for (int64_t step = 0; step < steps; step++, left += TILE_DEPTH, right += TILE / 2) {
        _tile_loadd(4, left, a_row * 2);
        _tile_loadd(6, right, TILE_BYTES);
        _tile_loadd(5, left + TILE_ROWS * a_row, a_row * 2);
        _tile_loadd(7, right + column_offset, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, c_row * 4);
      _tile_stored(1, to + TILE_ROWS, c_row * 4);
      _tile_stored(2, lower, c_row * 4);
      _tile_stored(3, lower + TILE_ROWS, c_row * 4);
    }
}
#endif

// C (rows, columns) (+)= A (rows, depth) B; b is packed, depth before columns. All sizes are multiples of 32.
static void product(bool on_tiles, int64_t rows, int64_t columns, int64_t depth, const bf16 *a, int64_t a_row, const bf16 *b,
                    int64_t b_depth, float *c, int64_t c_row, bool add) {
#ifdef HAS_TILES
  if (on_tiles) return tile_product(rows, columns, depth, a, a_row, b, b_depth, c, c_row, add);
#endif
  const int64_t column_offset = b_depth / TILE_DEPTH * (TILE / 2);  // offset of the next 16 columns of B
  for (int64_t n = 0; n < columns; n += BLOCK)
    for (int64_t m = 0; m < rows; m += DOT_ROWS) {
      float *const to = c + m * c_row + n;
      __m512 left[DOT_ROWS], right[DOT_ROWS];
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        left[row] = add ? _mm512_loadu_ps(to + row * c_row) : __m512{};
        right[row] = add ? _mm512_loadu_ps(to + row * c_row + TILE_ROWS) : __m512{};
      }
      const uint8_t *const from = (const uint8_t *)(a + m * a_row);
      add_dots(depth / TILE_DEPTH, from, a_row * 2, TILE_BYTES, (const uint8_t *)(b + n / TILE_ROWS * column_offset), TILE,
               column_offset * 2, from, left, right);
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        _mm512_storeu_ps(to + row * c_row, left[row]);
        _mm512_storeu_ps(to + row * c_row + TILE_ROWS, right[row]);
      }
    }
}

// Packs x (rows, depth) as the second factor x^T: its rows become columns.
static void pack_transposed(int64_t rows, int64_t depth, const bf16 *x, bf16 *to) {
  for (int64_t n = 0; n < rows; n += TILE_ROWS)
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, to += TILE / 2)
      transpose_words((const uint8_t *)(x + n * depth + k), depth * 2, TILE_ROWS, TILE_BYTES, (uint8_t *)to);
}

// Packs x (rows, columns) as the second factor: its rows are the depth.
static void pack(int64_t rows, int64_t columns, const bf16 *x, bf16 *to) {
  const __m512i order = interleave_order(0);
  for (int64_t n = 0; n < columns; n += TILE_ROWS)
    for (int64_t k = 0; k < rows; k += 2, to += BLOCK) {
      const bf16 *const source = x + k * columns + n;
      const __m512i even = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)source));
      const __m512i odd = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(source + columns)));
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, order, odd));
    }
}

struct Buffer {  // memory aligned to a cache line, initialised to zero
  Aligned memory;
  explicit Buffer(size_t bytes) : memory(bytes) { std::memset(memory.data, 0, bytes); }
  template <class T>
  operator T *() { return (T *)memory.data; }
};
static Buffer floats(int64_t count) { return Buffer(count * 4); }
static Buffer halves(int64_t count) { return Buffer(count * 2); }

// Queries per block. A smaller block computes fewer masked scores, but updates the gradients of the keys more often.
static int64_t queries_of(bool on_tiles) { return on_tiles ? QUERIES : QUERIES / 2; }

static void attend_one_dots(bool on_tiles, const Shape &shape, const Document &document, int64_t kv_head, const bf16 *q,
                            const bf16 *k, const bf16 *v, const float *cosine, const float *sine, bf16 *o, float *lse) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, padded = round_up(length, BLOCK), kv_groups = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size, block = queries_of(on_tiles);
  Buffer rows = halves(padded * size), keys = halves(padded * size), values = halves(padded * size),
         queries = halves(QUERIES * size),
         probabilities = halves(QUERIES * padded), scores = floats(QUERIES * padded), weighted_rows = floats(QUERIES * size);
  load(length, size, rows_of, k + kv_head * size, kv_row, cosine, sine, 1.0f, (bf16 *)rows);
  pack_transposed(padded, size, rows, keys);
  load(length, size, rows_of, v + kv_head * size, kv_row, nullptr, nullptr, 1.0f, (bf16 *)rows);
  pack(padded, size, rows, values);
  for (int64_t head = kv_head * kv_groups; head < (kv_head + 1) * kv_groups; head++)
    for (int64_t first = document.first_own, count; first < length; first += count) {
      count = std::min(block - first % block, length - first);
      const int64_t padded_count = round_up(count, BLOCK);
      const Range range(first, count, shape.window);
      const int64_t num_keys = range.high - range.low;
      bf16 *query = queries, *probability = probabilities;
      float *score = scores, *weighted = weighted_rows, inverse[QUERIES];
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, query);
      std::memset(query + count * size, 0, (padded_count - count) * size * 2);
      product(on_tiles, padded_count, num_keys, size, query, size, (bf16 *)keys + range.low * size, size, score, num_keys, false);
      std::memset(probability, 0, padded_count * num_keys * 2);
      for (int64_t t = 0; t < count; t++) {
        float *row = score + t * num_keys, sum = 0;
        bf16 *out = probability + t * num_keys;
        const int64_t position = first + t, last = position + 1 - range.low;
        const int64_t begin = shape.window ? std::max<int64_t>(0, position - shape.window + 1 - range.low) : 0;
        if (shape.cap) cap_scores(last - begin, shape.cap, row + begin, nullptr);
        const float high = maximum(row + begin, last - begin);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = begin; j < last; j++) sum += row[j] = fast_exp(row[j] - high);
#pragma omp simd
        for (int64_t j = begin; j < last; j++) put(row[j], out[j]);
        lse[rows_of[position] * shape.heads + head] = high + std::log(sum);
        inverse[t] = 1.0f / sum;
      }
      product(on_tiles, padded_count, size, num_keys, probability, num_keys, (bf16 *)values + range.low * TILE_ROWS, padded,
              weighted, size, false);
      for (int64_t t = 0; t < count; t++)
        store(1, size, weighted + t * size, rows_of + first + t, nullptr, nullptr, inverse[t], o + head * size, q_row);
    }
}

static void attend_one_backward_dots(bool on_tiles, const Shape &shape, const Document &document, int64_t kv_head, const bf16 *q,
                                     const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse, const float *cosine,
                                     const float *sine, bf16 *dq, bf16 *dk, bf16 *dv, float *slots_k, float *slots_v) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, padded = round_up(length, BLOCK), kv_groups = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size, block = queries_of(on_tiles);
  Buffer keys = halves(padded * size), values = halves(padded * size), keys_t = halves(padded * size),
         queries = halves(QUERIES * size), grad_outputs = halves(QUERIES * size), second_factor = halves(QUERIES * size), probabilities = halves(QUERIES * padded),
         d_probabilities = halves(QUERIES * padded), d_packed = halves(QUERIES * padded), scores = floats(QUERIES * padded),
         d_scores = floats(QUERIES * padded), d_keys = floats(padded * size), d_values = floats(padded * size),
         d_queries_t = floats(QUERIES * size), d_queries = floats(QUERIES * size),
         slopes = floats(shape.cap ? QUERIES * padded : 0);
  load(length, size, rows_of, k + kv_head * size, kv_row, cosine, sine, 1.0f, (bf16 *)keys);
  load(length, size, rows_of, v + kv_head * size, kv_row, nullptr, nullptr, 1.0f, (bf16 *)values);
  for (int64_t t = 0; t < length; t++)
    for (int64_t i = 0; i < size; i++) ((bf16 *)keys_t)[i * padded + t] = ((bf16 *)keys)[t * size + i];
  for (int64_t head = kv_head * kv_groups; head < (kv_head + 1) * kv_groups; head++)
    for (int64_t first = document.first_own, count; first < length; first += count) {
      count = std::min(block - first % block, length - first);
      const int64_t padded_count = round_up(count, BLOCK);  // columns of the transposed matrices
      const Range range(first, count, shape.window);
      const int64_t num_keys = range.high - range.low;
      bf16 *query = queries, *grad_output = grad_outputs, *packed = second_factor, *probability = probabilities,
          *d_probability = d_probabilities;
      float *score = scores, *d_score = d_scores, delta[QUERIES] = {}, log_sum[QUERIES] = {};
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, query);
      load(count, size, rows_of + first, d_o + head * size, q_row, nullptr, nullptr, 1.0f, grad_output);
      std::memset(query + count * size, 0, (padded_count - count) * size * 2);
      std::memset(grad_output + count * size, 0, (padded_count - count) * size * 2);
      for (int64_t t = 0; t < count; t++) log_sum[t] = lse[rows_of[first + t] * shape.heads + head];
      pack_transposed(padded_count, size, query, packed);
      product(on_tiles, num_keys, padded_count, size, (bf16 *)keys + range.low * size, size, packed, size, score, padded_count,
              false);
      pack_transposed(padded_count, size, grad_output, packed);
      product(on_tiles, num_keys, padded_count, size, (bf16 *)values + range.low * size, size, packed, size, d_score,
              padded_count, false);
      float *const slope = slopes;
      if (shape.cap) cap_scores(num_keys * padded_count, shape.cap, score, slope);
      for (int64_t j = 0; j < num_keys; j++) {
        float *row = score + j * padded_count, *d_row = d_score + j * padded_count;
        const int32_t key = int32_t(range.low + j - first);  // the queries begin .. end - 1 attend to this key
        const int32_t begin = std::max(0, key), end = shape.window ? std::min<int32_t>(count, key + shape.window) : count;
        for (int32_t first_query = 0; first_query < padded_count; first_query += BLOCK)
#pragma omp simd
          for (int32_t t = first_query; t < first_query + BLOCK; t++) {
            const float p = fast_exp(row[t] - log_sum[t]);
            row[t] = (t >= begin) & (t < end) ? p : 0.0f;
            delta[t] += row[t] * d_row[t];
          }
      }
      for (int64_t j = 0; j < num_keys; j++) {
        const float *row = score + j * padded_count, *d_row = d_score + j * padded_count;
        bf16 *out = probability + j * padded_count, *d_out = d_probability + j * padded_count;
        for (int32_t first_query = 0; first_query < padded_count; first_query += BLOCK)
#pragma omp simd
          for (int32_t t = first_query; t < first_query + BLOCK; t++) {
            put(row[t], out[t]);
            put(row[t] * (d_row[t] - delta[t]), d_out[t]);
          }
      }
      if (shape.cap)
        for (int64_t i = 0; i < num_keys * padded_count; i++)
          put(score[i] * (d_score[i] - delta[i % padded_count]) * slope[i], d_probability[i]);
      pack(padded_count, size, grad_output, packed);
      product(on_tiles, num_keys, size, padded_count, probability, padded_count, packed, padded_count,
              (float *)d_values + range.low * size, size, true);
      pack(padded_count, size, query, packed);
      product(on_tiles, num_keys, size, padded_count, d_probability, padded_count, packed, padded_count,
              (float *)d_keys + range.low * size, size, true);
      pack(num_keys, padded_count, d_probability, d_packed);
      product(on_tiles, size, padded_count, num_keys, (bf16 *)keys_t + range.low, padded, d_packed, num_keys, d_queries_t,
              padded_count, false);
      transpose(size, padded_count, d_queries_t, d_queries, size);
      store(count, size, (float *)d_queries, rows_of + first, cosine, sine, shape.scale, dq + head * size, q_row);
    }
  store_gradients(document, size, (float *)d_keys, cosine, sine, dk + kv_head * size, slots_k + kv_head * size, kv_row);
  store_gradients<bf16>(document, size, (float *)d_values, nullptr, nullptr, dv + kv_head * size, slots_v + kv_head * size, kv_row);
}
#endif
