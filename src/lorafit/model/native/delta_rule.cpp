// The gated delta rule of consecutive documents, forward and backward (see model/delta_rule.py).
//
// A thread computes a document and a head, in chunks of tokens from the document's first one on. Within a chunk the
// corrections D of the state solve a triangular system. The backward pass computes states and corrections again.
#include "common.h"
#include "vectors.h"

// The sums of a tile of ROWS by COLUMNS numbers stay in registers: 16 of 32 with AVX-512, else 8 of 16.
static const int64_t CHUNK = 64, ROWS = LANES / 2, COLUMNS = 2 * LANES;
static const float EPS = 1e-6f;

// c (rows, columns) += a b. a[i][k] is at a[i * a_row + k * a_column]; rows of b and c are contiguous. Rows are a multiple
// of ROWS and columns of COLUMNS.
static void multiply(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_column,
                     const float *b, int64_t b_row, float *c, int64_t c_row) {
  for (int64_t n = 0; n < columns; n += COLUMNS)
    for (int64_t i = 0; i < rows; i += ROWS) {
      vec sums[ROWS][2];
      float *to = c + i * c_row + n;
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS; r++) {
        sums[r][0] = *(const vec *)(to + r * c_row);
        sums[r][1] = *(const vec *)(to + r * c_row + LANES);
      }
      for (int64_t k = 0; k < depth; k++) {
        const vec left = *(const vec *)(b + k * b_row + n), right = *(const vec *)(b + k * b_row + n + LANES);
        const float *from = a + i * a_row + k * a_column;
#pragma GCC unroll 8
        for (int64_t r = 0; r < ROWS; r++) {
          sums[r][0] += from[r * a_row] * left;
          sums[r][1] += from[r * a_row] * right;
        }
      }
#pragma GCC unroll 8
      for (int64_t r = 0; r < ROWS; r++) {
        *(vec *)(to + r * c_row) = sums[r][0];
        *(vec *)(to + r * c_row + LANES) = sums[r][1];
      }
    }
}

static float dot(const float *a, const float *b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

// to (rows, width) = factor of each row * from.
static void scale_rows(int64_t rows, int64_t width, const float *factor, const float *from, float *to) {
  for (int64_t i = 0; i < rows; i++)
#pragma omp simd
    for (int64_t j = 0; j < width; j++) to[i * width + j] = factor[i] * from[i * width + j];
}

static void transpose(int64_t rows, int64_t columns, const float *from, float *to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) to[j * to_row + i] = from[i * columns + j];
}

struct Heads {
  int64_t keys, values, key_dim, value_dim, channels;
  int64_t K, V;  // key_dim and value_dim, padded with zeros to COLUMNS

  Heads(int64_t keys, int64_t values, int64_t key_dim, int64_t value_dim)
      : keys(keys), values(values), key_dim(key_dim), value_dim(value_dim), channels(2 * keys * key_dim + values * value_dim),
        K((key_dim + COLUMNS - 1) / COLUMNS * COLUMNS), V((value_dim + COLUMNS - 1) / COLUMNS * COLUMNS) {}
};

// The inputs of a chunk for one value head, and what follows from them without the state.
struct Chunk {
  const Heads &heads;
  Floats memory;
  float *q, *k, *v, *kt;                    // normed, (CHUNK, K) and (CHUNK, V); kt (K, CHUNK)
  float *said, *missing, *d;                // of the state: k S; v - decay * k S; the corrections. (CHUNK, V)
  float *decay, *similar, *system, *scores;  // (CHUNK, CHUNK): system is minus the triangular one
  float q_norm[CHUNK], k_norm[CHUNK], beta[CHUNK], start[CHUNK], rest[CHUNK];  // decay since the start, and up to the end
  float end;                                                                  // decay of the whole chunk
  int64_t count, rows;                                                        // tokens, and rows with padding

  explicit Chunk(const Heads &heads)
      : heads(heads), memory(CHUNK * (3 * heads.K + 4 * heads.V) + 4 * CHUNK * CHUNK) {
    float *at = memory.data();
    for (float **part : {&q, &k, &kt}) *part = at, at += CHUNK * heads.K;
    for (float **part : {&v, &said, &missing, &d}) *part = at, at += CHUNK * heads.V;
    for (float **part : {&decay, &similar, &system, &scores}) *part = at, at += CHUNK * CHUNK;
  }

  template <class T>
  void normed(const T *from, float scale, float *to, float *norm) {
    const int64_t K = heads.K;
    std::fill(to, to + CHUNK * K, 0.0f);
    for (int64_t t = 0; t < count; t++) {
      float *row = to + t * K;
      for (int64_t i = 0; i < heads.key_dim; i++) row[i] = get(from[t * heads.channels + i]);
      norm[t] = 1.0f / std::sqrt(dot(row, row, K) + EPS);
      for (int64_t i = 0; i < K; i++) row[i] *= norm[t] * scale;
    }
  }

  // Reads `tokens` tokens from `first` on.
  template <class T>
  void load(int64_t first, int64_t tokens, int64_t head, const T *qkv, const float *g, const T *steps) {
    const int64_t K = heads.K, V = heads.V, key = head / (heads.values / heads.keys);
    count = tokens, rows = (tokens + ROWS - 1) / ROWS * ROWS;
    const T *at = qkv + first * heads.channels;
    normed(at + key * heads.key_dim, 1.0f / std::sqrt(float(heads.key_dim)), q, q_norm);
    normed(at + (heads.keys + key) * heads.key_dim, 1.0f, k, k_norm);
    std::fill(v, v + CHUNK * V, 0.0f);
    float total[CHUNK], sum = 0;
    for (int64_t t = 0; t < CHUNK; t++) {
      const bool there = t < count;
      for (int64_t i = 0; there && i < heads.value_dim; i++)
        v[t * V + i] = get(at[t * heads.channels + 2 * heads.keys * heads.key_dim + head * heads.value_dim + i]);
      sum += there ? g[(first + t) * heads.values + head] : 0.0f;
      total[t] = sum;
      start[t] = fast_exp(sum);
      beta[t] = there ? get(steps[(first + t) * heads.values + head]) : 0.0f;
    }
    end = fast_exp(sum);
    for (int64_t t = 0; t < CHUNK; t++) rest[t] = fast_exp(sum - total[t]);
    transpose(CHUNK, K, k, kt, CHUNK);
    std::fill(similar, similar + CHUNK * CHUNK, 0.0f);
    std::fill(scores, scores + CHUNK * CHUNK, 0.0f);
    multiply(rows, CHUNK, K, k, K, 1, kt, CHUNK, similar, CHUNK);
    multiply(rows, CHUNK, K, q, K, 1, kt, CHUNK, scores, CHUNK);
    for (int64_t i = 0; i < CHUNK; i++)
#pragma omp simd
      for (int64_t j = 0; j < CHUNK; j++) {
        const int64_t at = i * CHUNK + j;
        decay[at] = j <= i ? fast_exp(total[i] - total[j]) : 0.0f;
        scores[at] *= decay[at];
        similar[at] *= j < i ? decay[at] : 0.0f;
        system[at] = -beta[i] * similar[at];
      }
  }

  // What the state says, and the corrections.
  void correct(const float *state) {
    const int64_t K = heads.K, V = heads.V;
    std::fill(said, said + CHUNK * V, 0.0f);
    multiply(rows, V, K, k, K, 1, state, V, said, V);
    for (int64_t t = 0; t < CHUNK; t++)
#pragma omp simd
      for (int64_t i = 0; i < V; i++) {
        missing[t * V + i] = v[t * V + i] - start[t] * said[t * V + i];
        d[t * V + i] = beta[t] * missing[t * V + i];
      }
    for (int64_t i = 0; i < rows; i += ROWS) {
      multiply(ROWS, V, i, system + i * CHUNK, CHUNK, 1, d, V, d + i * V, V);
      for (int64_t r = i + 1; r < i + ROWS; r++)
        for (int64_t j = i; j < r; j++) add(system[r * CHUNK + j], d + j * V, d + r * V);
    }
  }

  // Solves the transposed system for y, in place.
  void solve_transposed(float *y) const {
    const int64_t V = heads.V;
    for (int64_t i = rows - ROWS; i >= 0; i -= ROWS) {
      const int64_t next = i + ROWS;
      multiply(ROWS, V, rows - next, system + next * CHUNK + i, 1, CHUNK, y + next * V, V, y + i * V, V);
      for (int64_t r = next - 2; r >= i; r--)
        for (int64_t j = r + 1; j < next; j++) add(system[j * CHUNK + r], y + j * V, y + r * V);
    }
  }

  void add(float factor, const float *from, float *to) const {
#pragma omp simd
    for (int64_t i = 0; i < heads.V; i++) to[i] += factor * from[i];
  }

  // Brings the state forward; `scratch` (CHUNK, K).
  void advance(float *state, float *scratch) const {
    const int64_t K = heads.K, V = heads.V;
    scale_rows(CHUNK, K, rest, k, scratch);
    for (int64_t i = 0; i < K * V; i++) state[i] *= end;
    multiply(K, V, rows, scratch, 1, K, d, V, state, V);
  }
};

template <class T>
static void delta_rule(int64_t documents, const int64_t *starts, int64_t keys, int64_t values, int64_t key_dim, int64_t value_dim,
                       const T *qkv, const float *g, const T *beta, T *out, float *states, int threads) {
  const Heads heads(keys, values, key_dim, value_dim);
  const int64_t K = heads.K, V = heads.V;
#pragma omp parallel num_threads(threads)
  {
    Chunk chunk(heads);
    Floats state(K * V), result(CHUNK * V), scratch(CHUNK * K);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < documents * values; task++) {
      const int64_t document = task / values, head = task % values;
      std::fill(state.begin(), state.end(), 0.0f);
      for (int64_t first = starts[document]; first < starts[document + 1]; first += CHUNK) {
        chunk.load(first, std::min(CHUNK, starts[document + 1] - first), head, qkv, g, beta);
        chunk.correct(state.data());
        std::fill(result.begin(), result.end(), 0.0f);
        multiply(chunk.rows, V, K, chunk.q, K, 1, state.data(), V, result.data(), V);
        scale_rows(CHUNK, V, chunk.start, result.data(), result.data());
        multiply(chunk.rows, V, chunk.rows, chunk.scores, CHUNK, 1, chunk.d, V, result.data(), V);
        for (int64_t t = 0; t < chunk.count; t++)
          for (int64_t i = 0; i < value_dim; i++)
            put(result[t * V + i], out[((first + t) * values + head) * value_dim + i]);
        chunk.advance(state.data(), scratch.data());
      }
      for (int64_t i = 0; i < key_dim; i++)
        for (int64_t j = 0; j < value_dim; j++)
          states[((document * values + head) * key_dim + i) * value_dim + j] = state[i * V + j];
    }
  }
}

// The gradients of one chunk for one value head.
struct Slopes {
  const Heads &heads;
  Floats memory;
  float *out, *y, *turned, *weighed;        // (CHUNK, V): of the outputs; of the corrections; y and d times factors
  float *q, *k, *scratch;                   // (CHUNK, K)
  float *dt, *scores, *similar;             // (V, CHUNK), (CHUNK, CHUNK)
  float *state, *state_t, *of_state_t;      // the slope of the state (K, V); state and slope transposed (V, K)
  float beta[CHUNK], total[CHUNK], negative[CHUNK];

  explicit Slopes(const Heads &heads)
      : heads(heads), memory(5 * CHUNK * heads.V + 3 * CHUNK * heads.K + 2 * CHUNK * CHUNK + 3 * heads.K * heads.V) {
    float *at = memory.data();
    for (float **part : {&out, &y, &turned, &weighed, &dt}) *part = at, at += CHUNK * heads.V;
    for (float **part : {&q, &k, &scratch}) *part = at, at += CHUNK * heads.K;
    for (float **part : {&scores, &similar}) *part = at, at += CHUNK * CHUNK;
    for (float **part : {&state, &state_t, &of_state_t}) *part = at, at += heads.K * heads.V;
  }

  // `c` has its inputs and corrections; `before` is the state at its start, `state` becomes the slope of that.
  void compute(const Chunk &c, const float *before) {
    const int64_t K = heads.K, V = heads.V, rows = c.rows;
    float last = c.end * dot(before, state, K * V);
    for (float *part : {y, weighed}) std::fill(part, part + CHUNK * V, 0.0f);
    for (float *part : {q, k}) std::fill(part, part + CHUNK * K, 0.0f);
    for (float *part : {scores, similar}) std::fill(part, part + CHUNK * CHUNK, 0.0f);
    std::fill(total, total + CHUNK, 0.0f);
    // the corrections: by the outputs, and by the state at the end
    multiply(rows, V, K, c.k, K, 1, state, V, weighed, V);
    for (int64_t t = 0; t < rows; t++) {
      const float by_end = c.rest[t] * dot(weighed + t * V, c.d + t * V, V);
      last += by_end, total[t] -= by_end;
    }
    scale_rows(CHUNK, V, c.rest, weighed, y);
    multiply(rows, V, rows, c.scores, 1, CHUNK, out, V, y, V);
    c.solve_transposed(y);
    transpose(CHUNK, V, c.d, dt, CHUNK);
    multiply(rows, CHUNK, V, out, V, 1, dt, CHUNK, scores, CHUNK);
    multiply(rows, CHUNK, V, y, V, 1, dt, CHUNK, similar, CHUNK);
    for (int64_t i = 0; i < rows; i++) {
      beta[i] = dot(y + i * V, c.missing + i * V, V);
      for (int64_t j = 0; j <= i; j++) {
        const int64_t at = i * CHUNK + j;
        const float of_system = j < i ? -similar[at] : 0.0f;
        const float both = scores[at] * c.scores[at] - of_system * c.system[at];
        total[i] += both, total[j] -= both;
        beta[i] += of_system * c.similar[at];
        scores[at] *= c.decay[at];
        similar[at] = of_system * c.beta[i] * c.decay[at];
      }
      for (int64_t j = i + 1; j < CHUNK; j++) scores[i * CHUNK + j] = similar[i * CHUNK + j] = 0.0f;
    }
    // through the state at the start
    for (int64_t t = 0; t < CHUNK; t++) negative[t] = -c.beta[t] * c.start[t];
    scale_rows(CHUNK, V, negative, y, turned);
    scale_rows(CHUNK, V, c.rest, c.d, weighed);
    transpose(K, V, before, state_t, K);
    transpose(K, V, state, of_state_t, K);
    multiply(rows, K, V, out, V, 1, state_t, K, q, K);
    scale_rows(CHUNK, K, c.start, q, q);
    for (int64_t t = 0; t < rows; t++)
      total[t] += dot(c.q + t * K, q + t * K, K) + dot(turned + t * V, c.said + t * V, V);
    multiply(rows, K, V, turned, V, 1, state_t, K, k, K);
    multiply(rows, K, V, weighed, V, 1, of_state_t, K, k, K);
    // through the products of queries and keys
    multiply(rows, K, rows, scores, CHUNK, 1, c.k, K, q, K);
    multiply(rows, K, rows, scores, 1, CHUNK, c.q, K, k, K);
    multiply(rows, K, rows, similar, CHUNK, 1, c.k, K, k, K);
    multiply(rows, K, rows, similar, 1, CHUNK, c.k, K, k, K);
    scale_rows(CHUNK, K, c.start, c.q, scratch);
    for (int64_t i = 0; i < K * V; i++) state[i] *= c.end;
    multiply(K, V, rows, scratch, 1, K, out, V, state, V);
    multiply(K, V, rows, c.k, 1, K, turned, V, state, V);
    total[c.count - 1] += last;
  }
};

// The slope of a row through its norm: `normed` has the length `scale`.
template <class T>
static void through_norm(int64_t size, const float *slope, const float *normed, float norm, float scale, T *to) {
  const float along = dot(slope, normed, size) / (scale * scale);
  for (int64_t i = 0; i < size; i++) put(norm * scale * (slope[i] - normed[i] * along), to[i]);
}

template <class T>
static void delta_rule_backward(int64_t documents, const int64_t *starts, int64_t keys, int64_t values, int64_t key_dim,
                                int64_t value_dim, const T *qkv, const float *g, const T *beta, const T *d_out, T *d_qkv,
                                float *d_g, T *d_beta, int threads) {
  const Heads heads(keys, values, key_dim, value_dim);
  const int64_t K = heads.K, V = heads.V, shared = values / keys;
#pragma omp parallel num_threads(threads)
  {
    Chunk chunk(heads);
    Slopes slopes(heads);
    Floats states, d_q, d_k;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < documents * keys; task++) {
      const int64_t document = task / keys, key = task % keys, begin = starts[document];
      const int64_t length = starts[document + 1] - begin, chunks = (length + CHUNK - 1) / CHUNK;
      states.resize((chunks + 1) * K * V);
      d_q.assign(chunks * CHUNK * K, 0.0f), d_k.assign(chunks * CHUNK * K, 0.0f);
      for (int64_t head = key * shared; head < (key + 1) * shared; head++) {
        std::fill(states.data(), states.data() + K * V, 0.0f);
        for (int64_t number = 0; number < chunks; number++) {
          float *state = states.data() + number * K * V;
          chunk.load(begin + number * CHUNK, std::min(CHUNK, length - number * CHUNK), head, qkv, g, beta);
          chunk.correct(state);
          std::copy(state, state + K * V, state + K * V);
          chunk.advance(state + K * V, slopes.scratch);
        }
        std::fill(slopes.state, slopes.state + K * V, 0.0f);
        for (int64_t number = chunks - 1; number >= 0; number--) {
          const int64_t first = begin + number * CHUNK;
          chunk.load(first, std::min(CHUNK, length - number * CHUNK), head, qkv, g, beta);
          chunk.correct(states.data() + number * K * V);
          std::fill(slopes.out, slopes.out + CHUNK * V, 0.0f);
          for (int64_t t = 0; t < chunk.count; t++)
            for (int64_t i = 0; i < value_dim; i++)
              slopes.out[t * V + i] = get(d_out[((first + t) * values + head) * value_dim + i]);
          slopes.compute(chunk, states.data() + number * K * V);
          float sum = 0;
          for (int64_t t = chunk.count - 1; t >= 0; t--) {
            sum += slopes.total[t];
            d_g[(first + t) * values + head] = sum;
            put(slopes.beta[t], d_beta[(first + t) * values + head]);
            T *to = d_qkv + (first + t) * heads.channels + 2 * keys * key_dim + head * value_dim;
            for (int64_t i = 0; i < value_dim; i++) put(chunk.beta[t] * slopes.y[t * V + i], to[i]);
          }
          float *sum_q = d_q.data() + number * CHUNK * K, *sum_k = d_k.data() + number * CHUNK * K;
          for (int64_t i = 0; i < CHUNK * K; i++) sum_q[i] += slopes.q[i], sum_k[i] += slopes.k[i];
          if (head + 1 < (key + 1) * shared) continue;
          const float scale = 1.0f / std::sqrt(float(key_dim));
          for (int64_t t = 0; t < chunk.count; t++) {
            T *to = d_qkv + (first + t) * heads.channels + key * key_dim;
            through_norm(key_dim, sum_q + t * K, chunk.q + t * K, chunk.q_norm[t], scale, to);
            through_norm(key_dim, sum_k + t * K, chunk.k + t * K, chunk.k_norm[t], 1.0f, to + keys * key_dim);
          }
        }
      }
    }
  }
}

#define PARAMETERS(T)                                                                                                       \
  (int64_t documents, const int64_t *starts, int64_t keys, int64_t values, int64_t key_dim, int64_t value_dim, const T *qkv, \
   const float *g, const T *beta, T *out, float *states, int threads)
FOR_BOTH_TYPES(delta_rule, (documents, starts, keys, values, key_dim, value_dim, qkv, g, beta, out, states, threads))
#undef PARAMETERS
#define PARAMETERS(T)                                                                                                       \
  (int64_t documents, const int64_t *starts, int64_t keys, int64_t values, int64_t key_dim, int64_t value_dim, const T *qkv, \
   const float *g, const T *beta, const T *d_out, T *d_qkv, float *d_g, T *d_beta, int threads)
FOR_BOTH_TYPES(delta_rule_backward,
               (documents, starts, keys, values, key_dim, value_dim, qkv, g, beta, d_out, d_qkv, d_g, d_beta, threads))
