// Attention of one document and one key-value head by products of bfloat16, on matrix tiles or in vectors; sums and
// softmax are float32.
//
// A product reads its first factor in rows of 32 numbers and the second rearranged: 32 deep of 16 columns, two
// adjacent depths interleaved. Scores of the backward pass are computed transposed, (keys, queries), because then
// probabilities and their gradients are first factors of the products that follow. Included by attention.cpp.
#pragma once
#include "dots.h"

#ifdef HAS_DOTS
constexpr int64_t DEEP = TILE_BYTES / 2;  // numbers of depth in a tile
constexpr int64_t EDGE = 2 * TILE_ROWS;   // rows and columns of C that are computed at a time

#ifdef HAS_TILES
static void tile_product(int64_t rows, int64_t columns, int64_t depth, const bf16 *a, int64_t a_row, const bf16 *b,
                         int64_t b_depth, float *c, int64_t c_row, bool add) {
  const int64_t steps = depth / DEEP, next = b_depth / DEEP * (TILE / 2);  // next: from 16 columns of B to the next
  for (int64_t n = 0; n < columns; n += EDGE)
    for (int64_t m = 0; m < rows; m += EDGE) {
      float *to = c + m * c_row + n, *below = to + TILE_ROWS * c_row;
      if (add) {
        _tile_loadd(0, to, c_row * 4);
        _tile_loadd(1, to + TILE_ROWS, c_row * 4);
        _tile_loadd(2, below, c_row * 4);
        _tile_loadd(3, below + TILE_ROWS, c_row * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const bf16 *left = a + m * a_row, *right = b + n / TILE_ROWS * next;
      for (int64_t step = 0; step < steps; step++, left += DEEP, right += TILE / 2) {
        _tile_loadd(4, left, a_row * 2);
        _tile_loadd(6, right, TILE_BYTES);
        _tile_loadd(5, left + TILE_ROWS * a_row, a_row * 2);
        _tile_loadd(7, right + next, TILE_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, to, c_row * 4);
      _tile_stored(1, to + TILE_ROWS, c_row * 4);
      _tile_stored(2, below, c_row * 4);
      _tile_stored(3, below + TILE_ROWS, c_row * 4);
    }
}
#endif

// C (rows, columns) (+)= A (rows, depth) B; b is rearranged, columns after depth. All are multiples of 32.
static void product(bool on_tiles, int64_t rows, int64_t columns, int64_t depth, const bf16 *a, int64_t a_row, const bf16 *b,
                    int64_t b_depth, float *c, int64_t c_row, bool add) {
#ifdef HAS_TILES
  if (on_tiles) return tile_product(rows, columns, depth, a, a_row, b, b_depth, c, c_row, add);
#endif
  const int64_t next = b_depth / DEEP * (TILE / 2);  // from 16 columns of B to the next
  for (int64_t n = 0; n < columns; n += EDGE)
    for (int64_t m = 0; m < rows; m += DOT_ROWS) {
      float *const to = c + m * c_row + n;
      __m512 left[DOT_ROWS], right[DOT_ROWS];
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        left[row] = add ? _mm512_loadu_ps(to + row * c_row) : __m512{};
        right[row] = add ? _mm512_loadu_ps(to + row * c_row + TILE_ROWS) : __m512{};
      }
      const uint8_t *const from = (const uint8_t *)(a + m * a_row);
      add_dots(depth / DEEP, from, a_row * 2, TILE_BYTES, (const uint8_t *)(b + n / TILE_ROWS * next), TILE, next * 2, from, left, right);
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        _mm512_storeu_ps(to + row * c_row, left[row]);
        _mm512_storeu_ps(to + row * c_row + TILE_ROWS, right[row]);
      }
    }
}

// x (rows, depth) as the second factor x^T: its rows become columns
static void lay_out_transposed(int64_t rows, int64_t depth, const bf16 *x, bf16 *to) {
  for (int64_t n = 0; n < rows; n += TILE_ROWS)
    for (int64_t k = 0; k < depth; k += DEEP, to += TILE / 2)
      turn_words((const uint8_t *)(x + n * depth + k), depth * 2, TILE_ROWS, TILE_BYTES, (uint8_t *)to);
}

// x (rows, columns) as the second factor: its rows are the depth
static void lay_out(int64_t rows, int64_t columns, const bf16 *x, bf16 *to) {
  const __m512i neighbours = side_by_side(0);
  for (int64_t n = 0; n < columns; n += TILE_ROWS)
    for (int64_t k = 0; k < rows; k += 2, to += EDGE) {
      const bf16 *const one = x + k * columns + n;
      const __m512i even = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)one));
      const __m512i odd = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(one + columns)));
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, neighbours, odd));
    }
}

struct Buffer {  // zeros of one type on a cache line
  Aligned memory;
  explicit Buffer(size_t bytes) : memory(bytes) { std::memset(memory.at, 0, bytes); }
  template <class T>
  operator T *() { return (T *)memory.at; }
};
static Buffer floats(int64_t count) { return Buffer(count * 4); }
static Buffer halves(int64_t count) { return Buffer(count * 2); }

// Queries of a block: half as many compute fewer masked scores, but add to the gradients of the keys more often
static int64_t queries_of(bool on_tiles) { return on_tiles ? QUERIES : QUERIES / 2; }

static void attend_one_dots(bool on_tiles, const Shape &shape, const Document &document, int64_t group, const bf16 *q,
                            const bf16 *k, const bf16 *v, const float *cosine, const float *sine, bf16 *o, float *lse) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, all = padded(length, EDGE), shared = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size, block = queries_of(on_tiles);
  Buffer rows = halves(all * size), keys = halves(all * size), values = halves(all * size), queries = halves(QUERIES * size),
         chances = halves(QUERIES * all), scores = floats(QUERIES * all), mixed = floats(QUERIES * size);
  load(length, size, rows_of, k + group * size, kv_row, cosine, sine, 1.0f, (bf16 *)rows);
  lay_out_transposed(all, size, rows, keys);
  load(length, size, rows_of, v + group * size, kv_row, nullptr, nullptr, 1.0f, (bf16 *)rows);
  lay_out(all, size, rows, values);
  for (int64_t head = group * shared; head < (group + 1) * shared; head++)
    for (int64_t first = document.own, count; first < length; first += count) {
      count = std::min(block - first % block, length - first);
      const int64_t filled = padded(count, EDGE);
      const Range range(first, count, shape.window);
      const int64_t width = range.high - range.low;
      bf16 *query = queries, *chance = chances;
      float *score = scores, *mix = mixed, inverse[QUERIES];
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, query);
      std::memset(query + count * size, 0, (filled - count) * size * 2);
      product(on_tiles, filled, width, size, query, size, (bf16 *)keys + range.low * size, size, score, width, false);
      std::memset(chance, 0, filled * width * 2);
      for (int64_t t = 0; t < count; t++) {
        float *row = score + t * width, sum = 0;
        bf16 *out = chance + t * width;
        const int64_t at = first + t, last = at + 1 - range.low;
        const int64_t begin = shape.window ? std::max<int64_t>(0, at - shape.window + 1 - range.low) : 0;
        const float high = largest(row + begin, last - begin);
#pragma omp simd reduction(+ : sum)
        for (int64_t j = begin; j < last; j++) sum += row[j] = fast_exp(row[j] - high);
#pragma omp simd
        for (int64_t j = begin; j < last; j++) put(row[j], out[j]);
        lse[rows_of[at] * shape.heads + head] = high + std::log(sum);
        inverse[t] = 1.0f / sum;
      }
      product(on_tiles, filled, size, width, chance, width, (bf16 *)values + range.low * TILE_ROWS, all, mix, size, false);
      for (int64_t t = 0; t < count; t++)
        store(1, size, mix + t * size, rows_of + first + t, nullptr, nullptr, inverse[t], o + head * size, q_row);
    }
}

static void attend_one_backward_dots(bool on_tiles, const Shape &shape, const Document &document, int64_t group, const bf16 *q,
                                     const bf16 *k, const bf16 *v, const bf16 *d_o, const float *lse, const float *cosine,
                                     const float *sine, bf16 *dq, bf16 *dk, bf16 *dv, float *slots_k, float *slots_v) {
  const int64_t length = document.length, *const rows_of = document.rows;
  const int64_t size = shape.size, all = padded(length, EDGE), shared = shape.heads / shape.kv_heads;
  const int64_t q_row = shape.heads * size, kv_row = shape.kv_heads * size, block = queries_of(on_tiles);
  Buffer keys = halves(all * size), values = halves(all * size), keys_t = halves(all * size), queries = halves(QUERIES * size),
         grad_outputs = halves(QUERIES * size), second = halves(QUERIES * size), chances = halves(QUERIES * all),
         d_chances = halves(QUERIES * all), d_laid_out = halves(QUERIES * all), scores = floats(QUERIES * all),
         d_scores = floats(QUERIES * all), d_keys = floats(all * size), d_values = floats(all * size),
         d_queries_t = floats(QUERIES * size), d_queries = floats(QUERIES * size);
  load(length, size, rows_of, k + group * size, kv_row, cosine, sine, 1.0f, (bf16 *)keys);
  load(length, size, rows_of, v + group * size, kv_row, nullptr, nullptr, 1.0f, (bf16 *)values);
  for (int64_t t = 0; t < length; t++)
    for (int64_t i = 0; i < size; i++) ((bf16 *)keys_t)[i * all + t] = ((bf16 *)keys)[t * size + i];
  for (int64_t head = group * shared; head < (group + 1) * shared; head++)
    for (int64_t first = document.own, count; first < length; first += count) {
      count = std::min(block - first % block, length - first);
      const int64_t wide = padded(count, EDGE);  // columns of what is transposed
      const Range range(first, count, shape.window);
      const int64_t width = range.high - range.low;
      bf16 *query = queries, *grad_output = grad_outputs, *laid_out = second, *chance = chances, *d_chance = d_chances;
      float *score = scores, *d_score = d_scores, along[QUERIES] = {}, total[QUERIES] = {};
      load(count, size, rows_of + first, q + head * size, q_row, cosine, sine, shape.scale, query);
      load(count, size, rows_of + first, d_o + head * size, q_row, nullptr, nullptr, 1.0f, grad_output);
      std::memset(query + count * size, 0, (wide - count) * size * 2);
      std::memset(grad_output + count * size, 0, (wide - count) * size * 2);
      for (int64_t t = 0; t < count; t++) total[t] = lse[rows_of[first + t] * shape.heads + head];
      lay_out_transposed(wide, size, query, laid_out);
      product(on_tiles, width, wide, size, (bf16 *)keys + range.low * size, size, laid_out, size, score, wide, false);
      lay_out_transposed(wide, size, grad_output, laid_out);
      product(on_tiles, width, wide, size, (bf16 *)values + range.low * size, size, laid_out, size, d_score, wide, false);
      for (int64_t j = 0; j < width; j++) {
        float *row = score + j * wide, *d_row = d_score + j * wide;
        const int32_t key = int32_t(range.low + j - first);  // the queries begin .. end see it
        const int32_t begin = std::max(0, key), end = shape.window ? std::min<int32_t>(count, key + shape.window) : count;
        for (int32_t some = 0; some < wide; some += EDGE)
#pragma omp simd
          for (int32_t t = some; t < some + EDGE; t++) {
            const float chance_of = fast_exp(row[t] - total[t]);
            row[t] = (t >= begin) & (t < end) ? chance_of : 0.0f;
            along[t] += row[t] * d_row[t];
          }
      }
      for (int64_t j = 0; j < width; j++) {
        const float *row = score + j * wide, *d_row = d_score + j * wide;
        bf16 *out = chance + j * wide, *d_out = d_chance + j * wide;
        for (int32_t some = 0; some < wide; some += EDGE)
#pragma omp simd
          for (int32_t t = some; t < some + EDGE; t++) {
            put(row[t], out[t]);
            put(row[t] * (d_row[t] - along[t]), d_out[t]);
          }
      }
      lay_out(wide, size, grad_output, laid_out);
      product(on_tiles, width, size, wide, chance, wide, laid_out, wide, (float *)d_values + range.low * size, size, true);
      lay_out(wide, size, query, laid_out);
      product(on_tiles, width, size, wide, d_chance, wide, laid_out, wide, (float *)d_keys + range.low * size, size, true);
      lay_out(width, wide, d_chance, d_laid_out);
      product(on_tiles, size, wide, width, (bf16 *)keys_t + range.low, all, d_laid_out, width, d_queries_t, wide, false);
      transpose(size, wide, d_queries_t, d_queries, size);
      store(count, size, (float *)d_queries, rows_of + first, cosine, sine, shape.scale, dq + head * size, q_row);
    }
  store_gradients(document, size, (float *)d_keys, cosine, sine, dk + group * size, slots_k + group * size, kv_row);
  store_gradients<bf16>(document, size, (float *)d_values, nullptr, nullptr, dv + group * size, slots_v + group * size, kv_row);
}
#endif
