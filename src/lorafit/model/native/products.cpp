// Products of rows with a frozen weight (forward and input gradient), in bfloat16 or int8, on matrix tiles or in vectors.
//
// out[r, c] = addend[r, c] + sum_k a[r, k] * w(k, c); in int8 the sum is multiplied by a_scale[r] * c_scale[c].
// Accumulators are float32 for bfloat16 and int32 for int8. a is (rows, depth). w(k, c) is weight[c, k] of a
// (columns, depth) weight (forward), or with `transposed` weight[k, c] of a (depth, columns) weight (input gradient).
// depth is a multiple of 64 bytes. addend can be null, or out itself. In bfloat16 a low-rank product of the same shape is
// added: its depth is `rank` (any number), its factors are low and factor. In int8, columns of the input that are outliers
// (zero in a) are multiplied in float32 and added before c_scale.
//
// All rows are packed into row tiles of 32, in `tiles` (rows rounded up to 32, times the bytes of depth and rank, each
// rounded up to steps of 64). Each thread takes a group of columns that fits its cache, packs it in panels of 32, and
// multiplies it with all row tiles. A depth larger than a chunk is processed in chunks, and the accumulators are kept.
#include "dots.h"

// Columns of the input x (rows, depth) that are not in `a`. x[r, k] * scale[k] is multiplied with the weight.
template <class T>
struct Outliers {
  int64_t count;
  const int64_t *columns;  // (count)
  const T *x;
  const float *scale;  // (depth)
  float *values;       // (rows, count): a workspace
};

extern "C" void has_tiles(int64_t *answer, int) { *answer = may_use_tiles(); }

#ifdef HAS_DOTS
extern "C" void has_products(int64_t *answer, int) { *answer = 1; }

constexpr int64_t PANEL = 2 * TILE_ROWS;  // columns of a panel, rows of a row tile
constexpr int64_t CACHED_STEPS = 16;              // steps of a panel that fit the L1 cache

// Packs 64 bytes of depth of a panel into two tiles, with neighbours in depth interleaved (VNNI layout). Columns from
// `count` on and rows from `deep` on are zero.
static void pack(const int8_t *weight, int64_t columns, int64_t count, int64_t deep, uint8_t *to) {
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
static void pack(const bf16 *weight, int64_t columns, int64_t count, int64_t deep, uint8_t *to) {
  const __mmask32 mask = count < 32 ? (1u << count) - 1 : ~0u;
  const __m512i first = interleave_order(0), second = interleave_order(16);
  for (int64_t i = 0; i < 16; i++) {
    const __m512i even = _mm512_maskz_loadu_epi16(2 * i < deep ? mask : 0, weight + 2 * i * columns);
    const __m512i odd = _mm512_maskz_loadu_epi16(2 * i + 1 < deep ? mask : 0, weight + (2 * i + 1) * columns);
    _mm512_store_si512(to + i * TILE_BYTES, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_store_si512(to + TILE + i * TILE_BYTES, _mm512_permutex2var_epi16(even, second, odd));
  }
}

#ifdef HAS_TILES
#define MULTIPLY(DOT)                                                                  \
  for (int64_t step = 0; step < steps; step++, row_tile += 2 * TILE, panel += 2 * TILE) { \
    _tile_loadd(4, row_tile, TILE_BYTES);                                                 \
    _tile_loadd(6, panel, TILE_BYTES);                                                 \
    _tile_loadd(5, row_tile + TILE, TILE_BYTES);                                          \
    _tile_loadd(7, panel + TILE, TILE_BYTES);                                          \
    DOT(0, 4, 6);                                                                      \
    DOT(1, 4, 7);                                                                      \
    DOT(2, 5, 6);                                                                      \
    DOT(3, 5, 7);                                                                      \
  }

// Adds the product of a row tile and a panel to sums (32, 32); with `overwrite` stores it there.
template <class In, class Sum>
static void multiply_tiles(int64_t steps, const uint8_t *row_tile, const uint8_t *panel, bool overwrite, Sum *sums) {
  Sum *const corners[] = {sums, sums + TILE_ROWS, sums + TILE_ROWS * PANEL, sums + TILE_ROWS * PANEL + TILE_ROWS};
  if (overwrite) {
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
static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
static void store(__m512i sums, int32_t *to) { _mm512_store_si512(to, sums); }
static void store(__m512 sums, float *to) { _mm512_store_ps(to, sums); }

// The same in vectors of 16 columns; adds `start` to each column. Prefetches into the L2 cache from `prefetch_from` on.
template <class Sum>
static void multiply(int64_t rows, int64_t steps, const uint8_t *row_tile, const uint8_t *panel, const Sum *start, bool overwrite,
                     Sum *sums, const uint8_t *prefetch_from) {
  typedef decltype(vector_of(start)) Vector;
  for (int64_t from = 0; from < steps; from += CACHED_STEPS, overwrite = false, start = nullptr) {
    const int64_t end = std::min(from + CACHED_STEPS, steps);
    for (int64_t top = 0; top < rows; top += DOT_ROWS) {
      Sum *const block_sums = sums + top * PANEL;
      const uint8_t *const a = row_tile + top / TILE_ROWS * TILE + top % TILE_ROWS * TILE_BYTES;
      Vector left[DOT_ROWS], right[DOT_ROWS];
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        if (from == 0) __builtin_prefetch(block_sums + row * PANEL, 1), __builtin_prefetch(block_sums + row * PANEL + 16, 1);
        left[row] = right[row] = Vector{};
      }
      add_dots(end - from, a + from * 2 * TILE, TILE_BYTES, 2 * TILE, panel + from * 2 * TILE, 2 * TILE, TILE, prefetch_from,
               left, right);
      prefetch_from += (end - from) * 2 * TILE_BYTES;
      if (start) {
#pragma GCC unroll 16
        for (int64_t row = 0; row < DOT_ROWS; row++) left[row] = add(left[row], vector_of(start)),
            right[row] = add(right[row], vector_of(start + 16));
      }
      if (!overwrite) {
#pragma GCC unroll 16
        for (int64_t row = 0; row < DOT_ROWS; row++) {
          left[row] = add(left[row], vector_of(block_sums + row * PANEL));
          right[row] = add(right[row], vector_of(block_sums + row * PANEL + 16));
        }
      }
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) store(left[row], block_sums + row * PANEL),
          store(right[row], block_sums + row * PANEL + 16);
    }
  }
}

// The vector instruction needs an unsigned first factor: a + 128. Computes the correction of a panel's 32 columns.
static void sign_corrections(int64_t steps, const uint8_t *panel, int32_t *to) {
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t step = 0; step < steps; step++)
    for (int64_t half = 0; half < 2; half++, panel += TILE)
      for (int64_t word = 0; word < TILE_BYTES; word += 4)
        sums[half] = dot(sums[half], _mm512_set1_epi8(-128), _mm512_load_si512(panel + word * TILE_ROWS));
  for (int64_t half = 0; half < 2; half++) store(_mm512_sub_epi32(_mm512_setzero_si512(), sums[half]), to + half * 16);
}

static __m512 to_float(const int32_t *from) { return _mm512_cvtepi32_ps(_mm512_load_si512(from)); }
static __m512 to_float(const float *from) { return _mm512_load_ps(from); }
static __m512 to_float(const float *from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
static __m512 to_float(const bf16 *from, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
static void put(__m512 values, float *to, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, values); }
static void put(__m512 values, bf16 *to, __mmask16 mask) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

// Scales sums (32, 32), adds the outliers' products and the addend, and stores out (rows, width). values (rows, outliers) are
// of the input, outlier_weights (outliers, 32) of the weight. FINISHED rows share each load of these.
constexpr int64_t FINISHED = 8;
template <class In, class Sum, class T>
static void finish(int64_t rows, int64_t width, int64_t columns, const Sum *sums, const float *row_scale, const float *scale,
                   int64_t outliers, const float *values, const float *outlier_weights, const T *addend, T *out) {
  const __mmask16 masks[2] = {__mmask16(width < 16 ? (1u << width) - 1 : 0xffff),
                              __mmask16(width < 16 ? 0 : width < 32 ? (1u << (width - 16)) - 1 : 0xffff)};
  for (int64_t first = 0; first < rows; first += FINISHED) {
    __m512 totals[FINISHED][2];
    const float *of_row[FINISHED];
#pragma GCC unroll 8
    for (int64_t i = 0; i < FINISHED; i++) {
      const int64_t row = std::min(first + i, rows - 1);
      of_row[i] = values + row * outliers;
      for (int64_t half = 0; half < 2; half++) {
        totals[i][half] = to_float(sums + row * PANEL + half * 16);
        if constexpr (sizeof(In) == 1) totals[i][half] = _mm512_mul_ps(totals[i][half], _mm512_set1_ps(row_scale[row]));
      }
    }
    for (int64_t outlier = 0; outlier < outliers; outlier++) {
      const __m512 left = to_float(outlier_weights + outlier * PANEL), right = to_float(outlier_weights + outlier * PANEL + 16);
#pragma GCC unroll 8
      for (int64_t i = 0; i < FINISHED; i++) {
        const __m512 value = _mm512_set1_ps(of_row[i][outlier]);
        totals[i][0] = _mm512_fmadd_ps(value, left, totals[i][0]);
        totals[i][1] = _mm512_fmadd_ps(value, right, totals[i][1]);
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < FINISHED; i++)
      for (int64_t half = 0; first + i < rows && half < 2; half++) {
        const int64_t at = (first + i) * columns + half * 16;
        __m512 total = totals[i][half];
        if constexpr (sizeof(In) == 1) total = _mm512_mul_ps(total, to_float(scale + half * 16, masks[half]));
        if (addend) total = _mm512_add_ps(total, to_float(addend + at, masks[half]));
        put(total, out + at, masks[half]);
      }
  }
}

template <class In, class Sum, class T>
static void product(int64_t rows, int64_t depth, int64_t columns, const In *a, const float *a_scale, const In *weight,
                    bool transposed, const float *c_scale, Outliers<T> outliers, int64_t rank, const In *low, const In *factor,
                    const T *addend, T *out, uint8_t *tiles, int threads) {
  constexpr int64_t UNIT = TILE_BYTES / sizeof(In);  // depth of a step, in numbers
  const int64_t own_steps = depth / UNIT, all_steps = own_steps + (rank + UNIT - 1) / UNIT;
  const bool on_tiles = may_use_tiles();
  // bytes of depth per chunk, and bytes per group of columns, which can be slightly larger; both were measured
  const int64_t chunk = on_tiles ? 4096 : 2048, group_bytes = on_tiles ? 1 << 20 : 1 << 19;
  const int64_t chunks = std::max<int64_t>(1, (all_steps * TILE_BYTES + chunk * 7 / 8) / chunk);
  const int64_t chunk_steps = (all_steps + chunks - 1) / chunks;
  const int64_t start_offset = PANEL * chunk_steps * TILE_BYTES, panel_bytes = start_offset + PANEL * sizeof(Sum);
  const int64_t sign_flip = sizeof(In) == 1 && !on_tiles ? -128 : 0;  // flips the signs of a (see sign_corrections)
  const int64_t panels = (columns + PANEL - 1) / PANEL, num_row_tiles = (rows + PANEL - 1) / PANEL;
  const int64_t rounds = std::max<int64_t>(1, (panels * panel_bytes / threads + group_bytes / 4) / group_bytes);
  const int64_t groups = std::min(rounds * threads, panels), group = (panels + groups - 1) / groups;
  const int64_t row_tile_bytes = PANEL * all_steps * TILE_BYTES;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Space packed_space, sums_space, outlier_space;
    const Tiles shapes(on_tiles);
    uint8_t *const packed = packed_space.of<uint8_t>(group * panel_bytes);
    float *const outlier_weights = outlier_space.of<float>(group * outliers.count * PANEL);
    Sum *const sums_buffer = sums_space.of<Sum>((chunks > 1 ? num_row_tiles * group : 1) * PANEL * PANEL);
#pragma omp for schedule(static)
    for (int64_t top = 0; top < num_row_tiles * PANEL; top += TILE_ROWS) {
      for (int64_t row = top; row < std::min(top + TILE_ROWS, rows); row++)
        for (int64_t i = 0; i < outliers.count; i++) {
          const int64_t k = outliers.columns[i];
          outliers.values[row * outliers.count + i] = get(outliers.x[row * depth + k]) * outliers.scale[k];
        }
      for (int64_t step = 0; step < all_steps; step++)
        for (int64_t row = top; row < top + TILE_ROWS; row++) {
          const int64_t tile = row / PANEL * row_tile_bytes + (2 * step + row % PANEL / TILE_ROWS) * TILE;
          const int64_t deep = (step - own_steps) * UNIT, left = (rank - deep) * sizeof(In);  // position in the low-rank factor
          const __mmask64 mask = row >= rows ? 0 : deep < 0 || left >= TILE_BYTES ? ~0ull : (1ull << left) - 1;
          const __m512i line = _mm512_maskz_loadu_epi8(mask, deep < 0 ? a + row * depth + step * UNIT : low + row * rank + deep);
          _mm512_store_si512(tiles + tile + row % TILE_ROWS * TILE_BYTES, _mm512_xor_si512(line, _mm512_set1_epi8(sign_flip)));
        }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t group_index = 0; group_index < groups; group_index++) {
      const int64_t begin = group_index * panels / groups, end = (group_index + 1) * panels / groups;
      for (int64_t from = 0; from < all_steps; from += chunk_steps) {
        const int64_t steps = std::min(chunk_steps, all_steps - from);
        const auto pack_step = [&](int64_t panel, int64_t step) {
          const int64_t column = panel * PANEL, width = std::min(PANEL, columns - column);
          const bool own = from + step < own_steps;
          const int64_t k = (from + step - (own ? 0 : own_steps)) * UNIT, full_depth = own ? depth : rank;
          const In *const source = own ? weight : factor;
          uint8_t *const to = packed + (panel - begin) * panel_bytes + 2 * step * TILE;
          if (transposed) {
            pack(source + k * columns + column, columns, width, full_depth - k, to);
          } else {
            const int64_t pitch = full_depth * sizeof(In), bytes = (full_depth - k) * sizeof(In);
            const uint8_t *source_bytes = (const uint8_t *)(source + column * full_depth + k);
            transpose_words(source_bytes, pitch, width, bytes, to);
            transpose_words(source_bytes + TILE_ROWS * pitch, pitch, width - TILE_ROWS, bytes, to + TILE);
          }
        };
        if (transposed)  // reads along the rows of the weight
          for (int64_t step = 0; step < steps; step++)
            for (int64_t panel = begin; panel < end; panel++) pack_step(panel, step);
        for (int64_t panel = begin; panel < end; panel++) {
          uint8_t *const panel_data = packed + (panel - begin) * panel_bytes;
          if (!transposed)
            for (int64_t step = 0; step < steps; step++) pack_step(panel, step);
          std::memset(panel_data + start_offset, 0, PANEL * sizeof(Sum));
          if constexpr (sizeof(In) == 1) {
            if (!on_tiles) sign_corrections(steps, panel_data, (int32_t *)(panel_data + start_offset));
            const int64_t column = panel * PANEL, width = std::min(PANEL, columns - column);
            for (int64_t i = 0; from == 0 && i < outliers.count; i++)
              for (int64_t c = 0; c < PANEL; c++) {
                const int64_t k = outliers.columns[i], at = transposed ? k * columns + column + c : (column + c) * depth + k;
                outlier_weights[((panel - begin) * outliers.count + i) * PANEL + c] = c < width ? weight[at] : 0;
              }
          }
        }
        for (int64_t row_tile = 0; row_tile < num_row_tiles; row_tile++)
          for (int64_t panel = begin; panel < end; panel++) {
            const int64_t column = panel * PANEL, width = std::min(PANEL, columns - column), first = row_tile * PANEL;
            const int64_t count = std::min(PANEL, rows - first), start = first * columns + column;
            const bool last = from + steps == all_steps;
            Sum *const sums = chunks > 1 ? sums_buffer + (row_tile * group + panel - begin) * PANEL * PANEL : sums_buffer;
            if (last)
              for (int64_t row = 0; row < count; row++) {
                __builtin_prefetch(out + start + row * columns, 1);
                if (addend != out) __builtin_prefetch(addend + start + row * columns);
              }
            const uint8_t *const own = tiles + row_tile * row_tile_bytes + from * 2 * TILE,
                *const panel_data = packed + (panel - begin) * panel_bytes;
#ifdef HAS_TILES
            if (on_tiles)
              multiply_tiles<In>(steps, own, panel_data, from == 0, sums);
            else
#endif
              multiply(count, steps, own, panel_data, (const Sum *)(panel_data + start_offset), from == 0, sums,
                       own + row_tile_bytes + (panel - begin) * steps * 2 * TILE / (end - begin));
            if (last)
              finish<In>(count, width, columns, sums, a_scale + first, c_scale + column, outliers.count,
                         outliers.values + first * outliers.count, outlier_weights + (panel - begin) * outliers.count * PANEL,
                         addend ? addend + start : nullptr, out + start);
          }
      }
    }
  }
}
#else
extern "C" void has_products(int64_t *answer, int) { *answer = 0; }
template <class In, class Sum, class T>
static void product(int64_t, int64_t, int64_t, const In *, const float *, const In *, bool, const float *, Outliers<T>, int64_t, const In *, const In *, const T *, T *, uint8_t *, int) {}
#endif

extern "C" void product_bf16(int64_t rows, int64_t depth, int64_t columns, const bf16 *a, const bf16 *weight, int64_t transposed,
                             int64_t rank, const bf16 *low, const bf16 *factor, const bf16 *addend, bf16 *out, uint8_t *tiles, int threads) {
  product<bf16, float>(rows, depth, columns, a, nullptr, weight, transposed, nullptr, Outliers<bf16>{}, rank, low, factor, addend, out, tiles, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t depth, int64_t columns, const int8_t *a, const float *a_scale, const int8_t *weight, int64_t transposed, const float *c_scale, int64_t outliers, const int64_t *outlier_columns, const T *x, const float *x_scale, float *values, const T *addend, T *out, uint8_t *tiles, int threads)
template <class T>
static void int8_product PARAMETERS(T) {
  product<int8_t, int32_t, T>(rows, depth, columns, a, a_scale, weight, transposed, c_scale, {outliers, outlier_columns, x, x_scale, values},
                              0, nullptr, nullptr, addend, out, tiles, threads);
}
extern "C" void int8_product_f32 PARAMETERS(float) { int8_product<float>(rows, depth, columns, a, a_scale, weight, transposed, c_scale, outliers, outlier_columns, x, x_scale, values, addend, out, tiles, threads); }
extern "C" void int8_product_bf16 PARAMETERS(bf16) { int8_product<bf16>(rows, depth, columns, a, a_scale, weight, transposed, c_scale, outliers, outlier_columns, x, x_scale, values, addend, out, tiles, threads); }
#undef PARAMETERS
