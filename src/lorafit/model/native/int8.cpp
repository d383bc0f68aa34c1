// Products of 8-bit rows with an 8-bit weight in either direction, scaled as they are stored, on matrix tiles.
//
// out[r, c] = addend[r, c] + a_scale[r] * c_scale[c] * sum_k a[r, k] * w(k, c), sums in int32, so exact. a is (rows,
// depth); w(k, c) is weight[c, k] of a (columns, depth) weight (forward), or with `turned` weight[k, c] of a (depth,
// columns) one (input gradient). The weight is laid out for the tiles anew at each call: a pass over it against
// hundreds of passes of arithmetic, and one copy serves both directions. depth is a multiple of 64. addend may be
// null, or out itself.
#include "tiles.h"

#include <vector>

extern "C" void has_tiles(int64_t *answer, int) { *answer = may_use_tiles(); }

#ifdef HAS_TILES
constexpr int64_t PANEL = 2 * TILE_ROWS;       // columns, and rows of a strip, that are multiplied at a time
constexpr int64_t BLOCK_BYTES = 3 << 19;       // of rows that a thread works on: they stay in its cache
constexpr int64_t MOST_ROWS = 512;

// 64 deep of 16 columns: four neighbours in depth side by side, as the tile product wants them
static void lay_out(const int8_t *weight, int64_t depth, int64_t columns, bool turned, int64_t column, int64_t k, int8_t *to) {
  const int64_t count = std::max<int64_t>(0, std::min(TILE_ROWS, columns - column));
  if (!turned) {
    uint32_t *words = (uint32_t *)to;
    for (int64_t c = 0; c < TILE_ROWS; c++)
      for (int64_t i = 0; i < TILE_ROWS; i++) {
        uint32_t word = 0;
        if (c < count) std::memcpy(&word, weight + (column + c) * depth + k + 4 * i, 4);
        words[i * TILE_ROWS + c] = word;
      }
    return;
  }
  for (int64_t i = 0; i < TILE_ROWS; i++) {
    __m128i row[4];
    for (int64_t j = 0; j < 4; j++) {
      const int8_t *from = weight + (k + 4 * i + j) * columns + column;
      if (count == TILE_ROWS) {
        row[j] = _mm_loadu_si128((const __m128i *)from);
      } else {
        alignas(16) int8_t part[16] = {};
        std::memcpy(part, from, count);
        row[j] = _mm_load_si128((const __m128i *)part);
      }
    }
    const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), high = _mm_unpackhi_epi8(row[0], row[1]);
    const __m128i low2 = _mm_unpacklo_epi8(row[2], row[3]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
    __m128i *line = (__m128i *)(to + i * TILE_BYTES);
    line[0] = _mm_unpacklo_epi16(low, low2);
    line[1] = _mm_unpackhi_epi16(low, low2);
    line[2] = _mm_unpacklo_epi16(high, high2);
    line[3] = _mm_unpackhi_epi16(high, high2);
  }
}

// sums (32, 32) of a strip of rows and a panel of columns, both laid out
static void multiply(int64_t steps, const uint8_t *strip, const uint8_t *panel, int32_t *sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++, strip += 2 * TILE, panel += 2 * TILE) {
    _tile_loadd(4, strip, TILE_BYTES);
    _tile_loadd(6, panel, TILE_BYTES);
    _tile_loadd(5, strip + TILE, TILE_BYTES);
    _tile_loadd(7, panel + TILE, TILE_BYTES);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, PANEL * 4);
  _tile_stored(1, sums + TILE_ROWS, PANEL * 4);
  _tile_stored(2, sums + TILE_ROWS * PANEL, PANEL * 4);
  _tile_stored(3, sums + TILE_ROWS * PANEL + TILE_ROWS, PANEL * 4);
}

template <class T>
static void int8_product(int64_t rows, int64_t depth, int64_t columns, const int8_t *a, const float *a_scale,
                         const int8_t *weight, int64_t turned, const float *c_scale, const T *addend, T *out, int threads) {
  const int64_t steps = depth / TILE_BYTES, panels = (columns + PANEL - 1) / PANEL, panel_bytes = depth * PANEL;
  const int64_t share = ((rows + threads - 1) / threads + PANEL - 1) / PANEL * PANEL;
  const int64_t block = std::max(PANEL, std::min({share, MOST_ROWS, BLOCK_BYTES / depth / PANEL * PANEL}));
  Aligned packed(panels * panel_bytes);
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    Aligned strips(block * depth);
    alignas(64) int32_t sums[PANEL * PANEL];
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
      for (int64_t step = 0; step < steps; step++)
        for (int64_t half = 0; half < 2; half++)
          lay_out(weight, depth, columns, turned, panel * PANEL + half * TILE_ROWS, step * TILE_BYTES,
                  (int8_t *)packed.at + panel * panel_bytes + (2 * step + half) * TILE);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < rows; first += block) {
      const int64_t count = std::min(block, rows - first), filled = (count + PANEL - 1) / PANEL * PANEL;
      for (int64_t row = 0; row < filled; row++)
        for (int64_t step = 0; step < steps; step++) {
          uint8_t *to = strips.at + row / PANEL * panel_bytes + (2 * step + row % PANEL / TILE_ROWS) * TILE + row % TILE_ROWS * TILE_BYTES;
          if (row < count)
            std::memcpy(to, a + (first + row) * depth + step * TILE_BYTES, TILE_BYTES);
          else
            std::memset(to, 0, TILE_BYTES);
        }
      for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t strip = 0; strip < filled; strip += PANEL) {
          multiply(steps, strips.at + strip / PANEL * panel_bytes, packed.at + panel * panel_bytes, sums);
          const int64_t width = std::min(PANEL, columns - panel * PANEL);
          const float *scale = c_scale + panel * PANEL;
          for (int64_t row = 0; row < std::min(PANEL, count - strip); row++) {
            const int64_t at = (first + strip + row) * columns + panel * PANEL;
            const int32_t *in = sums + row * PANEL;
            const float factor = a_scale[first + strip + row];
            if (addend) {
#pragma omp simd
              for (int64_t i = 0; i < width; i++) put(float(in[i]) * factor * scale[i] + get(addend[at + i]), out[at + i]);
            } else {
#pragma omp simd
              for (int64_t i = 0; i < width; i++) put(float(in[i]) * factor * scale[i], out[at + i]);
            }
          }
        }
    }
  }
}
#else
template <class T>
static void int8_product(int64_t, int64_t, int64_t, const int8_t *, const float *, const int8_t *, int64_t, const float *,
                         const T *, T *, int) {}
#endif
#define PARAMETERS(T) (int64_t rows, int64_t depth, int64_t columns, const int8_t *a, const float *a_scale, const int8_t *weight, int64_t turned, const float *c_scale, const T *addend, T *out, int threads)
FOR_BOTH_TYPES(int8_product, (rows, depth, columns, a, a_scale, weight, turned, c_scale, addend, out, threads))
#undef PARAMETERS
