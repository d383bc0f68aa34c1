// Number types, conversions and a vectorisable exponential that the kernels share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "team.h"

struct bf16 {
  uint16_t bits;
};

inline float get(float value) { return value; }
inline float get(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void put(float value, float &to) { to = value; }
inline void put(float value, bf16 &to) {  // round to nearest, ties to even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

// e^x within 2e-7 relative, 0 below -87: range reduction by ln 2 and a polynomial of degree 6 (minimax on +-ln2/2).
inline float fast_exp(float x) {
  float clamped = std::min(std::max(x, -87.0f), 88.0f);
  float n = __builtin_rintf(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < -87.0f ? 0.0f : p * power;
}

// The largest of `count` numbers. Not inlined: inside another loop the compiler does not vectorise it.
__attribute__((noinline)) inline float maximum(const float *row, int64_t count) {
  float high = -INFINITY;
#pragma omp simd reduction(max : high)
  for (int64_t i = 0; i < count; i++) high = row[i] > high ? row[i] : high;
  return high;
}

// tanh x within 4e-7 relative: a series near zero, where the quotient of exponentials is inexact.
inline float fast_tanh(float x) {
  const float size = std::fabs(x), square = x * x, power = fast_exp(-2.0f * size);
  float series = square * 62.0f / 2835.0f - 17.0f / 315.0f;
  series = series * square + 2.0f / 15.0f;
  series = series * square - 1.0f / 3.0f;
  series = size * (series * square + 1.0f);
  return std::copysign(size < 0.25f ? series : (1.0f - power) / (1.0f + power), x);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

// An argument as a 64-bit word: an integer, the bits of a float, or an address.
template <class P>
inline P argument(int64_t word) {
  if constexpr (std::is_pointer_v<P>) {
    return reinterpret_cast<P>(word);
  } else if constexpr (std::is_same_v<P, float>) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    return P(word);
  }
}
template <class... P, size_t... I>
inline void call_with(void (*kernel)(P...), const int64_t *words, std::index_sequence<I...>, int threads) {
  kernel(argument<P>(I + 1 < sizeof...(P) ? words[I] : threads)...);  // the number of threads is the last argument
}
template <class... P>
inline void call_with(void (*kernel)(P...), const int64_t *words, int threads) {
  call_with(kernel, words, std::index_sequence_for<P...>(), threads);
}

// Defines NAME_f32 and NAME_bf16, C functions that call the template NAME. PARAMETERS(T) is their parameter list.
// NAME_f32_words and NAME_bf16_words take the arguments as words: run_recorded in decode.cpp calls them on each thread of
// its team. Kernels that begin regions of their own run on the first of them.
#define FOR_BOTH_TYPES(NAME, ARGUMENTS) DEFINE_FOR_BOTH_TYPES(NAME, ARGUMENTS, !member || member->number == 0)

// The same for a kernel whose threads all come from `together`: all threads of the team compute it.
#define FOR_BOTH_TYPES_TOGETHER(NAME, ARGUMENTS) DEFINE_FOR_BOTH_TYPES(NAME, ARGUMENTS, true)

#define DEFINE_FOR_BOTH_TYPES(NAME, ARGUMENTS, RUNS)                            \
  extern "C" void NAME##_f32 PARAMETERS(float) { NAME<float> ARGUMENTS; }       \
  extern "C" void NAME##_bf16 PARAMETERS(bf16) { NAME<bf16> ARGUMENTS; }        \
  extern "C" void NAME##_f32_words(const int64_t *words, int threads) {         \
    if (RUNS) call_with(NAME##_f32, words, threads);                            \
  }                                                                             \
  extern "C" void NAME##_bf16_words(const int64_t *words, int threads) {        \
    if (RUNS) call_with(NAME##_bf16, words, threads);                           \
  }
