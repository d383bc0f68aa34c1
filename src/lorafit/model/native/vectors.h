// Vectors of float32 with the width of the processor's registers, and the sums of their lanes.
#pragma once
#include "common.h"

#include <new>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

// Numbers that begin at a cache line: where rows are as long as vectors, no vector crosses a line.
template <class T>
struct LineAllocator {
  typedef T value_type;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U> &) {}
  T *allocate(size_t count) { return (T *)::operator new(count * sizeof(T), std::align_val_t(64)); }
  void deallocate(T *numbers, size_t) { ::operator delete(numbers, std::align_val_t(64)); }
  bool operator==(const LineAllocator &) const { return true; }
  bool operator!=(const LineAllocator &) const { return false; }
};
typedef std::vector<float, LineAllocator<float>> Floats;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// to[i] = the sum of the lanes of sums[i], by halves, so the bits do not depend on i. Not inlined: inlined code would use
// registers that the loop before it needs.
__attribute__((noinline)) inline void lane_sums(const vec *sums, int64_t count, float *to) {
#ifdef __AVX512F__
  for (int64_t first = 0; first < count; first += 16) {  // 16 vectors at a time; each step adds halves of two vectors in one register
    const auto vector_at = [&](int64_t i) { return first + i < count ? (__m512)sums[first + i] : _mm512_setzero_ps(); };
    const auto add_halves = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
    const auto add_pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); };
    __m512 fours[4];
    for (int64_t i = 0; i < 4; i++) {
      const __m512 low = add_halves(vector_at(i), vector_at(4 + i)), high = add_halves(vector_at(8 + i), vector_at(12 + i));
      fours[i] = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    }
    const __m512 low_pairs = add_pairs(fours[0], fours[1]), high_pairs = add_pairs(fours[2], fours[3]);
    const __m512 result = _mm512_add_ps(_mm512_shuffle_ps(low_pairs, high_pairs, 0x88),
                                        _mm512_shuffle_ps(low_pairs, high_pairs, 0xdd));
    _mm512_mask_storeu_ps(to + first, count - first < 16 ? (1u << (count - first)) - 1 : 0xffff, result);
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
