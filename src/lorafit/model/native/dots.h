// Dot-product instructions for 8-bit and 16-bit numbers: vectors (AVX-512 BF16 and VNNI) and matrix tiles (Intel AMX).
// Contains the permission to use tiles, their shape, and the packed layout of both. Empty on other processors.
#pragma once
#include "common.h"

#include <new>
#include <optional>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_DOTS 1
#include <immintrin.h>

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64, TILE = TILE_ROWS * TILE_BYTES;

// Transposes 32-bit words: w[i][c] = from[c][i] for 16 rows. Rows from `count` on and bytes from `bytes` on are zero.
inline void transpose_words(const uint8_t *from, int64_t pitch, int64_t count, int64_t bytes, uint8_t *to) {
  const __mmask64 mask = bytes < 64 ? (1ull << bytes) - 1 : ~0ull;
  __m512i a[16], b[16];
  for (int64_t i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi8(i < count ? mask : 0, from + i * pitch);
  for (int64_t i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int64_t i = 0; i < 16; i += 4)
    for (int64_t j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int64_t i = 0; i < 4; i++) {  // a[4 q + i]: words i, i + 4, i + 8, i + 12 of rows 4 q ..
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    _mm512_store_si512(to + i * 64, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_store_si512(to + (i + 8) * 64, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_store_si512(to + (i + 4) * 64, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_store_si512(to + (i + 12) * 64, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

// The permutation that interleaves the 16-bit numbers of two vectors, from index `first` of each.
inline __m512i interleave_order(int64_t first) {
  alignas(64) uint16_t order[32];
  for (int64_t i = 0; i < 32; i++) order[i] = uint16_t(first + i / 2 + i % 2 * 32);
  return _mm512_load_si512(order);
}

inline __m512i dot(__m512i sums, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sums, a, b); }  // a is unsigned
inline __m512 dot(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

constexpr int64_t DOT_ROWS = 8;  // rows per call of add_dots: their accumulators fill half of the registers

// Adds to `left` and `right` the products of DOT_ROWS rows of a with 2 x 16 columns of b; the depth is `steps` times
// TILE_BYTES. b is packed as for tiles, and its second 16 columns are `next` bytes further on. Strides are bytes. Two cache
// lines per step are prefetched into the L2 cache, from `prefetch_from` on.
template <class Vector>
__attribute__((always_inline)) inline void add_dots(int64_t steps, const uint8_t *a, int64_t a_row, int64_t a_step, const uint8_t *b,
                                                    int64_t b_step, int64_t second_offset, const uint8_t *prefetch_from,
                                                        Vector *left, Vector *right) {
  for (int64_t step = 0; step < steps; step++, a += a_step, b += b_step, prefetch_from += 2 * TILE_BYTES) {
    __builtin_prefetch(prefetch_from, 0, 2), __builtin_prefetch(prefetch_from + TILE_BYTES, 0, 2);
    for (int64_t word = 0; word < TILE_BYTES; word += 4) {
      const __m512i first = _mm512_load_si512(b + word * TILE_ROWS),
          second = _mm512_load_si512(b + word * TILE_ROWS + second_offset);
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        int32_t word_of_a;
        std::memcpy(&word_of_a, a + row * a_row + word, 4);
        const __m512i broadcast = _mm512_set1_epi32(word_of_a);
        left[row] = dot(left[row], broadcast, first), right[row] = dot(right[row], broadcast, second);
      }
    }
  }
}
#endif

#if defined(HAS_DOTS) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

// Linux grants tiles on request (arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
inline bool may_use_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// During the lifetime of this object, the thread's eight tiles have 16 rows of 64 bytes, if `used`.
struct Tiles {
  const bool used;
  explicit Tiles(bool used) : used(used) {
    if (!used) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = TILE_BYTES, shape.rows[tile] = TILE_ROWS;
    asm volatile("" : : "r"(&shape) : "memory");  // GCC 12 assumes that the next line reads only the first bytes
    _tile_loadconfig(&shape);
  }
  ~Tiles() {
    if (used) _tile_release();
  }
};
#else
inline bool may_use_tiles() { return false; }
struct Tiles {
  explicit Tiles(bool) {}
};
#endif

struct Aligned {  // memory aligned to a cache line; not initialised
  uint8_t *data;
  explicit Aligned(size_t bytes) : data((uint8_t *)::operator new(bytes, std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned &) = delete;
  Aligned &operator=(const Aligned &) = delete;
};

struct Space {  // memory of a thread, kept between calls: page faults cost more than the product of a row
  std::optional<Aligned> storage;
  size_t size = 0;
  template <class Item>
  Item *of(int64_t count) {
    if (size < count * sizeof(Item)) storage.emplace(size = count * sizeof(Item));
    return size ? (Item *)storage->data : nullptr;
  }
};
