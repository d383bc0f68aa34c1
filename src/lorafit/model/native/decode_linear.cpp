// Products of a few rows with a large frozen weight and its low-rank path, as in decoding.
//
// out = x W^T + bias + addend + scale * (x A^T) B^T with x (rows, width), W (columns, width), A (rank, width) and
// B (columns, rank); bias, addend and the pair may be null, and each row may have a pair of its own. The cost is to read
// W, which is read once. The order of each sum does not depend on the other rows or on the number of threads.
//
// W may be int8: then column_scale multiplies the sums and input_scale x, as in model/quant.py. It is widened during
// the product, so inputs keep the precision of their type and outliers need no special case.
#include "dots.h"
#include "vectors.h"

#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Rows and columns of one tile: their sums fill the registers. Few rows of x stay in the first cache, but int8 is widened
// again for each group of them.
constexpr int SUMS = 24;
template <class W>
constexpr int ROWS = sizeof(W) == 1 ? 8 : 4;
constexpr int64_t LINE = 64;  // bytes of a cache line
constexpr int64_t MOST = 32, SPAN = 2 * SUMS;  // rows and columns whose sums are held at a time
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));

static inline vec widen(const float *w) { return *(const vec *)w; }
static inline vec widen(const bf16 *w) { return (vec)(__builtin_convertvector(*(const halves *)w, words) << 16); }
static inline vec widen(const int8_t *w) {  // GCC 12 compiles the last expression to far more than one instruction
#if defined(__AVX512F__)
  return __builtin_convertvector((integers)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)w)), vec);
#elif defined(__AVX2__)
  return __builtin_convertvector((integers)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)w)), vec);
#else
  return __builtin_convertvector(__builtin_convertvector(*(const bytes *)w, integers), vec);
#endif
}
static inline float get(int8_t value) { return float(value); }

// The layout of x of type T for products with weights W, and sums of STEP products. This one is for any CPU.
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
static inline __m512bh pairs(const int8_t *w) {  // bfloat16 holds every int8
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

// The rows of x are stored in groups of ROWS<W>, and each group step by step: the STEP numbers of each row in turn.

// out[m * stride + n] = the products of a group of M rows of x with N rows of w; `lines` per step from `ahead`
// on are prefetched into the second cache
template <class T, class W, int M, int N>
static inline void tile(int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out, int64_t stride, const char *ahead,
                        int64_t lines) {
  typedef Dot<T, W> D;
  typename D::Sums sums[M][N] = {};
  int64_t k = 0;
#pragma GCC unroll 2  // one step at a time GCC makes a slower loop
  for (; k + D::STEP <= width; k += D::STEP) {
    for (int64_t line = 0; line < lines; line++, ahead += LINE) __builtin_prefetch(ahead, 0, 2);
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
  float whole[M * N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) lanes[m * N + n] = (vec)sums[m][n];
  totals(lanes, M * N, whole);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float rest = 0;
      for (int64_t i = k; i < width; i++) rest += get(x[k * M + m * D::STEP + i - k]) * get(w[n * width + i]);
      out[m * stride + n] = whole[m * N + n] + rest;
    }
}

// out (rows, N) of N rows of w, as `tile`; each group of rows prefetches its own part of the next rows
template <class T, class W, int N>
static inline void groups(int64_t rows, int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out, int64_t stride,
                          const char *ahead, int64_t lines) {
  const int64_t x_row = padded(width, Dot<T, W>::STEP), share = lines * LINE * (width / Dot<T, W>::STEP);
  constexpr int most = std::min(ROWS<W>, SUMS / N);
  for (; rows > 0; rows -= most, x += most * x_row, out += most * stride, ahead += share) switch (rows) {
      case 1: tile<T, W, 1, N>(width, x, w, out, stride, ahead, lines); break;
      case 2: tile<T, W, 2, N>(width, x, w, out, stride, ahead, lines); break;
      case 3: tile<T, W, 3, N>(width, x, w, out, stride, ahead, lines); break;
      case 4: tile<T, W, 4, N>(width, x, w, out, stride, ahead, lines); break;
      case 5: tile<T, W, std::min(5, most), N>(width, x, w, out, stride, ahead, lines); break;
      case 6: tile<T, W, std::min(6, most), N>(width, x, w, out, stride, ahead, lines); break;
      case 7: tile<T, W, std::min(7, most), N>(width, x, w, out, stride, ahead, lines); break;
      default: tile<T, W, most, N>(width, x, w, out, stride, ahead, lines);
    }
}

// out (rows, N) of N rows of w. The CPU's own prefetch stops at a page's end, so the next N rows are prefetched.
template <class T, class W, int N>
static inline void tiles(int64_t rows, int64_t width, const typename Dot<T, W>::Input *x, const W *w, float *out,
                         int64_t stride) {
  constexpr int64_t step_lines = (N * Dot<T, W>::STEP * sizeof(W) + LINE - 1) / LINE;
  const int64_t turns = (rows + ROWS<W> - 1) / ROWS<W>, lines = (step_lines + turns - 1) / turns;
  const char *const ahead = (const char *)(w + N * width);
  groups<T, W, N>(rows, width, x, w, out, stride, ahead, lines);
}

// x in the layout of `tiles`
template <class T, class W>
static const typename Dot<T, W>::Input *interleave(int64_t rows, int64_t width, const T *x, const float *scale) {
  typedef Dot<T, W> D;
  static thread_local Space line_space, space;
  const int64_t x_row = padded(width, D::STEP);
  typename D::Input *line = line_space.of<typename D::Input>(x_row), *all = space.of<typename D::Input>(rows * x_row);
  for (int64_t row = 0; row < rows; row++) {
    D::prepare(width, x + row * width, scale, line);
    const int64_t group = row / ROWS<W> * ROWS<W>, together = std::min<int64_t>(ROWS<W>, rows - group);
    typename D::Input *to = all + group * x_row + (row - group) * D::STEP;
    for (int64_t k = 0; k < width; k += D::STEP) std::memcpy(to + k * together, line + k, D::STEP * sizeof(*line));
  }
  return all;
}

#ifdef HAS_TILES
// With matrix tiles, 16 rows of the weight are the rows of one and up to 16 rows of x the columns of the other.

// 16 rows of w, 32 deep, widened to the rows of a tile
static const void *as_tile(const int8_t *w, int64_t width, void *scratch) {
  for (int64_t row = 0; row < TILE_ROWS; row++) _mm512_store_si512((char *)scratch + row * TILE_BYTES, (__m512i)pairs(w + row * width));
  return scratch;
}

// Rows of x, 16 at most, 32 deep at a time as columns of tiles
template <class W>
static const uint8_t *transposed(int64_t rows, int64_t width, const bf16 *x, const float *scale) {
  static thread_local Space rows_space, space;
  bf16 *all = rows_space.of<bf16>(rows * width);
  uint8_t *to = space.of<uint8_t>(width / 32 * TILE);
  for (int64_t row = 0; row < rows; row++) PairsDot<W>::prepare(width, x + row * width, scale, all + row * width);
  for (int64_t k = 0; k < width; k += 32) turn_words((const uint8_t *)(all + k), width * 2, rows, TILE_BYTES, to + k / 32 * TILE);
  return to;
}

// sums[n][m] = the products of 16 rows of w with the rows of x
template <class W>
static void sixteen_columns(int64_t width, const uint8_t *x, const W *w, float *sums) {
  alignas(64) uint8_t scratch[2 * TILE];
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t k = 0; k < width; k += 64) {
    const bool both = k + 32 < width;
    for (int64_t row = 0; row < TILE_ROWS; row++) __builtin_prefetch(w + (row + TILE_ROWS) * width + k, 0, 2);  // the next ones
    if constexpr (sizeof(W) == 1) {
      _tile_loadd(4, as_tile(w + k, width, scratch), TILE_BYTES);
    } else {
      _tile_loadd(4, w + k, width * sizeof(W));
      for (int64_t row = 0; both && row < TILE_ROWS; row++) __builtin_prefetch(w + (row + TILE_ROWS) * width + k + 32, 0, 2);
    }
    _tile_loadd(6, x + k / 32 * TILE, TILE_BYTES);
    _tile_dpbf16ps(0, 4, 6);
    if (!both) break;
    if constexpr (sizeof(W) == 1)
      _tile_loadd(5, as_tile(w + k + 32, width, scratch + TILE), TILE_BYTES);
    else
      _tile_loadd(5, w + k + 32, width * sizeof(W));
    _tile_loadd(7, x + (k / 32 + 1) * TILE, TILE_BYTES);
    _tile_dpbf16ps(1, 5, 7);
  }
  alignas(64) float odd[TILE_ROWS * TILE_ROWS];
  _tile_stored(0, sums, TILE_BYTES);
  _tile_stored(1, odd, TILE_BYTES);
  for (int64_t i = 0; i < TILE_ROWS * TILE_ROWS; i++) sums[i] += odd[i];
}
#endif

// Pairs A and B of several adapters. Row r uses pair which[r], none if that is negative; if `which` is null all
// rows use the only pair.
struct Pairs {
  int64_t count;
  const int64_t *which, *ranks;
  const float *const *a, *const *b, *scales;
  int64_t of(int64_t row) const { return which ? which[row] : count - 1; }
};

template <class T, class W>
static void product_of(int64_t rows, int64_t width, int64_t columns, const T *x, const W *weight, const float *column_scale,
                       const float *input_scale, const T *bias, const T *addend, const Pairs &pairs, T *out, int threads) {
  static thread_local Space space;
  static thread_local std::vector<int64_t> starts;  // of each pair's part of a row of `low`; -1 if no row uses it
  int64_t total = 0;
  starts.assign(pairs.count, -1);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t pair = pairs.of(row);
    if (pair < 0 || starts[pair] >= 0) continue;
    starts[pair] = total;
    total += pairs.ranks[pair];
  }
  const float *wide = total ? interleave<T, float>(rows, width, x, nullptr) : nullptr;
  const int64_t x_row = padded(width, Dot<T, W>::STEP);
  float *low = space.of<float>(rows * total);
  const int64_t *first_low = starts.data();
  const auto finish = [&](int64_t row, int64_t first, int64_t count, float *sums) {  // of neighbouring columns
    const T *const its = addend ? addend + row * columns + first : nullptr;
    if (column_scale)
#pragma omp simd
      for (int64_t n = 0; n < count; n++) sums[n] *= column_scale[first + n];
    if (bias)
#pragma omp simd
      for (int64_t n = 0; n < count; n++) sums[n] += get(bias[first + n]);
    if (its)
#pragma omp simd
      for (int64_t n = 0; n < count; n++) sums[n] += get(its[n]);
    const int64_t pair = pairs.of(row), rank = pair < 0 ? 0 : pairs.ranks[pair];
    if (rank)
      for (int64_t n = 0; n < count; n++) {
        const float *from = low + row * total + first_low[pair], *b = pairs.b[pair] + (first + n) * rank;
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < rank; j++) along += from[j] * b[j];
        sums[n] += along * pairs.scales[pair];
      }
    T *const to = out + row * columns + first;
#pragma omp simd
    for (int64_t n = 0; n < count; n++) put(sums[n], to[n]);
  };
  int64_t done = 0;  // columns that the tiles compute
  const uint8_t *tiled = nullptr;
#ifdef HAS_TILES
  if constexpr (std::is_same<T, bf16>::value)
    if (may_use_tiles() && width % 32 == 0 && rows <= TILE_ROWS) {
      done = columns / TILE_ROWS * TILE_ROWS;
      tiled = transposed<W>(rows, width, x, input_scale);
    }
#endif
  const auto *input = done < columns ? interleave<T, W>(rows, width, x, input_scale) : nullptr;
  constexpr int few = SUMS / 4, fewer = SUMS / ROWS<W>;  // columns of a tile of four rows, and of one with all
  const int64_t together = rows <= 4 ? few : fewer, blocks = (columns - done + SPAN - 1) / SPAN;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t pair = 0; pair < pairs.count; pair++) {
      if (first_low[pair] < 0) continue;
#pragma omp for schedule(static)
      for (int64_t j = 0; j < pairs.ranks[pair]; j++)
        tiles<T, float, 1>(rows, width, wide, pairs.a[pair] + j * width, low + first_low[pair] + j, total);
    }
#ifdef HAS_TILES
    if constexpr (std::is_same<T, bf16>::value) if (tiled) {
      const Tiles shapes(true);
      alignas(64) float sums[TILE_ROWS * TILE_ROWS];
#pragma omp for schedule(static)
      for (int64_t first = 0; first < done; first += TILE_ROWS) {
        sixteen_columns(width, tiled, weight + first * width, sums);
        for (int64_t row = 0; row < rows; row++) {
          float its[TILE_ROWS];
          for (int64_t n = 0; n < TILE_ROWS; n++) its[n] = sums[n * TILE_ROWS + row];
          finish(row, first, TILE_ROWS, its);
        }
      }
    }
#endif
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = done + block * SPAN, count = std::min(SPAN, columns - first);
      float sums[MOST * SPAN];
      for (int64_t top = 0; top < rows; top += MOST) {
        const int64_t here = std::min(MOST, rows - top);
        const auto *from = input + top * x_row;
        for (int64_t n = 0; n < count;) {
          const W *const w = weight + (first + n) * width;
          const int64_t left = count - n;
          if (left < together)
            tiles<T, W, 1>(here, width, from, w, sums + n, SPAN), n++;
          else if (together == few)
            tiles<T, W, few>(here, width, from, w, sums + n, SPAN), n += few;
          else
            tiles<T, W, fewer>(here, width, from, w, sums + n, SPAN), n += fewer;
        }
        for (int64_t m = 0; m < here; m++) finish(top + m, first, count, sums + m * SPAN);
      }
    }
  }
}

template <class T>
static void decode_linear_pairs(int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight,
                           const float *column_scale, const float *input_scale, const T *bias, const T *addend,
                           int64_t count, const int64_t *which, const int64_t *ranks, const float *const *a,
                           const float *const *b, const float *scales, T *out, int threads) {
  const Pairs pairs{count, which, ranks, a, b, scales};  // a weight with scales is int8, one without of x's type
  if (column_scale)
    product_of(rows, width, columns, x, (const int8_t *)weight, column_scale, input_scale, bias, addend, pairs, out, threads);
  else
    product_of(rows, width, columns, x, (const T *)weight, column_scale, input_scale, bias, addend, pairs, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale, const float *input_scale, const T *bias, const T *addend, int64_t count, const int64_t *which, const int64_t *ranks, const float *const *a, const float *const *b, const float *scales, T *out, int threads)
FOR_BOTH_TYPES(decode_linear_pairs, (rows, width, columns, x, weight, column_scale, input_scale, bias, addend, count, which, ranks, a, b, scales, out, threads))
#undef PARAMETERS

template <class T>
static void decode_linear(int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale,
                     const float *input_scale, const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out,
                     int threads) {
  decode_linear_pairs(rows, width, columns, x, weight, column_scale, input_scale, bias, addend, rank ? 1 : 0, nullptr, &rank, &a, &b, &scale, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale, const float *input_scale, const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out, int threads)
FOR_BOTH_TYPES(decode_linear, (rows, width, columns, x, weight, column_scale, input_scale, bias, addend, rank, a, b, scale, out, threads))
#undef PARAMETERS
