// The causal depthwise convolution of consecutive documents (see model/convolution.py).
#include "common.h"

// A block of channels whose sums stay in registers and the first cache.
static const int64_t BLOCK = 256;

// out[t] = sum over j of taps[width - 1 - j] * x[t - j] within a document; `positions` count from its first token.
// The transpose, if `backward`: out[t] = sum over j of taps[width - 1 - j] * x[t + j] for the tokens that reach t.
template <class T>
static void convolve(int64_t tokens, int64_t channels, int64_t width, int64_t backward, const int64_t *positions, const T *x,
                     const float *taps, T *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; t++) {
    float sum[BLOCK];
    for (int64_t first = 0; first < channels; first += BLOCK) {
      const int64_t count = std::min(BLOCK, channels - first);
      for (int64_t j = 0; j < width; j++) {
        const int64_t other = backward ? t + j : t - j;
        if (backward ? other >= tokens || positions[other] < j : positions[t] < j) break;
        const T *in = x + other * channels + first;
        const float *tap = taps + (width - 1 - j) * channels + first;
        if (j == 0) {
#pragma omp simd
          for (int64_t i = 0; i < count; i++) sum[i] = tap[i] * get(in[i]);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < count; i++) sum[i] += tap[i] * get(in[i]);
        }
      }
      T *to = out + t * channels + first;
#pragma omp simd
      for (int64_t i = 0; i < count; i++) put(sum[i], to[i]);
    }
  }
}

#define PARAMETERS(T)                                                                                                   \
  (int64_t tokens, int64_t channels, int64_t width, int64_t backward, const int64_t *positions, const T *x, const float *taps, \
   T *out, int threads)
FOR_BOTH_TYPES(convolve, (tokens, channels, width, backward, positions, x, taps, out, threads))
