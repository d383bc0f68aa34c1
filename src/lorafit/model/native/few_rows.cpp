// Products of a few rows with a large frozen weight, with its low-rank path, as in generating.
//
// out = x W^T + bias + addend + scale * (x A^T) B^T with x (rows, width), W (columns, width), A (rank, width) and
// B (columns, rank); bias, addend and the pair may be missing. What it costs is reading W, which is read once. A sum
// is taken in the same order whatever the other rows and the number of threads.
//
// W in int8 has a scale for each column. Where the CPU multiplies 16-bit integers x is rounded to 15 bits a row for
// that, so outliers need no care; elsewhere W is widened.
#include "common.h"

#include <vector>
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
#ifndef RR
#define RR 4
#define CC 4
#define PF 8
#define AH 0
#endif
constexpr int ROWS = RR, COLUMNS = CC, PREFETCHING = PF, AHEAD = AH;  // of one tile
constexpr int64_t MOST = 8 * ROWS;
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));

static inline float total(vec sum) {
  float lanes[LANES];
  std::memcpy(lanes, &sum, sizeof(lanes));
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

static inline vec widen(const float *w) { return *(const vec *)w; }
static inline vec widen(const bf16 *w) { return (vec)(__builtin_convertvector(*(const halves *)w, words) << 16); }
static inline vec widen(const int8_t *w) { return __builtin_convertvector(*(const bytes *)w, vec); }
static inline float get(int8_t value) { return float(value); }

// How x is held for products with weights W, and the sum of STEP products in lanes. This one is for any CPU.
template <class W>
struct Dot {
  typedef float Input;
  typedef vec Weights, Sums;
  static constexpr int STEP = LANES;
  template <class T>
  static float prepare(int64_t width, const T *x, Input *to) {  // returns what the sums are to be multiplied by
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = get(x[i]);
    return 1.0f;
  }
  static Weights load(const W *w) { return widen(w); }
  static Sums add(Sums sums, Weights w, const Input *x) { return sums + w * *(const vec *)x; }
  static float end(Sums sums) { return total(sums); }
  static float product(Input x, W w) { return x * get(w); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<bf16> {
  typedef bf16 Input;
  typedef __m512i Weights;
  typedef __m512 Sums;
  static constexpr int STEP = 32;
  static float prepare(int64_t width, const bf16 *x, Input *to) {
    std::memcpy(to, x, width * sizeof(bf16));
    return 1.0f;
  }
  static Weights load(const bf16 *w) { return _mm512_loadu_si512(w); }
  static Sums add(Sums sums, Weights w, const Input *x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
  static float end(Sums sums) { return total((vec)sums); }
  static float product(bf16 x, bf16 w) { return get(x) * get(w); }
};
#endif

#ifdef __AVX512VNNI__
template <>
struct Dot<int8_t> {
  typedef int16_t Input;
  typedef __m512i Weights, Sums;
  static constexpr int STEP = 32;
  template <class T>
  static float prepare(int64_t width, const T *x, Input *to) {
    float high = 0;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < width; i++) high = std::max(high, std::fabs(get(x[i])));
    const int64_t products = (width + LANES - 1) / LANES;  // that one lane adds up: they must stay below 2^31
    const float peak = float(std::min<int64_t>(16256, 2147483647 / (127 * products) - 1));
    const float inverse = high > 0 ? peak / high : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) to[i] = int16_t(int32_t(__builtin_rintf(get(x[i]) * inverse)));
    return high / peak;
  }
  static Weights load(const int8_t *w) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)w)); }
  static Sums add(Sums sums, Weights w, const Input *x) {
    return _mm512_dpwssd_epi32(sums, w, _mm512_loadu_si512(x));
  }
  static float end(Sums sums) { return total(__builtin_convertvector((integers)sums, vec)); }
  static float product(Input x, int8_t w) { return float(int32_t(x) * int32_t(w)); }
};
#endif

template <class Item>
static Item *room(std::vector<Item> &kept, int64_t count) {  // kept from call to call: fresh pages cost more than a row
  if (int64_t(kept.size()) < count) kept.resize(count);
  return kept.data();
}

// The rows of x lie in groups of ROWS, and in a group step by step: the STEP numbers of each row side by side.
static int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[m * stride + n] = the products of a group of M rows of x with N rows of w
template <class W, int M, int N>
static inline void tile(int64_t width, const typename Dot<W>::Input *x, const W *w, float *out, int64_t stride) {
  typedef Dot<W> D;
  typename D::Sums sums[M][N] = {};
  int64_t k = 0;
  for (; k + D::STEP <= width; k += D::STEP) {
    typename D::Weights weights[N];
    for (int n = 0; n < N; n++) {
      weights[n] = D::load(w + n * width + k);
      if (M <= PREFETCHING) __builtin_prefetch(w + (n + N) * width + k + AHEAD, 0, 2);
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) sums[m][n] = D::add(sums[m][n], weights[n], x + k * M + m * D::STEP);
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float rest = 0;
      for (int64_t i = k; i < width; i++) rest += D::product(x[k * M + m * D::STEP + i - k], w[n * width + i]);
      out[m * stride + n] = D::end(sums[m][n]) + rest;
    }
}

// out (rows, N), N rows of w
template <class W, int N>
static inline void tiles(int64_t rows, int64_t width, const typename Dot<W>::Input *x, const W *w, float *out,
                         int64_t stride) {
  const int64_t x_row = padded(width, Dot<W>::STEP);
  for (int64_t m = 0; m < rows; m += ROWS, x += ROWS * x_row, out += ROWS * stride) switch (std::min<int64_t>(ROWS, rows - m)) {
      case 1: tile<W, 1, N>(width, x, w, out, stride); break;
      case 2: tile<W, 2, N>(width, x, w, out, stride); break;
      case 3: tile<W, 3, N>(width, x, w, out, stride); break;
      case 4: tile<W, 4, N>(width, x, w, out, stride); break;
      case 5: tile<W, 5, N>(width, x, w, out, stride); break;
      case 6: tile<W, 6, N>(width, x, w, out, stride); break;
      case 7: tile<W, 7, N>(width, x, w, out, stride); break;
      default: tile<W, 8, N>(width, x, w, out, stride);
    }
}

// Prepare row `row` of x and put it where its group has it
template <class W, class T>
static float interleave(int64_t rows, int64_t width, int64_t row, const T *x, typename Dot<W>::Input *all) {
  typedef Dot<W> D;
  static thread_local std::vector<typename D::Input> kept;
  typename D::Input *line = room(kept, width);
  const float scale = D::prepare(width, x + row * width, line);
  const int64_t group = row / ROWS * ROWS, together = std::min<int64_t>(ROWS, rows - group), m = row - group;
  typename D::Input *to = all + group * padded(width, D::STEP) + m * D::STEP;
  for (int64_t k = 0; k < width; k += D::STEP)
    std::memcpy(to + k * together, line + k, std::min<int64_t>(D::STEP, width - k) * sizeof(*line));
  return scale;
}

template <class T, class W>
static void product_of(int64_t rows, int64_t width, int64_t columns, const T *x, const W *weight, const float *column_scale,
                       const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out,
                       int threads) {
  typedef typename Dot<W>::Input Input;
  static thread_local std::vector<Input> kept_x;
  static thread_local std::vector<float> kept_floats;
  const int64_t x_row = padded(width, Dot<W>::STEP), wide_row = padded(width, LANES);
  Input *input = room(kept_x, rows * x_row);
  float *row_scale = room(kept_floats, rows * (1 + rank + wide_row));
  float *low = row_scale + rows, *wide_x = low + rows * rank;
  const int64_t blocks = (columns + COLUMNS - 1) / COLUMNS;
  for (int64_t row = 0; row < rows; row++) {
    row_scale[row] = interleave<W>(rows, width, row, x, input);
    if (rank) interleave<float>(rows, width, row, x, wide_x);
  }
#pragma omp parallel num_threads(threads)
  {
    if (rank) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < rank; j++) tiles<float, 1>(rows, width, wide_x, a + j * width, low + j, rank);
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = block * COLUMNS, count = std::min<int64_t>(COLUMNS, columns - first);
      float sums[MOST * COLUMNS];
      for (int64_t top = 0; top < rows; top += MOST) {
        const int64_t here = std::min<int64_t>(MOST, rows - top);
        if (count == COLUMNS)
          tiles<W, COLUMNS>(here, width, input + top * x_row, weight + first * width, sums, COLUMNS);
        else
          for (int64_t n = 0; n < count; n++)
            tiles<W, 1>(here, width, input + top * x_row, weight + (first + n) * width, sums + n, COLUMNS);
        for (int64_t m = 0; m < here; m++)
          for (int64_t n = 0; n < count; n++) {
            const int64_t row = top + m, column = first + n;
            float sum = sums[m * COLUMNS + n] * row_scale[row];
            if (column_scale) sum *= column_scale[column];
            if (bias) sum += get(bias[column]);
            if (addend) sum += get(addend[row * columns + column]);
            float along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t j = 0; j < rank; j++) along += low[row * rank + j] * b[column * rank + j];
            put(sum + scale * along, out[row * columns + column]);
          }
      }
    }
  }
}

template <class T>
static void few_rows(int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale,
                     const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out,
                     int threads) {  // a weight with scales is int8, one without of x's type
  if (column_scale)
    product_of(rows, width, columns, x, (const int8_t *)weight, column_scale, bias, addend, rank, a, b, scale, out, threads);
  else
    product_of(rows, width, columns, x, (const T *)weight, column_scale, bias, addend, rank, a, b, scale, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t columns, const T *x, const void *weight, const float *column_scale, const T *bias, const T *addend, int64_t rank, const float *a, const float *b, float scale, T *out, int threads)
FOR_BOTH_TYPES(few_rows, (rows, width, columns, x, weight, column_scale, bias, addend, rank, a, b, scale, out, threads))
#undef PARAMETERS
