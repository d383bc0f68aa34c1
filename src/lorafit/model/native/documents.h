// The documents of a pass: which tokens are theirs, one head's numbers of them in rows of their own, and back.
//
// Documents with a common prefix share tokens. Results of one document's own tokens are stored directly; the gradients of
// keys and values that several documents share are stored separately and then added up.
#pragma once
#include "common.h"

#include <vector>

// The first tokens of a document may belong to earlier documents; from `own` on they are its own and contiguous, and from
// `alone` on no other document has them. `slot` is the place of the gradients of the keys and values before `alone`.
struct Document {
  const int64_t *rows;  // of its tokens in the pass
  int64_t length, own, alone, slot;
};

static std::vector<Document> documents_of(int64_t count, const int64_t *starts, const int64_t *index) {
  std::vector<Document> documents(count);
  std::vector<int64_t> users;  // documents of each token
  for (int64_t d = 0; d < count; d++) {
    Document &one = documents[d] = {index + starts[d], starts[d + 1] - starts[d], 0, 0, 0};
    const int64_t known = users.size();
    while (one.own < one.length && one.rows[one.own] < known) users[one.rows[one.own++]]++;
    users.resize(known + one.length - one.own, 1);
  }
  int64_t slot = 0;
  for (Document &one : documents) {
    while (one.alone < one.length && users[one.rows[one.alone]] > 1) one.alone++;
    one.slot = slot;
    slot += one.alone;
  }
  return documents;
}

// The most expensive first, so that no thread computes a long one at the end
static std::vector<Document> costliest_first(std::vector<Document> documents) {
  const auto cost = [](const Document &one) { return one.length * one.length - one.own * one.own; };
  std::stable_sort(documents.begin(), documents.end(), [&](const Document &a, const Document &b) { return cost(a) > cost(b); });
  return documents;
}

// One head of the tokens `rows` of `from` (row stride `stride`) into rows of their own; rotated by the token's angle
template <class T, class Row>
static void load(int64_t count, int64_t size, const int64_t *rows, const T *from, int64_t stride, const float *cosine,
                 const float *sine, float scale, Row *to) {
  int64_t half = size / 2;
  for (int64_t t = 0; t < count; t++) {
    const T *in = from + rows[t] * stride;
    Row *out = to + t * size;
    if (!cosine) {
#pragma omp simd
      for (int64_t i = 0; i < size; i++) put(get(in[i]) * scale, out[i]);
      continue;
    }
    const float *c = cosine + rows[t] * half, *s = sine + rows[t] * half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
      float first = get(in[i]) * scale, second = get(in[half + i]) * scale;
      put(first * c[i] - second * s[i], out[i]);
      put(second * c[i] + first * s[i], out[half + i]);
    }
  }
}

// The numbers of the token `row` times `scale`, rotated back by its angle if there is one: the inverse of `load`
// without the rounding
template <class T>
static void store_row(int64_t size, const float *in, int64_t row, const float *cosine, const float *sine, float scale, T *out) {
  int64_t half = size / 2;
  if (!cosine) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++) put(in[i] * scale, out[i]);
    return;
  }
  const float *c = cosine + row * half, *s = sine + row * half;
#pragma omp simd
  for (int64_t i = 0; i < half; i++) {
    float first = in[i] * scale, second = in[half + i] * scale;
    put(first * c[i] + second * s[i], out[i]);
    put(second * c[i] - first * s[i], out[half + i]);
  }
}

// `count` rows of `from` to the tokens `rows` of `to`
template <class T>
static void store(int64_t count, int64_t size, const float *from, const int64_t *rows, const float *cosine,
                  const float *sine, float scale, T *to, int64_t stride) {
  for (int64_t t = 0; t < count; t++) store_row(size, from + t * size, rows[t], cosine, sine, scale, to + rows[t] * stride);
}

// Stores the gradients of a document's keys or values: those of its own tokens directly, the rest in its slots
template <class T>
static void store_gradients(const Document &document, int64_t size, const float *from, const float *cosine, const float *sine,
                         T *to, float *slots, int64_t stride) {
  const int64_t alone = document.alone;
  for (int64_t t = 0; t < alone; t++)
    store_row(size, from + t * size, document.rows[t], cosine, sine, 1.0f, slots + (document.slot + t) * stride);
  store(document.length - alone, size, from + alone * size, document.rows + alone, cosine, sine, 1.0f, to, stride);
}

// Adds up the gradients in the slots, in the order of the documents, for the first document that has the token
template <class T>
static void add_slots(const std::vector<Document> &documents, int64_t stride, int64_t size, int64_t group, float *slots, T *to) {
  std::vector<float *> first_of;
  for (const Document &one : documents)
    for (int64_t t = 0; t < one.alone; t++) {
      float *const slot = slots + (one.slot + t) * stride + group * size;
      if (t >= one.own) {
        if (int64_t(first_of.size()) <= one.rows[t]) first_of.resize(one.rows[t] + 1);
        first_of[one.rows[t]] = slot;
        continue;
      }
      float *const first = first_of[one.rows[t]];
#pragma omp simd
      for (int64_t i = 0; i < size; i++) first[i] += slot[i];
    }
  for (const Document &one : documents)
    for (int64_t t = one.own; t < one.alone; t++)
      store_row(size, first_of[one.rows[t]], one.rows[t], nullptr, nullptr, 1.0f, to + one.rows[t] * stride + group * size);
}
