// SPDX-License-Identifier: Apache-2.0
// Grouped-query attention in float32 for the short sequences of an action policy: keys are rotated
// and transposed once, then each task is a few queries of one head against all keys.
#pragma once
#include "drive.h"

namespace {

constexpr int QUERIES = VL == 16 ? 8 : 4;  // whose sums stay in registers together
constexpr int64_t MAX_DIM = 1024;          // of a head
constexpr int GROUPS = 2;                  // of so many queries, of a task with many of them

// out (QUERIES, 2 VL) = a (QUERIES, depth) b (depth, 2 VL).
inline __attribute__((always_inline)) void small_tile(const float* a, int64_t lda, const float* b,
                                                      int64_t ldb, int64_t depth, float* out,
                                                      int64_t ldo) {
  Floats sum[QUERIES][2];
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) sum[i][0] = sum[i][1] = Floats{};
  for (int64_t d = 0; d < depth; ++d, b += ldb) {
    const Floats first = load(b), second = load(b + VL);
#pragma GCC unroll 8
    for (int i = 0; i < QUERIES; ++i) {
      const Floats factor = broadcast_from(a + i * lda + d);
      sum[i][0] += first * factor;
      sum[i][1] += second * factor;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
    store(out + i * ldo, sum[i][0]);
    store(out + i * ldo + VL, sum[i][1]);
  }
}

// out (queries, n) = a (queries, depth) b (depth, n): columns outside, so that those of b stay in
// the first-level cache for all groups of queries.
inline void small_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          int64_t n, float* out, int64_t ldo, int64_t queries) {
  for (int64_t j = 0; j < n; j += 2 * VL)
    for (int64_t i = 0; i < queries; i += QUERIES)
      small_tile(a + i * lda, lda, b + j, ldb, depth, out + i * ldo + j, ldo);
}

// Turn scores into weights, zero in the padding beyond n; return one over their sum.
inline float softmax(float* scores, int64_t n, int64_t padded) {
  Ints lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  Floats top = load(scores);
  int64_t whole = n / VL * VL;  // behind it one vector is part padding, the rest nothing else
  const Ints inside = lane < Ints{} + static_cast<int32_t>(n - whole);
  for (int64_t j = VL; j < whole; j += VL) top = larger(top, load(scores + j));
  if (whole < n) {
    const Floats low = splat(-3.4028234663852886e38f);
    const Floats last = inside ? load(scores + whole) : low;
    top = whole ? larger(top, last) : last;
  }
  const Floats highest = splat(largest(top));
  Floats total{};
  for (int64_t j = 0; j < whole; j += VL) {
    const Floats e = exponential(load(scores + j) - highest);
    store(scores + j, e);
    total += e;
  }
  if (whole < n) {
    const Floats e = inside ? exponential(load(scores + whole) - highest) : Floats{};
    store(scores + whole, e);
    total += e;
    whole += VL;
  }
  for (int64_t j = whole; j < padded; j += VL) store(scores + j, Floats{});
  return 1.0f / sum(total);
}

struct Attention {
  const qv_call& call;
  Workspace& work;
  int64_t padded;  // keys padded to two vectors

  int64_t half() const { return call.head_dim / 2; }
  // Values of a head: the cached rows have the stride of the caller and no padding, so they are
  // copied beside the transposed keys.
  int64_t cell() const { return padded * call.head_dim * 2; }
  float* keys(int64_t index) const {
    return (call.cells ? call.cells : work.keys) + index * cell();
  }
  float* values(int64_t index) const { return keys(index) + padded * call.head_dim; }

  // y = x * factor, rotated by its position where there is a table.
  void rotate(const float* x, int64_t position, float factor, float* y) const {
    const int64_t h = half();
    if (!call.cos) {
      for (int64_t d = 0; d < 2 * h; d += VL) store(y + d, load(x + d) * splat(factor));
      return;
    }
    const float* c = call.cos + position * h;
    const float* s = call.sin + position * h;
    for (int64_t d = 0; d < h; d += VL) {
      const Floats a = load(x + d), b = load(x + h + d), cosine = load(c + d), sine = load(s + d);
      store(y + d, (a * cosine - b * sine) * splat(factor));
      store(y + h + d, (b * cosine + a * sine) * splat(factor));
    }
  }

  // Keys become columns, VL of them at a time; the padding stays zero.
  void gather(int64_t t) const {
    const int64_t batch = t / call.kv_heads, head = t % call.kv_heads, dim = call.head_dim;
    float turned[VL * MAX_DIM];
    for (int64_t first = 0; first < padded; first += VL) {
      const int64_t count = call.keys - first < VL ? call.keys - first : VL;
      for (int64_t s = 0; s < count; ++s) {
        const int64_t row = batch * call.keys + first + s;
        rotate(call.k + row * call.ldk + head * dim, first + s, 1.0f, turned + s * dim);
        std::memcpy(values(t) + (first + s) * dim, call.v + row * call.ldv + head * dim,
                    static_cast<size_t>(dim) * 4);
      }
      for (int64_t s = count < 0 ? 0 : count; s < VL; ++s) {
        std::memset(turned + s * dim, 0, static_cast<size_t>(dim) * 4);
        std::memset(values(t) + (first + s) * dim, 0, static_cast<size_t>(dim) * 4);
      }
      for (int64_t d = 0; d < dim; d += VL) {
        Floats square[VL];
        for (int i = 0; i < VL; ++i) square[i] = load(turned + i * dim + d);
        transpose(square);
        for (int i = 0; i < VL; ++i) store(keys(t) + (d + i) * padded + first, square[i]);
      }
    }
  }

  // Queries of a task.
  int64_t height() const { return call.rows > GROUPS * QUERIES ? GROUPS * QUERIES : QUERIES; }
  int64_t blocks() const { return (call.rows + height() - 1) / height(); }
  int64_t tasks() const { return int64_t{call.batch} * call.heads * blocks(); }

  // Queries outside, heads inside: the rows that a thread has are those that it has in the layers.
  void attend(int64_t task, float* scratch) const {
    const int64_t dim = call.head_dim, head = task % call.heads;
    const int64_t block = task / call.heads % blocks(), batch = task / call.heads / blocks();
    const int64_t cell_index = batch * call.kv_heads + head * call.kv_heads / call.heads;
    const int64_t first = block * height();
    const int64_t count = call.rows - first < height() ? call.rows - first : height();
    const int64_t computed = round_up(count, QUERIES);
    float* queries = scratch;
    float* scores = queries + GROUPS * QUERIES * dim;
    float* out = scores + GROUPS * QUERIES * padded;
    for (int64_t i = 0; i < computed; ++i) {
      const int64_t at = first + (i < count ? i : 0);
      rotate(static_cast<const float*>(call.x) + (batch * call.rows + at) * call.ldx +
                 head * dim,
             at, call.scale, queries + i * dim);
    }
    small_product(queries, dim, keys(cell_index), padded, dim, padded, scores, padded, computed);
    float share[GROUPS * QUERIES];
    for (int64_t i = 0; i < computed; ++i)
      share[i] = softmax(scores + i * padded, call.keys, padded);
    small_product(scores, padded, values(cell_index), dim, call.keys, dim, out, dim, computed);
    for (int64_t i = 0; i < count; ++i) {
      float* y = static_cast<float*>(call.y) + (batch * call.rows + first + i) * call.ldy +
                 head * dim;
      for (int64_t d = 0; d < dim; d += VL) store(y + d, load(out + i * dim + d) * splat(share[i]));
    }
  }
};

inline Attention attention_of(const qv_call& call, Workspace& work) {
  return Attention{call, work, round_up(call.keys, 2 * VL)};
}

inline int64_t attention_scratch(const Attention& a) {
  return round_up(GROUPS * QUERIES * (2 * int64_t{a.call.head_dim} + a.padded), 64);
}

inline int32_t prepare_attention(const qv_call& call, Workspace& work, int threads) {
  const bool queries = call.kind == QV_GATHER || (call.rows >= 0 && call.heads >= call.kv_heads &&
                                                  call.heads % call.kv_heads == 0);
  const bool shaped = call.keys >= 1 && call.batch >= 1 && call.kv_heads >= 1 && queries &&
                      call.head_dim >= 2 * VL && call.head_dim % (2 * VL) == 0;
  if (!shaped || (call.kind == QV_GATHER && !call.cells)) return QV_SHAPE;
  const Attention a = attention_of(call, work);
  if (call.keys > (1 << 20) || call.rows > (1 << 20) || call.head_dim > MAX_DIM) return QV_SIZE;
  const int64_t cells = call.cells ? 0 : int64_t{call.batch} * call.kv_heads * a.cell();
  const bool ok = Workspace::grow(work.keys, work.keys_size, cells) &&
                  Workspace::grow(work.floats, work.floats_size, threads * attention_scratch(a));
  return ok ? QV_OK : QV_MEMORY;
}

}  // namespace
