// Vectors of float32 as wide as the processor's registers, and the sums of their lanes.
#pragma once
#include "common.h"
#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

inline int64_t padded(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// to[i] = the sum of the lanes of sums[i], by halves: the same bits in every caller. Inlined it would take registers
// from the loop before it.
__attribute__((noinline)) inline void totals(const vec *sums, int64_t count, float *to) {
#ifdef __AVX512F__
  for (int64_t first = 0; first < count; first += 16) {  // sixteen at once: what is left of several comes side by side
    const auto at = [&](int64_t i) { return first + i < count ? (__m512)sums[first + i] : _mm512_setzero_ps(); };
    const auto eights = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
    const auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); };
    __m512 fours[4];
    for (int64_t i = 0; i < 4; i++) {
      const __m512 low = eights(at(i), at(4 + i)), high = eights(at(8 + i), at(12 + i));
      fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    const __m512 left = pairs(fours[0], fours[1]), right = pairs(fours[2], fours[3]);
    const __m512 ones = _mm512_add_ps(_mm512_shuffle_ps(left, right, 0x88), _mm512_shuffle_ps(left, right, 0xdd));
    _mm512_mask_storeu_ps(to + first, count - first < 16 ? (1u << (count - first)) - 1 : 0xffff, ones);
  }
#else
  for (int64_t i = 0; i < count; i++) {
    float lanes[LANES];
    std::memcpy(lanes, sums + i, sizeof(lanes));
    for (int width = LANES / 2; width; width /= 2)
      for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
    to[i] = lanes[0];
  }
#endif
}
