// The documents of a pass: their tokens, and gather and scatter of one head's rows.
//
// Documents with a common prefix share its tokens. Gradients of tokens of one document are stored directly. Gradients of
// keys and values that several documents use go to separate slots, which are summed at the end.
#pragma once
#include "common.h"

#include <vector>

// The first tokens of a document can belong to earlier documents. The tokens from `first_own` on are new and contiguous.
// The tokens from `first_unshared` on belong to this document only. Gradients of the keys and values before
// `first_unshared` go to the slots from `slot` on.
struct Document {
  const int64_t *rows;  // the rows of its tokens in the pass
  int64_t length, first_own, first_unshared, slot;
};

// The first `known` tokens of the pass are keys and values only: no document owns them.
static std::vector<Document> documents_of(int64_t count, const int64_t *starts, const int64_t *index, int64_t known = 0) {
  std::vector<Document> documents(count);
  std::vector<int64_t> num_users(known);  // number of documents per token
  for (int64_t d = 0; d < count; d++) {
    Document &document = documents[d] = {index + starts[d], starts[d + 1] - starts[d], 0, 0, 0};
    const int64_t num_known = num_users.size();
    while (document.first_own < document.length && document.rows[document.first_own] < num_known)
      num_users[document.rows[document.first_own++]]++;
    num_users.resize(num_known + document.length - document.first_own, 1);
  }
  int64_t slot = 0;
  for (Document &document : documents) {
    while (document.first_unshared < document.length && num_users[document.rows[document.first_unshared]] > 1) document.first_unshared++;
    document.slot = slot;
    slot += document.first_unshared;
  }
  return documents;
}

// The most expensive document first, so that no thread starts a long one at the end.
static std::vector<Document> costliest_first(std::vector<Document> documents) {
  const auto cost = [](const Document &document) { return document.length * document.length - document.first_own * document.first_own; };
  std::stable_sort(documents.begin(), documents.end(), [&](const Document &a, const Document &b) { return cost(a) > cost(b); });
  return documents;
}

// Gathers one head of the tokens `rows` of `from` (row stride `stride`) into contiguous rows, times `scale`. Where
// `cosine` is given, applies the rotary embedding of each token.
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

// Stores the numbers of the token `row` times `scale`. Where `cosine` is given, applies the inverse rotation: the inverse
// of `load`, except for rounding.
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

// Scatters `count` rows of `from` to the tokens `rows` of `to`.
template <class T>
static void store(int64_t count, int64_t size, const float *from, const int64_t *rows, const float *cosine,
                  const float *sine, float scale, T *to, int64_t stride) {
  for (int64_t t = 0; t < count; t++) store_row(size, from + t * size, rows[t], cosine, sine, scale, to + rows[t] * stride);
}

// Stores the gradients of a document's keys or values: unshared tokens directly, shared tokens in the document's slots.
template <class T>
static void store_gradients(const Document &document, int64_t size, const float *from, const float *cosine, const float *sine,
                         T *to, float *slots, int64_t stride) {
  const int64_t first_unshared = document.first_unshared;
  for (int64_t t = 0; t < first_unshared; t++)
    store_row(size, from + t * size, document.rows[t], cosine, sine, 1.0f, slots + (document.slot + t) * stride);
  store(document.length - first_unshared, size, from + first_unshared * size, document.rows + first_unshared, cosine, sine, 1.0f,
        to, stride);
}

// Adds the gradients in the slots, in the order of the documents, to the slot of the first document with the token.
template <class T>
static void add_slots(const std::vector<Document> &documents, int64_t stride, int64_t size, int64_t kv_head, float *slots, T *to) {
  std::vector<float *> first_slot;
  for (const Document &document : documents)
    for (int64_t t = 0; t < document.first_unshared; t++) {
      float *const slot = slots + (document.slot + t) * stride + kv_head * size;
      if (t >= document.first_own) {
        if (int64_t(first_slot.size()) <= document.rows[t]) first_slot.resize(document.rows[t] + 1);
        first_slot[document.rows[t]] = slot;
        continue;
      }
      float *const first = first_slot[document.rows[t]];
#pragma omp simd
      for (int64_t i = 0; i < size; i++) first[i] += slot[i];
    }
  for (const Document &document : documents)
    for (int64_t t = document.first_own; t < document.first_unshared; t++)
      store_row(size, first_slot[document.rows[t]], document.rows[t], nullptr, nullptr, 1.0f,
                to + document.rows[t] * stride + kv_head * size);
}
