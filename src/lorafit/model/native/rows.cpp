// Kernels that work on one row at a time: norms, the swiglu product, 8-bit quantisation, cross-entropy.
//
// All tensors are contiguous, (rows, width) in row-major order. Arithmetic is float32 for every type of tensor. One thread
// computes a row, so results do not depend on the number of threads.
#include "common.h"

// y = x * rstd * (w + offset), rstd = 1 / sqrt(mean(x^2) + eps)
template <class T>
static void rms_norm(int64_t rows, int64_t width, float eps, float offset, const T *x, const T *w, T *y, float *rstd,
                     int threads) {
  for_each(threads, rows, [&](int64_t row) {
    const T *in = x + row * width;
    T *out = y + row * width;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += get(in[i]) * get(in[i]);
    float scale = 1.0f / std::sqrt(sum / float(width) + eps);
    rstd[row] = scale;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(get(in[i]) * scale * (get(w[i]) + offset), out[i]);
  });
}
#define PARAMETERS(T) (int64_t rows, int64_t width, float eps, float offset, const T *x, const T *w, T *y, float *rstd, int threads)
FOR_BOTH_TYPES_TOGETHER(rms_norm, (rows, width, eps, offset, x, w, y, rstd, threads))
#undef PARAMETERS

// dx = rstd * (dy w - x rstd^2 mean(dy w x)), with w + offset in place of w
template <class T>
static void rms_norm_backward(int64_t rows, int64_t width, float offset, const T *dy, const T *x, const T *w,
                              const float *rstd, T *dx, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *in = x + row * width, *grad_output = dy + row * width;
    T *out = dx + row * width;
    float dot = 0, scale = rstd[row];
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; i++) dot += get(grad_output[i]) * (get(w[i]) + offset) * get(in[i]);
    float projection = dot * scale * scale / float(width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      put(scale * (get(grad_output[i]) * (get(w[i]) + offset) - get(in[i]) * projection), out[i]);
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, float offset, const T *dy, const T *x, const T *w, const float *rstd, T *dx, int threads)
FOR_BOTH_TYPES(rms_norm_backward, (rows, width, offset, dy, x, w, rstd, dx, threads))
#undef PARAMETERS

// An activation is x * sigmoid(argument(x)); slope is the derivative of its argument.
struct Silu {
  static float argument(float x) { return x; }
  static float slope(float) { return 1.0f; }
};

// The form with tanh, because (1 + tanh(u)) / 2 = sigmoid(2 u).
struct Gelu {
  static constexpr float FACTOR = 1.5957691216057308f, CUBE = 0.044715f;
  static float argument(float x) { return FACTOR * (x + CUBE * x * x * x); }
  static float slope(float x) { return FACTOR * (1.0f + 3.0f * CUBE * x * x); }
};

// out = activation(gate) * up
template <class Activation, class T>
static void gated(int64_t rows, int64_t width, const T *gate, const T *up, T *out, int threads) {
  for_each(threads, rows, [&](int64_t row) {
    const T *g = gate + row * width, *u = up + row * width;
    T *o = out + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(get(g[i]) * sigmoid(Activation::argument(get(g[i]))) * get(u[i]), o[i]);
  });
}
template <class T>
static void swiglu(int64_t rows, int64_t width, const T *gate, const T *up, T *out, int threads) {
  gated<Silu>(rows, width, gate, up, out, threads);
}
template <class T>
static void geglu(int64_t rows, int64_t width, const T *gate, const T *up, T *out, int threads) {
  gated<Gelu>(rows, width, gate, up, out, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, const T *gate, const T *up, T *out, int threads)
FOR_BOTH_TYPES_TOGETHER(swiglu, (rows, width, gate, up, out, threads))
FOR_BOTH_TYPES_TOGETHER(geglu, (rows, width, gate, up, out, threads))
#undef PARAMETERS

// out = x + factor * y
template <class T>
static void add_scaled(int64_t rows, int64_t width, float factor, const T *x, const T *y, T *out, int threads) {
  for_each(threads, rows, [&](int64_t row) {
#pragma omp simd
    for (int64_t i = row * width; i < (row + 1) * width; i++) put(get(x[i]) + factor * get(y[i]), out[i]);
  });
}
#define PARAMETERS(T) (int64_t rows, int64_t width, float factor, const T *x, const T *y, T *out, int threads)
FOR_BOTH_TYPES_TOGETHER(add_scaled, (rows, width, factor, x, y, out, threads))
#undef PARAMETERS

// The gradients of gate and up from the gradient of the product; dgate can be the memory of dout.
template <class Activation, class T>
static void gated_backward(int64_t rows, int64_t width, const T *dout, const T *gate, const T *up, T *dgate, T *dup,
                           int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *d = dout + row * width, *g = gate + row * width, *u = up + row * width;
    T *dg = dgate + row * width, *du = dup + row * width;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
      float grad_output = get(d[i]), x = get(g[i]), s = sigmoid(Activation::argument(x));
      put(grad_output * x * s, du[i]);
      put(grad_output * get(u[i]) * s * (1.0f + x * Activation::slope(x) * (1.0f - s)), dg[i]);
    }
  }
}
template <class T>
static void swiglu_backward(int64_t rows, int64_t width, const T *dout, const T *gate, const T *up, T *dgate, T *dup,
                            int threads) {
  gated_backward<Silu>(rows, width, dout, gate, up, dgate, dup, threads);
}
template <class T>
static void geglu_backward(int64_t rows, int64_t width, const T *dout, const T *gate, const T *up, T *dgate, T *dup,
                           int threads) {
  gated_backward<Gelu>(rows, width, dout, gate, up, dgate, dup, threads);
}
#define PARAMETERS(T) (int64_t rows, int64_t width, const T *dout, const T *gate, const T *up, T *dgate, T *dup, int threads)
FOR_BOTH_TYPES(swiglu_backward, (rows, width, dout, gate, up, dgate, dup, threads))
FOR_BOTH_TYPES(geglu_backward, (rows, width, dout, gate, up, dgate, dup, threads))
#undef PARAMETERS

// Largest |x * factor| of every column, from each `every`-th row. `highest` (threads, width) is a workspace.
template <class T>
static void column_peaks(int64_t rows, int64_t width, int64_t every, const T *x, const float *factor, float *highest, float *peaks,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; part++) {
    float *high = highest + part * width;
    std::fill(high, high + width, 0.0f);
    for (int64_t row = rows * part / threads; row < rows * (part + 1) / threads; row++) {
      const T *in = x + row * every * width;
#pragma omp simd
      for (int64_t i = 0; i < width; i++) {
        const float size = std::fabs(get(in[i]));
        high[i] = size > high[i] ? size : high[i];
      }
    }
  }
  for (int64_t i = 0; i < width; i++) {
    float high = 0;
    for (int part = 0; part < threads; part++) high = std::max(high, highest[part * width + i]);
    peaks[i] = factor ? high * factor[i] : high;
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t every, const T *x, const float *factor, float *highest, float *peaks, int threads)
FOR_BOTH_TYPES(column_peaks, (rows, width, every, x, factor, highest, peaks, threads))
#undef PARAMETERS

// The columns whose peak (as above) is more than `limit` times the lower median of all: their number, then each of them, in
// `found` (1 + width). `rest` is `factor` with zeros at these columns. `highest` (threads + 2, width) is a workspace.
template <class T>
static void outlier_columns(int64_t rows, int64_t width, int64_t every, float limit, const T *x, const float *factor,
                            float *highest, float *rest, int64_t *found, int threads) {
  float *const peaks = highest + threads * width, *const sorted = peaks + width;
  column_peaks(rows, width, every, x, factor, highest, peaks, threads);
  for (int64_t i = 0; i < width; i++) sorted[i] = peaks[i] = peaks[i] == peaks[i] ? peaks[i] : INFINITY;
  float *const median = sorted + (width - 1) / 2;
  std::nth_element(sorted, median, sorted + width);
  const float highest_usual = limit * *median;
  found[0] = 0;
  for (int64_t i = 0; i < width; i++) {
    const bool outlier = peaks[i] > highest_usual;
    rest[i] = outlier ? 0.0f : factor[i];
    if (outlier) found[++found[0]] = i;
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, int64_t every, float limit, const T *x, const float *factor, float *highest, float *rest, int64_t *found, int threads)
FOR_BOTH_TYPES(outlier_columns, (rows, width, every, limit, x, factor, highest, rest, found, threads))
#undef PARAMETERS

// q = round(x * factor / scale) with scale = max |x * factor| / 127 of the row; factor has one number per column.
template <class T>
static void quantize_rows(int64_t rows, int64_t width, const T *x, const float *factor, int8_t *q, float *scale,
                          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const T *in = x + row * width;
    int8_t *out = q + row * width;
    float high = 0;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < width; i++) high = std::max(high, std::fabs(get(in[i]) * factor[i]));
    scale[row] = high / 127.0f;
    float inverse = high > 0 ? 127.0f / high : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; i++)
      out[i] = int8_t(int32_t(__builtin_rintf(get(in[i]) * factor[i] * inverse)));
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, const T *x, const float *factor, int8_t *q, float *scale, int threads)
FOR_BOTH_TYPES(quantize_rows, (rows, width, x, factor, q, scale, threads))
#undef PARAMETERS

// y = addend + sums * row_scale * column_scale; addend can be null, or y itself.
template <class T>
static void dequantize(int64_t rows, int64_t width, const int32_t *sums, const float *row_scale,
                       const float *column_scale, const T *addend, T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const int32_t *in = sums + row * width;
    const T *base = addend + row * width;
    T *out = y + row * width;
    float scale = row_scale[row];
    if (addend) {
#pragma omp simd
      for (int64_t i = 0; i < width; i++) put(float(in[i]) * scale * column_scale[i] + get(base[i]), out[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; i++) put(float(in[i]) * scale * column_scale[i], out[i]);
    }
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, const int32_t *sums, const float *row_scale, const float *column_scale, const T *addend, T *y, int threads)
FOR_BOTH_TYPES(dequantize, (rows, width, sums, row_scale, column_scale, addend, y, threads))
#undef PARAMETERS

// y = x / (1 - p) where a hash of seed, row and column is at least p * 2^32, else 0. The hash is Wellons' lowbias32.
template <class T>
static void dropout(int64_t rows, int64_t width, int64_t seed, const int64_t *keys, int64_t threshold, float scale, const T *x,
                    T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    uint64_t key = uint64_t(seed) + uint64_t((keys ? keys[row] : row) + 1) * 0x9e3779b97f4a7c15;
    key = (key ^ (key >> 30)) * 0xbf58476d1ce4e5b9;
    key = (key ^ (key >> 27)) * 0x94d049bb133111eb;
    const uint32_t start = uint32_t(key >> 32), bound = uint32_t(threshold);
    const T *in = x + row * width;
    T *out = y + row * width;
#pragma omp simd
    for (uint32_t i = 0; i < uint32_t(width); i++) {
      uint32_t h = start + i * 0x9e3779b9u;
      h = (h ^ (h >> 16)) * 0x7feb352du;
      h = (h ^ (h >> 15)) * 0x846ca68bu;
      h ^= h >> 16;
      put(h >= bound ? get(in[i]) * scale : 0.0f, out[i]);
    }
  }
}
#define PARAMETERS(T) \
  (int64_t rows, int64_t width, int64_t seed, const int64_t *keys, int64_t threshold, float scale, const T *x, T *y, int threads)
FOR_BOTH_TYPES(dropout, (rows, width, seed, keys, threshold, scale, x, y, threads))
#undef PARAMETERS

// losses = log sum exp(logits) - logits[target]; with grad_output the logits become softmax(logits) - [i = target].
template <class T>
static void cross_entropy(int64_t rows, int64_t width, T *logits, const int64_t *targets, float *losses, int64_t grad_output,
                          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    T *in = logits + row * width;
    float high = -INFINITY, sum = 0;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < width; i++) high = std::max(high, get(in[i]));
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += fast_exp(get(in[i]) - high);
    float total = high + std::log(sum);
    losses[row] = total - get(in[targets[row]]);
    if (!grad_output) continue;
    float target_gradient = fast_exp(get(in[targets[row]]) - total) - 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) put(fast_exp(get(in[i]) - total), in[i]);
    put(target_gradient, in[targets[row]]);
  }
}
#define PARAMETERS(T) (int64_t rows, int64_t width, T *logits, const int64_t *targets, float *losses, int64_t grad_output, int threads)
FOR_BOTH_TYPES(cross_entropy, (rows, width, logits, targets, losses, grad_output, threads))
#undef PARAMETERS
