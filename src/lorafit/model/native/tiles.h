// The processor's matrix tiles (Intel AMX): leave to use them and their shape. Empty where there are none.
#pragma once
#include "common.h"

#include <new>

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64, TILE = TILE_ROWS * TILE_BYTES;

// Linux gives the tiles to a process that asks (arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
inline bool may_use_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

// While it lives this thread's eight tiles have 16 rows of 64 bytes
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = TILE_BYTES, shape.rows[tile] = TILE_ROWS;
    asm volatile("" : : "r"(&shape) : "memory");  // GCC 12 takes the first bytes alone for what the next line reads
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};
#else
inline bool may_use_tiles() { return false; }
#endif

struct Aligned {  // memory on a cache line; not initialised
  uint8_t *at;
  explicit Aligned(size_t bytes) : at((uint8_t *)::operator new(bytes, std::align_val_t(64))) {}
  ~Aligned() { ::operator delete(at, std::align_val_t(64)); }
  Aligned(const Aligned &) = delete;
  Aligned &operator=(const Aligned &) = delete;
};
