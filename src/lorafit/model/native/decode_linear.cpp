// Linear layers with LoRA for a few rows, as in decoding: products with a large frozen weight.
//
// out = x W^T + bias + addend + scale * (x A^T) B^T with x (rows, width), W (columns, width), A (rank, width) and
// B (columns, rank). bias, addend and the adapter are optional, and each row can have its own adapter. The cost is the
// memory traffic of W, which is read once. The order of each sum depends neither on the other rows nor on the number of
// threads.
//
// W can be int8: then column_scale multiplies the sums and input_scale multiplies x, as in model/quant.py. The kernel
// converts W, so inputs keep the precision of their type and outlier columns need no special case.
#include "dots.h"
#include "vectors.h"

#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Accumulators per register tile: they fill the registers. A small group of rows of x stays in the L1 cache, but int8
// weights are converted again for each group.
constexpr int ACCUMULATORS = 24;
template <class W>
constexpr int ROWS = sizeof(W) == 1 ? 8 : 4;
constexpr int64_t CACHE_LINE = 64;  // bytes of a cache line
constexpr int64_t PREFETCH_AHEAD = 16384;  // least bytes between a weight in use and the one that is prefetched
constexpr int64_t PART_BYTES = 1 << 19;  // of a weight, that a thread takes at a time
constexpr int64_t ROW_BLOCK = 32, COLUMN_BLOCK = 2 * ACCUMULATORS;  // rows and columns per block of sums
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));

static inline vec widen(const float *w) { return *(const vec *)w; }
static inline vec widen(const bf16 *w) { return (vec)(__builtin_convertvector(*(const halves *)w, words) << 16); }
static inline vec widen(const int8_t *w) {  // GCC 12 compiles the last expression to many instructions
#if defined(__AVX512F__)
  return __builtin_convertvector((integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)), vec);
#elif defined(__AVX2__)
  return __builtin_convertvector((integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)), vec);
#else
  return __builtin_convertvector(__builtin_convertvector(*(const bytes *)w, integers), vec);
#endif
}
static inline float get(int8_t value) { return float(value); }

// The type of x (T) in products with weights W, and accumulators of STEP products. This version runs on any CPU.
template <class T, class W>
struct Dot {
  typedef float Input;
  typedef vec Line, Sums;
  static constexpr int STEP = LANES;
  static void prepare(int64_t width, const T *x, const float *scale, Input *to) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = scale ? get(x[i]) * scale[i] : get(x[i]);
  }
  static Line weights(const W *w) { return widen(w); }
  static Line inputs(const Input *x) { return *(const vec *)x; }
  static void add(Sums &sums, Line w, Line x) { sums += w * x; }
};

#ifdef __AVX512BF16__
static inline __m512bh pairs(const bf16 *w) { return (__m512bh)_mm512_loadu_si512(w); }
static inline __m512bh pairs(const int8_t *w) {  // bfloat16 represents every int8 exactly
  return _mm512_cvtne2ps_pbh((__m512)widen(w + LANES), (__m512)widen(w));
}

template <class W>
struct PairsDot {
  typedef bf16 Input;
  typedef __m512bh Line;
  typedef __m512 Sums;
  static constexpr int STEP = 32;
  static void prepare(int64_t width, const bf16 *x, const float *scale, Input *to) {
    if (!scale) std::memcpy(to, x, width * sizeof(bf16));
#pragma omp simd
    for (int64_t i = 0; i < (scale ? width : 0); i++) put(get(x[i]) * scale[i], to[i]);
  }
  static Line weights(const W *w) { return pairs(w); }
  static Line inputs(const Input *x) { return pairs(x); }
  static void add(Sums &sums, Line w, Line x) { sums = _mm512_dpbf16_ps(sums, w, x); }
};
template <>
struct Dot<bf16, bf16> : PairsDot<bf16> {};
template <>
struct Dot<bf16, int8_t> : PairsDot<int8_t> {};
#endif

// The rows of x are packed in groups of ROWS<W>. A group is ordered by step: the STEP numbers of each of its rows.

// out[m * stride + n] = the products of a group of M rows of x with N rows of w. `lines` cache lines per step are
// prefetched into the L2 cache, from `prefetch_from` on.
template <class T, class W, int M, int N>
static inline void tile(int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out, int64_t stride,
                        const char *prefetch_from,
                        int64_t lines) {
  typedef Dot<T, W> D;
  typename D::Sums sums[M][N] = {};
  int64_t k = 0;
#pragma GCC unroll 2  // without it GCC generates a slower loop
  for (; k + D::STEP <= width; k += D::STEP) {
    for (int64_t line = 0; line < lines; line++, prefetch_from += CACHE_LINE) __builtin_prefetch(prefetch_from, 0, 2);
    typename D::Line weights[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) weights[n] = D::weights(w + n * width + k);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const typename D::Line inputs = D::inputs(x + k * M + m * D::STEP);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) D::add(sums[m][n], weights[n], inputs);
    }
  }
  vec lanes[M * N];
  float sums_of_lanes[M * N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) lanes[m * N + n] = (vec)sums[m][n];
  lane_sums(lanes, M * N, sums_of_lanes);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float tail = 0;
      for (int64_t i = k; i < width; i++) tail += get(x[k * M + m * D::STEP + i - k]) * get(w[n * width + i]);
      out[m * stride + n] = sums_of_lanes[m * N + n] + tail;
    }
}

// out (rows, N) of N rows of w, by `tile`; each group of rows prefetches its own part.
template <class T, class W, int N>
static inline void row_groups(int64_t rows, int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out,
                              int64_t stride,
                          const char *prefetch_from, int64_t lines) {
  const int64_t x_row = round_up(width, Dot<T, W>::STEP), group_bytes = lines * CACHE_LINE * (width / Dot<T, W>::STEP);
  constexpr int max_rows = std::min(ROWS<W>, ACCUMULATORS / N);
  for (; rows > 0; rows -= max_rows, x += max_rows * x_row, out += max_rows * stride, prefetch_from += group_bytes) switch (rows) {
      case 1: tile<T, W, 1, N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 2: tile<T, W, 2, N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 3: tile<T, W, 3, N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 4: tile<T, W, 4, N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 5: tile<T, W, std::min(5, max_rows), N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 6: tile<T, W, std::min(6, max_rows), N>(width, x, w, out, stride, prefetch_from, lines); break;
      case 7: tile<T, W, std::min(7, max_rows), N>(width, x, w, out, stride, prefetch_from, lines); break;
      default: tile<T, W, max_rows, N>(width, x, w, out, stride, prefetch_from, lines);
    }
}

// out (rows, N) of N rows of w. Prefetches as many rows further on: the next N, or where rows are short later ones, which
// have time to arrive. The hardware prefetcher stops at the end of a page.
template <class T, class W, int N>
static inline void tiles(int64_t rows, int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out,
                         int64_t stride) {
  constexpr int64_t step_lines = (N * Dot<T, W>::STEP * sizeof(W) + CACHE_LINE - 1) / CACHE_LINE;
  const int64_t num_groups = (rows + ROWS<W> - 1) / ROWS<W>, lines = (step_lines + num_groups - 1) / num_groups;
  const char *const prefetch_from = (const char *)w + std::max<int64_t>(N * width * sizeof(W), PREFETCH_AHEAD);
  row_groups<T, W, N>(rows, width, x, w, out, stride, prefetch_from, lines);
}

// x in the packed layout of `tiles`
template <class T, class W>
static const typename Dot<T, W>::Input *interleave(int64_t rows, int64_t width, const T *x, const float *scale) {
  typedef Dot<T, W> D;
  static thread_local Space line_space, space;
  const int64_t x_row = round_up(width, D::STEP);
  typename D::Input *line = line_space.of<typename D::Input>(x_row), *all = space.of<typename D::Input>(rows * x_row);
  for (int64_t row = 0; row < rows; row++) {
    D::prepare(width, x + row * width, scale, line);
    const int64_t group = row / ROWS<W> * ROWS<W>, group_rows = std::min<int64_t>(ROWS<W>, rows - group);
    typename D::Input *to = all + group * x_row + (row - group) * D::STEP;
    for (int64_t k = 0; k < width; k += D::STEP) std::memcpy(to + k * group_rows, line + k, D::STEP * sizeof(*line));
  }
  return all;
}

#ifdef HAS_TILES
// With matrix tiles: 16 rows of the weight are the rows of one tile, and up to 16 rows of x are the columns of the other.

// Converts 16 rows of w, 32 numbers each, to the rows of a tile.
static const void *int8_to_tile(const int8_t *w, int64_t width, void *scratch) {
  for (int64_t row = 0; row < TILE_ROWS; row++) _mm512_store_si512((char *)scratch + row * TILE_BYTES, (__m512i)pairs(w + row * width));
  return scratch;
}

// Transposes at most 16 rows of x, scaled, to columns of tiles with a depth of 32.
template <class W>
static const uint8_t *transpose_to_tiles(int64_t rows, int64_t width, const bf16 *x, const float *scale) {
  static thread_local Space rows_space, space;
  bf16 *all = rows_space.of<bf16>(rows * width);
  uint8_t *to = space.of<uint8_t>(width / 32 * TILE);
  for (int64_t row = 0; row < rows; row++) PairsDot<W>::prepare(width, x + row * width, scale, all + row * width);
  for (int64_t k = 0; k < width; k += 32) transpose_words((const uint8_t *)(all + k), width * 2, rows, TILE_BYTES,
                                                          to + k / 32 * TILE);
  return to;
}

// sums[n][m] = the products of 16 rows of w with the rows of x.
template <class W>
static void multiply_tiles(int64_t width, const uint8_t *x, const W *w, float *sums) {
  alignas(64) uint8_t scratch[2 * TILE];
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < width; k += 64) {
    const bool has_second = k + 32 < width;
    for (int64_t row = 0; row < TILE_ROWS; row++) __builtin_prefetch(w + (row + TILE_ROWS) * width + k, 0, 2);  // of the next 16 rows
    if constexpr (sizeof(W) == 1) {
      _tile_loadd(4, int8_to_tile(w + k, width, scratch), TILE_BYTES);
    } else {
      _tile_loadd(4, w + k, width * sizeof(W));
      for (int64_t row = 0; has_second && row < TILE_ROWS; row++) __builtin_prefetch(w + (row + TILE_ROWS) * width + k + 32, 0, 2);
    }
    _tile_loadd(6, x + k / 32 * TILE, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    if (!has_second) break;
    if constexpr (sizeof(W) == 1)
      _tile_loadd(5, int8_to_tile(w + k + 32, width, scratch + TILE), TILE_BYTES);
    else
      _tile_loadd(5, w + k + 32, width * sizeof(W));
    _tile_loadd(7, x + (k / 32 + 1) * TILE, TILE_BYTES);
    _tile_dpbf16ps(1, 5, 7);
  }
  alignas(64) float second_sums[TILE_ROWS * TILE_ROWS];
  _tile_stored(0, sums, TILE_BYTES);
  _tile_stored(1, second_sums, TILE_BYTES);
  for (int64_t i = 0; i < TILE_ROWS * TILE_ROWS; i++) sums[i] += second_sums[i];
}
#endif

// The matrices A and B of several adapters. Row r uses the adapter adapter_of_row[r], or none if that is negative.
// Without `adapter_of_row`, all rows use the only adapter.
struct Adapters {
  int64_t count;
  const int64_t *adapter_of_row, *ranks;
  const float *const *a, *const *b, *scales;
  int64_t of(int64_t row) const { return adapter_of_row ? adapter_of_row[row] : count - 1; }
};

template <class T, class W, class Out>
static void linear(int64_t rows, int64_t width, int64_t columns, const T *x, const W *weight, const float *column_scale,
                       const float *input_scale, const T *bias, const T *addend, const Adapters &adapters, Out *out, int threads) {
  static thread_local Space space;
  static thread_local std::vector<int64_t> offsets;  // offset of each adapter in a row of `low`; -1 if no row uses it
  int64_t total_rank = 0;
  offsets.assign(adapters.count, -1);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t adapter = adapters.of(row);
    if (adapter < 0 || offsets[adapter] >= 0) continue;
    offsets[adapter] = total_rank;
    total_rank += adapters.ranks[adapter];
  }
  const float *x_float32 = total_rank ? interleave<T, float>(rows, width, x, nullptr) : nullptr;
  const int64_t x_row = round_up(width, Dot<T, W>::STEP);
  float *const own_low = space.of<float>(rows * total_rank);
  const int64_t *low_offsets = offsets.data();
  int64_t tiled_columns = 0;  // columns that are computed on tiles
  const uint8_t *x_tiles = nullptr;
#ifdef HAS_TILES
  if constexpr (std::is_same<T, bf16>::value)
    if (may_use_tiles() && width % 32 == 0 && rows <= TILE_ROWS) {
      tiled_columns = columns / TILE_ROWS * TILE_ROWS;
      x_tiles = transpose_to_tiles<W>(rows, width, x, input_scale);
    }
#endif
  const auto *input = tiled_columns < columns ? interleave<T, W>(rows, width, x, input_scale) : nullptr;
  // columns of a register tile of at most four rows, and of ROWS<W> rows
  constexpr int columns_of_few_rows = ACCUMULATORS / 4, columns_of_many_rows = ACCUMULATORS / ROWS<W>;
  const int64_t tile_columns = rows <= 4 ? columns_of_few_rows : columns_of_many_rows;
  const int64_t blocks = (columns - tiled_columns + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  together(threads, [&](Member &me) {
    float *const low = total_rank ? me.shared(own_low) : nullptr;
    const auto finish = [&](int64_t row, int64_t first, int64_t count, float *sums) {  // `count` columns from `first` on
      const T *const addend_row = addend ? addend + row * columns + first : nullptr;
      if (column_scale)
#pragma omp simd
        for (int64_t n = 0; n < count; n++) sums[n] *= column_scale[first + n];
      if (bias)
#pragma omp simd
        for (int64_t n = 0; n < count; n++) sums[n] += get(bias[first + n]);
      if (addend_row)
#pragma omp simd
        for (int64_t n = 0; n < count; n++) sums[n] += get(addend_row[n]);
      const int64_t adapter = adapters.of(row), rank = adapter < 0 ? 0 : adapters.ranks[adapter];
      if (rank)
        for (int64_t n = 0; n < count; n++) {
          const float *from = low + row * total_rank + low_offsets[adapter], *b = adapters.b[adapter] + (first + n) * rank;
          float low_rank_sum = 0;
#pragma omp simd reduction(+ : low_rank_sum)
          for (int64_t j = 0; j < rank; j++) low_rank_sum += from[j] * b[j];
          sums[n] += low_rank_sum * adapters.scales[adapter];
        }
      Out *const to = out + row * columns + first;
#pragma omp simd
      for (int64_t n = 0; n < count; n++) put(sums[n], to[n]);
    };
    for (int64_t adapter = 0; adapter < adapters.count; adapter++) {
      if (low_offsets[adapter] < 0) continue;
      me.each(adapters.ranks[adapter], [&](int64_t j) {
        tiles<T, float, 1>(rows, width, x_float32, adapters.a[adapter] + j * width, low + low_offsets[adapter] + j, total_rank);
      });
    }
    if (total_rank) me.team.wait();
#ifdef HAS_TILES
    if constexpr (std::is_same<T, bf16>::value) if (x_tiles) {
      const Tiles shapes(true);
      alignas(64) float sums[TILE_ROWS * TILE_ROWS];
      me.each(tiled_columns / TILE_ROWS, [&](int64_t block) {
        const int64_t first = block * TILE_ROWS;
        multiply_tiles(width, x_tiles, weight + first * width, sums);
        for (int64_t row = 0; row < rows; row++) {
          float row_sums[TILE_ROWS];
          for (int64_t n = 0; n < TILE_ROWS; n++) row_sums[n] = sums[n * TILE_ROWS + row];
          finish(row, first, TILE_ROWS, row_sums);
        }
      });
    }
#endif
    const auto compute = [&](int64_t block) {
      const int64_t first = tiled_columns + block * COLUMN_BLOCK, count = std::min(COLUMN_BLOCK, columns - first);
      float sums[ROW_BLOCK * COLUMN_BLOCK];
      for (int64_t first_row = 0; first_row < rows; first_row += ROW_BLOCK) {
        const int64_t num_rows = std::min(ROW_BLOCK, rows - first_row);
        const auto *from = input + first_row * x_row;
        for (int64_t n = 0; n < count;) {
          const W *const w = weight + (first + n) * width;
          const int64_t remaining = count - n;
          if (remaining < tile_columns)
            tiles<T, W, 1>(num_rows, width, from, w, sums + n, COLUMN_BLOCK), n++;
          else if (tile_columns == columns_of_few_rows)
            tiles<T, W, columns_of_few_rows>(num_rows, width, from, w, sums + n, COLUMN_BLOCK), n += columns_of_few_rows;
          else
            tiles<T, W, columns_of_many_rows>(num_rows, width, from, w, sums + n, COLUMN_BLOCK), n += columns_of_many_rows;
        }
        for (int64_t m = 0; m < num_rows; m++) finish(first_row + m, first, count, sums + m * COLUMN_BLOCK);
      }
    };
    // Threads read memory at different rates: of a large weight, one that is ahead takes more. Parts are long, because each
    // begins with what no prefetch has brought.
    const int64_t block_bytes = COLUMN_BLOCK * width * int64_t(sizeof(W));
    const int64_t part_blocks = std::max<int64_t>(1, PART_BYTES / block_bytes), parts = (blocks + part_blocks - 1) / part_blocks;
    if (parts < 4 * me.team.size)
      me.each(blocks, compute);
    else
      me.take_each(parts, [&](int64_t part) {
        const int64_t end = std::min(blocks, (part + 1) * part_blocks);
        for (int64_t block = part * part_blocks; block < end; block++) compute(block);
      });
  });
}

template <class T>
static void decode_linear_pairs(int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight,
                           const float *column_scale, const float *input_scale, const T *bias, const T *addend,
                           int64_t count, const int64_t *adapter_of_row, const int64_t *ranks, const float *const *a,
                           const float *const *b, const float *scales, T *out, int threads) {
  const Adapters adapters{count, adapter_of_row, ranks, a, b, scales};
  // A weight with scales is int8; without scales it has the type of x.
  if (column_scale)
    linear(rows, width, columns, x, (const int8_t *)weight, column_scale, input_scale, bias, addend, adapters, out, threads);
  else
    linear(rows, width, columns, x, (const T *)weight, column_scale, input_scale, bias, addend, adapters, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale, const float *input_scale, const T *bias, const T *addend, int64_t count, const int64_t *adapter_of_row, const int64_t *ranks, const float *const *a, const float *const *b, const float *scales, T *out, int threads)
FOR_BOTH_TYPES_TOGETHER(decode_linear_pairs, (rows, width, columns, x, weight, column_scale, input_scale, bias, addend, count, adapter_of_row, ranks, a, b, scales, out, threads))
#undef PARAMETERS

template <class T>
static void decode_linear(int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale,
                     const float *input_scale, const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out,
                     int threads) {
  decode_linear_pairs(rows, width, columns, x, weight, column_scale, input_scale, bias, addend, rank ? 1 : 0, nullptr, &rank, &a, &b, &scale, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale, const float *input_scale, const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out, int threads)
FOR_BOTH_TYPES_TOGETHER(decode_linear, (rows, width, columns, x, weight, column_scale, input_scale, bias, addend, rank, a, b, scale, out, threads))
#undef PARAMETERS

// The sums of the head stay float32: rounded to bfloat16, the two best logits are often equal.
template <class T>
static void head(int64_t rows, int64_t width, int64_t columns, const T *x, const T *weight, float *out, int threads) {
  const Adapters none{0, nullptr, nullptr, nullptr, nullptr, nullptr};
  linear(rows, width, columns, x, weight, nullptr, nullptr, (const T *)nullptr, (const T *)nullptr, none, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const T *weight, float *out, int threads)
FOR_BOTH_TYPES_TOGETHER(head, (rows, width, columns, x, weight, out, threads))
#undef PARAMETERS
