// The processor's dot products of short numbers, in vectors (AVX-512 BF16 and VNNI) and on matrix tiles (Intel AMX):
// permission to use tiles, their shape, and the layout of rows for both. Empty if the processor has none.
#pragma once
#include "common.h"

#include <new>
#include <optional>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_DOTS 1
#include <immintrin.h>

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64, TILE = TILE_ROWS * TILE_BYTES;

// Words (32 bits) w[i][c] = from[c][i] of 16 rows; those from `count` on are zero, as are bytes after `bytes`
inline void turn_words(const uint8_t *from, int64_t pitch, int64_t count, int64_t bytes, uint8_t *to) {
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

// The permutation that interleaves 16-bit numbers of two vectors, from `first` on in each
inline __m512i side_by_side(int64_t first) {
  alignas(64) uint16_t order[32];
  for (int64_t i = 0; i < 32; i++) order[i] = uint16_t(first + i / 2 + i % 2 * 32);
  return _mm512_load_si512(order);
}

inline __m512i dot(__m512i sums, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sums, a, b); }  // a is unsigned
inline __m512 dot(__m512 sums, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }

constexpr int64_t DOT_ROWS = 8;  // multiplied at a time: their sums fill half of the registers

// Adds to `left` and `right` the products of DOT_ROWS rows of a and twice 16 columns of b, `steps` of TILE_BYTES deep. b has
// the layout of the tiles, its second columns `next` bytes after the first; strides are bytes. `ahead` is prefetched into
// the second cache, two lines per step.
template <class Vector>
__attribute__((always_inline)) inline void add_dots(int64_t steps, const uint8_t *a, int64_t a_row, int64_t a_step, const uint8_t *b,
                                                    int64_t b_step, int64_t next, const uint8_t *ahead, Vector *left, Vector *right) {
  for (int64_t step = 0; step < steps; step++, a += a_step, b += b_step, ahead += 2 * TILE_BYTES) {
    __builtin_prefetch(ahead, 0, 2), __builtin_prefetch(ahead + TILE_BYTES, 0, 2);
    for (int64_t word = 0; word < TILE_BYTES; word += 4) {
      const __m512i first = _mm512_load_si512(b + word * TILE_ROWS), second = _mm512_load_si512(b + word * TILE_ROWS + next);
#pragma GCC unroll 16
      for (int64_t row = 0; row < DOT_ROWS; row++) {
        int32_t one;
        std::memcpy(&one, a + row * a_row + word, 4);
        const __m512i both = _mm512_set1_epi32(one);
        left[row] = dot(left[row], both, first), right[row] = dot(right[row], both, second);
      }
    }
  }
}
#endif

#if defined(HAS_DOTS) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

// Linux permits the tiles to a process on request (arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
inline bool may_use_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// During its lifetime this thread's eight tiles, if permitted, have 16 rows of 64 bytes
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
    asm volatile("" : : "r"(&shape) : "memory");  // GCC 12 assumes that the next line reads the first bytes only
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

struct Aligned {  // memory on a cache line; not initialised
  uint8_t *at;
  explicit Aligned(size_t bytes) : at((uint8_t *)::operator new(bytes, std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(at, std::align_val_t(64)); }
  Aligned(const Aligned &) = delete;
  Aligned &operator=(const Aligned &) = delete;
};

struct Space {  // of a thread, reused by later calls: new pages cost more than a row
  std::optional<Aligned> held;
  size_t size = 0;
  template <class Item>
  Item *of(int64_t count) {
    if (size < count * sizeof(Item)) held.emplace(size = count * sizeof(Item));
    return size ? (Item *)held->at : nullptr;
  }
};
