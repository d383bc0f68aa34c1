// Products of rows with a frozen weight in either direction, in bfloat16 or in 8 bit, on matrix tiles or in vectors.
//
// out[r, c] = addend[r, c] + sum_k a[r, k] * w(k, c), in 8 bit times a_scale[r] * c_scale[c]; sums in float32 and int32.
// a is (rows, depth); w(k, c) is weight[c, k] of a (columns, depth) weight (forward), or with `transposed` weight[k, c] of a
// (depth, columns) one (input gradient). depth is a multiple of 64 bytes. addend may be null, or out itself. In bfloat16
// a low-rank product of the same shape is added: `rank` deep, of any depth, with factors low and factor.
//
// All rows are rearranged into tiles of 32, in `tiles` (rows rounded up to 32, times the bytes of depth and rank, each in
// whole steps of 64). Each core computes a group of columns that stays in its cache, rearranged into panels of 32, and
// reads all tiles for it. A depth of more than a chunk is computed in chunks, and the sums are kept between them.
#include "dots.h"

extern "C" void has_tiles(int64_t *answer, int) { *answer = may_use_tiles(); }

#ifdef HAS_DOTS
extern "C" void has_products(int64_t *answer, int) { *answer = 1; }

constexpr int64_t PANEL = 2 * TILE_ROWS;  // columns of a panel, rows of a strip
constexpr int64_t NEAR = 16;              // steps of a panel that stay in the first cache

// 64 bytes of depth of a panel into two tiles, adjacent depths interleaved, as the tile product needs them; columns
// from `count` on are zero, as are depths after `deep`
static void lay_out(const int8_t *weight, int64_t columns, int64_t count, int64_t deep, uint8_t *to) {
  const __mmask32 mask = count < 32 ? (1u << count) - 1 : ~0u;
  for (int64_t i = 0; i < 16; i++) {
    __m256i row[4];
    for (int64_t j = 0; j < 4; j++) row[j] = _mm256_maskz_loadu_epi8(4 * i + j < deep ? mask : 0, weight + (4 * i + j) * columns);
    const __m256i low = _mm256_unpacklo_epi8(row[0], row[1]), high = _mm256_unpackhi_epi8(row[0], row[1]);
    const __m256i low2 = _mm256_unpacklo_epi8(row[2], row[3]), high2 = _mm256_unpackhi_epi8(row[2], row[3]);
    const __m256i quarter[4] = {_mm256_unpacklo_epi16(low, low2), _mm256_unpackhi_epi16(low, low2),
                                _mm256_unpacklo_epi16(high, high2), _mm256_unpackhi_epi16(high, high2)};
    for (int64_t j = 0; j < 4; j++) {
      _mm_store_si128((__m128i *)(to + i * TILE_BYTES) + j, _mm256_castsi256_si128(quarter[j]));
      _mm_store_si128((__m128i *)(to + TILE + i * TILE_BYTES) + j, _mm256_extracti128_si256(quarter[j], 1));
    }
  }
}
static void lay_out(const bf16 *weight, int64_t columns, int64_t count, int64_t deep, uint8_t *to) {
  const __mmask32 mask = count < 32 ? (1u << count) - 1 : ~0u;
  const __m512i first = side_by_side(0), second = side_by_side(16);
  for (int64_t i = 0; i < 16; i++) {
    const __m512i even = _mm512_maskz_loadu_epi16(2 * i < deep ? mask : 0, weight + 2 * i * columns);
    const __m512i odd = _mm512_maskz_loadu_epi16(2 * i + 1 < deep ? mask : 0, weight + (2 * i + 1) * columns);
    _mm512_store_si512(to + i * TILE_BYTES, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(to + TILE + i * TILE_BYTES, _mm512_permutex2var_epi16(even, second, odd));
  }
}

#ifdef HAS_TILES
#define MULTIPLY(DOT)                                                                  \
  for (int64_t step = 0; step < steps; step++, strip += 2 * TILE, panel += 2 * TILE) { \
    _tile_loadd(4, strip, TILE_BYTES);                                                 \
    _tile_loadd(6, panel, TILE_BYTES);                                                 \
    _tile_loadd(5, strip + TILE, TILE_BYTES);                                          \
    _tile_loadd(7, panel + TILE, TILE_BYTES);                                          \
    DOT(0, 4, 6);                                                                      \
    DOT(1, 4, 7);                                                                      \
    DOT(2, 5, 6);                                                                      \
    DOT(3, 5, 7);                                                                      \
  }

// Adds the product of a strip of rows and a panel of columns to sums (32, 32), or overwrites them if `anew`
template <class In, class Sum>
static void multiply_tiles(int64_t steps, const uint8_t *strip, const uint8_t *panel, bool anew, Sum *sums) {
  Sum *const corners[] = {sums, sums + TILE_ROWS, sums + TILE_ROWS * PANEL, sums + TILE_ROWS * PANEL + TILE_ROWS};
  if (anew) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, corners[0], PANEL * 4);
    _tile_loadd(1, corners[1], PANEL * 4);
    _tile_loadd(2, corners[2], PANEL * 4);
    _tile_loadd(3, corners[3], PANEL * 4);
  }
  if constexpr (sizeof(In) == 1) {
    MULTIPLY(_tile_dpbssd)
  } else {
    MULTIPLY(_tile_dpbf16ps)
  }
  _tile_stored(0, corners[0], PANEL * 4);
  _tile_stored(1, corners[1], PANEL * 4);
  _tile_stored(2, corners[2], PANEL * 4);
  _tile_stored(3, corners[3], PANEL * 4);
}
#endif

static __m512i vector_of(const int32_t *from) { return _mm512_load_si512(from); }
static __m512 vector_of(const float *from) { return _mm512_load_ps(from); }
static __m512i plus(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
static __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
static void keep(__m512i sums, int32_t *to) { _mm512_store_si512(to, sums); }
static void keep(__m512 sums, float *to) { _mm512_store_ps(to, sums); }

// The same in vectors of 16 columns, with `start` of each column; `ahead` is prefetched into the second cache
template <class Sum>
static void multiply(int64_t rows, int64_t steps, const uint8_t *strip, const uint8_t *panel, const Sum *start, bool anew, Sum *sums, const uint8_t *ahead) {
  typedef decltype(vector_of(start)) Vector;
  for (int64_t from = 0; from < steps; from += NEAR, anew = false, start = nullptr) {
    const int64_t end = std::min(from + NEAR, steps);
    for (int64_t top = 0; top < rows; top += DOT_ROWS) {
      Sum *const its = sums + top * PANEL;
      const uint8_t *const a = strip + top / TILE_ROWS * TILE + top % TILE_ROWS * TILE_BYTES;
      Vector left[DOT_ROWS], right[DOT_ROWS];
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        if (from == 0) __builtin_prefetch(its + row * PANEL, 1), __builtin_prefetch(its + row * PANEL + 16, 1);
        left[row] = right[row] = Vector{};
      }
      add_dots(end - from, a + from * 2 * TILE, TILE_BYTES, 2 * TILE, panel + from * 2 * TILE, 2 * TILE, TILE, ahead, left, right);
      ahead += (end - from) * 2 * TILE_BYTES;
      if (start) {
#pragma GCC unroll 16
        for (int64_t row = 0; row < DOT_ROWS; row++) left[row] = plus(left[row], vector_of(start)), right[row] = plus(right[row], vector_of(start + 16));
      }
      if (!anew) {
#pragma GCC unroll 16
        for (int64_t row = 0; row < DOT_ROWS; row++) {
          left[row] = plus(left[row], vector_of(its + row * PANEL));
          right[row] = plus(right[row], vector_of(its + row * PANEL + 16));
        }
      }
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) keep(left[row], its + row * PANEL), keep(right[row], its + row * PANEL + 16);
    }
  }
}

// Vectors multiply int8 by unsigned numbers: a + 128. The negated effect on the sums of a panel's 32 columns
static void offsets(int64_t steps, const uint8_t *panel, int32_t *to) {
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t step = 0; step < steps; step++)
    for (int64_t half = 0; half < 2; half++, panel += TILE)
      for (int64_t word = 0; word < TILE_BYTES; word += 4)
        sums[half] = dot(sums[half], _mm512_set1_epi8(-128), _mm512_load_si512(panel + word * TILE_ROWS));
  for (int64_t half = 0; half < 2; half++) keep(_mm512_sub_epi32(_mm512_setzero_si512(), sums[half]), to + half * 16);
}

static __m512 sixteen(const int32_t *from) { return _mm512_cvtepi32_ps(_mm512_load_si512(from)); }
static __m512 sixteen(const float *from) { return _mm512_load_ps(from); }
static __m512 sixteen(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
static __m512 sixteen(const bf16 *from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
static void put(__m512 values, float *to, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, values); }
static void put(__m512 values, bf16 *to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// out (rows, width) of sums (32, 32)
template <class In, class Sum, class T>
static void finish(int64_t rows, int64_t width, int64_t columns, const Sum *sums, const float *row_scale, const float *scale,
                   const T *addend, T *out) {
  for (int64_t row = 0; row < rows; row++, sums += PANEL, out += columns)
    for (int64_t half = 0; half < width; half += 16) {
      const __mmask16 mask = width - half < 16 ? (1u << (width - half)) - 1 : 0xffff;
      __m512 values = sixteen(sums + half);
      if constexpr (sizeof(In) == 1)
        values = _mm512_mul_ps(_mm512_mul_ps(values, _mm512_set1_ps(row_scale[row])), sixteen(scale + half, mask));
      if (addend) values = _mm512_add_ps(values, sixteen(addend + row * columns + half, mask));
      put(values, out + half, mask);
    }
}

template <class In, class Sum, class T>
static void product(int64_t rows, int64_t depth, int64_t columns, const In *a, const float *a_scale, const In *weight,
                    bool transposed, const float *c_scale, int64_t rank, const In *low, const In *factor, const T *addend, T *out,
                    uint8_t *tiles, int threads) {
  constexpr int64_t UNIT = TILE_BYTES / sizeof(In);  // of depth, in a step
  const int64_t own_steps = depth / UNIT, all_steps = own_steps + (rank + UNIT - 1) / UNIT;
  const bool on_tiles = may_use_tiles();
  // bytes of depth that are multiplied at a time, and of a group of columns, which may be a little larger: measured
  const int64_t chunk = on_tiles ? 4096 : 2048, group_bytes = on_tiles ? 1 << 20 : 1 << 19;
  const int64_t chunks = std::max<int64_t>(1, (all_steps * TILE_BYTES + chunk * 7 / 8) / chunk);
  const int64_t most_steps = (all_steps + chunks - 1) / chunks;
  const int64_t start_at = PANEL * most_steps * TILE_BYTES, panel_bytes = start_at + PANEL * sizeof(Sum);
  const int64_t flips = sizeof(In) == 1 && !on_tiles ? -128 : 0;  // of the signs of a (see offsets)
  const int64_t panels = (columns + PANEL - 1) / PANEL, num_tiles = (rows + PANEL - 1) / PANEL;
  const int64_t turns = std::max<int64_t>(1, (panels * panel_bytes / threads + group_bytes / 4) / group_bytes);
  const int64_t groups = std::min(turns * threads, panels), group = (panels + groups - 1) / groups;
  const int64_t strip_bytes = PANEL * all_steps * TILE_BYTES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space laid_out_space, sums_space;
    const Tiles tiles(on_tiles);
    uint8_t *const laid_out = laid_out_space.of<uint8_t>(group * panel_bytes);
    Sum *const kept = sums_space.of<Sum>((chunks > 1 ? num_tiles * group : 1) * PANEL * PANEL);
#pragma omp for schedule(static)
    for (int64_t top = 0; top < num_tiles * PANEL; top += TILE_ROWS)
      for (int64_t step = 0; step < all_steps; step++)
        for (int64_t row = top; row < top + TILE_ROWS; row++) {
          const int64_t tile = row / PANEL * strip_bytes + (2 * step + row % PANEL / TILE_ROWS) * TILE;
          const int64_t deep = (step - own_steps) * UNIT, left = (rank - deep) * sizeof(In);  // in the low-rank factor
          const __mmask64 mask = row >= rows ? 0 : deep < 0 || left >= TILE_BYTES ? ~0ull : (1ull << left) - 1;
          const __m512i line = _mm512_maskz_loadu_epi8(mask, deep < 0 ? a + row * depth + step * UNIT : low + row * rank + deep);
          _mm512_store_si512(tiles + tile + row % TILE_ROWS * TILE_BYTES, _mm512_xor_si512(line, _mm512_set1_epi8(flips)));
        }
#pragma omp for schedule(dynamic, 1)
    for (int64_t which = 0; which < groups; which++) {
      const int64_t begin = which * panels / groups, end = (which + 1) * panels / groups;
      for (int64_t from = 0; from < all_steps; from += most_steps) {
        const int64_t steps = std::min(most_steps, all_steps - from);
        const auto lay = [&](int64_t panel, int64_t step) {
          const int64_t column = panel * PANEL, width = std::min(PANEL, columns - column);
          const bool own = from + step < own_steps;
          const int64_t k = (from + step - (own ? 0 : own_steps)) * UNIT, whole = own ? depth : rank;
          const In *const of = own ? weight : factor;
          uint8_t *const to = laid_out + (panel - begin) * panel_bytes + 2 * step * TILE;
          if (transposed) {
            lay_out(of + k * columns + column, columns, width, whole - k, to);
          } else {
            const int64_t pitch = whole * sizeof(In), bytes = (whole - k) * sizeof(In);
            const uint8_t *at = (const uint8_t *)(of + column * whole + k);
            turn_words(at, pitch, width, bytes, to);
            turn_words(at + TILE_ROWS * pitch, pitch, width - TILE_ROWS, bytes, to + TILE);
          }
        };
        if (transposed)  // along the rows of the weight
          for (int64_t step = 0; step < steps; step++)
            for (int64_t panel = begin; panel < end; panel++) lay(panel, step);
        for (int64_t panel = begin; panel < end; panel++) {
          uint8_t *const its = laid_out + (panel - begin) * panel_bytes;
          if (!transposed)
            for (int64_t step = 0; step < steps; step++) lay(panel, step);
          std::memset(its + start_at, 0, PANEL * sizeof(Sum));
          if constexpr (sizeof(In) == 1)
            if (!on_tiles) offsets(steps, its, (int32_t *)(its + start_at));
        }
        for (int64_t strip = 0; strip < num_tiles; strip++)
          for (int64_t panel = begin; panel < end; panel++) {
            const int64_t column = panel * PANEL, width = std::min(PANEL, columns - column), first = strip * PANEL;
            const int64_t count = std::min(PANEL, rows - first), start = first * columns + column;
            const bool last = from + steps == all_steps;
            Sum *const sums = chunks > 1 ? kept + (strip * group + panel - begin) * PANEL * PANEL : kept;
            if (last)
              for (int64_t row = 0; row < count; row++) {
                __builtin_prefetch(out + start + row * columns, 1);
                if (addend != out) __builtin_prefetch(addend + start + row * columns);
              }
            const uint8_t *const own = tiles + strip * strip_bytes + from * 2 * TILE, *const its = laid_out + (panel - begin) * panel_bytes;
#ifdef HAS_TILES
            if (on_tiles)
              multiply_tiles<In>(steps, own, its, from == 0, sums);
            else
#endif
              multiply(count, steps, own, its, (const Sum *)(its + start_at), from == 0, sums,
                       own + strip_bytes + (panel - begin) * steps * 2 * TILE / (end - begin));
            if (last) finish<In>(count, width, columns, sums, a_scale + first, c_scale + column, addend ? addend + start : nullptr, out + start);
          }
      }
    }
  }
}
#else
extern "C" void has_products(int64_t *answer, int) { *answer = 0; }
template <class In, class Sum, class T>
static void product(int64_t, int64_t, int64_t, const In *, const float *, const In *, bool, const float *, int64_t, const In *, const In *, const T *, T *, uint8_t *, int) {}
#endif

extern "C" void product_bf16(int64_t rows, int64_t depth, int64_t columns, const bf16 *a, const bf16 *weight, int64_t transposed,
                             int64_t rank, const bf16 *low, const bf16 *factor, const bf16 *addend, bf16 *out, uint8_t *tiles, int threads) {
  product<bf16, float>(rows, depth, columns, a, nullptr, weight, transposed, nullptr, rank, low, factor, addend, out, tiles, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t depth, int64_t columns, const int8_t *a, const float *a_scale, const int8_t *weight, int64_t transposed, const float *c_scale, const T *addend, T *out, uint8_t *tiles, int threads)
extern "C" void int8_product_f32 PARAMETERS(float) { product<int8_t, int32_t>(rows, depth, columns, a, a_scale, weight, transposed, c_scale, 0, nullptr, nullptr, addend, out, tiles, threads); }
extern "C" void int8_product_bf16 PARAMETERS(bf16) { product<int8_t, int32_t>(rows, depth, columns, a, a_scale, weight, transposed, c_scale, 0, nullptr, nullptr, addend, out, tiles, threads); }
#undef PARAMETERS
