// SPDX-License-Identifier: Apache-2.0
// Grouped-query attention in float32 for the short sequences of an action policy: keys are rotated
// and transposed once, then each task is a few queries of one head against all keys.
#pragma once
#include "drive.h"

namespace {

constexpr int QUERIES = 4;  // queries of one task

// out (QUERIES, n) = a (QUERIES, depth) b (depth, n): 4 x 2 vectors of sums stay in registers.
inline void small_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          int64_t n, float* out, int64_t ldo) {
  for (int64_t j = 0; j < n; j += 2 * VL) {
    Floats s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};
    const float* column = b + j;
    for (int64_t d = 0; d < depth; ++d, column += ldb) {
      const Floats b0 = load(column), b1 = load(column + VL);
      const float a0 = a[d], a1 = a[lda + d], a2 = a[2 * lda + d], a3 = a[3 * lda + d];
      s00 += b0 * a0, s01 += b1 * a0;
      s10 += b0 * a1, s11 += b1 * a1;
      s20 += b0 * a2, s21 += b1 * a2;
      s30 += b0 * a3, s31 += b1 * a3;
    }
    store(out + j, s00), store(out + j + VL, s01);
    store(out + ldo + j, s10), store(out + ldo + j + VL, s11);
    store(out + 2 * ldo + j, s20), store(out + 2 * ldo + j + VL, s21);
    store(out + 3 * ldo + j, s30), store(out + 3 * ldo + j + VL, s31);
  }
}

// Turn scores into weights that sum to one; the padding beyond n gets weight zero.
inline void softmax(float* scores, int64_t n, int64_t padded) {
  for (int64_t j = n; j < padded; ++j) scores[j] = -__builtin_inff();
  Floats top = load(scores);
  for (int64_t j = VL; j < padded; j += VL) top = larger(top, load(scores + j));
  const Floats highest = splat(largest(top));
  Floats total{};
  for (int64_t j = 0; j < padded; j += VL) {
    const Floats e = exponential(load(scores + j) - highest);
    store(scores + j, e);
    total += e;
  }
  for (int64_t j = n; j < padded; ++j) {  // exponential clamps: take back what padding added
    total[0] -= scores[j];
    scores[j] = 0.0f;
  }
  const Floats inverse = splat(1.0f / sum(total));
  for (int64_t j = 0; j < padded; j += VL) store(scores + j, load(scores + j) * inverse);
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

  void rotate(const float* x, int64_t position, float factor, float* y, int64_t step) const {
    const int64_t h = half();
    if (!call.cos) {
      for (int64_t d = 0; d < 2 * h; ++d) y[d * step] = x[d] * factor;
      return;
    }
    const float* c = call.cos + position * h;
    const float* s = call.sin + position * h;
    for (int64_t d = 0; d < h; ++d) {
      y[d * step] = (x[d] * c[d] - x[h + d] * s[d]) * factor;
      y[(h + d) * step] = (x[h + d] * c[d] + x[d] * s[d]) * factor;
    }
  }

  void gather(int64_t t) const {
    const int64_t batch = t / call.kv_heads, head = t % call.kv_heads;
    std::memset(keys(t), 0, static_cast<size_t>(cell()) * 4);
    for (int64_t s = 0; s < call.keys; ++s) {
      const int64_t row = batch * call.keys + s;
      rotate(call.k + row * call.ldk + head * call.head_dim, s, 1.0f, keys(t) + s, padded);
      std::memcpy(values(t) + s * call.head_dim, call.v + row * call.ldv + head * call.head_dim,
                  static_cast<size_t>(call.head_dim) * 4);
    }
  }

  int64_t blocks() const { return (call.rows + QUERIES - 1) / QUERIES; }
  int64_t tasks() const { return int64_t{call.batch} * call.heads * blocks(); }

  void attend(int64_t task, float* scratch) const {
    const int64_t dim = call.head_dim;
    float* queries = scratch;
    float* scores = queries + QUERIES * dim;
    float* out = scores + QUERIES * padded;
    const int64_t block = task % blocks(), head = task / blocks() % call.heads;
    const int64_t batch = task / blocks() / call.heads;
    const int64_t cell_index = batch * call.kv_heads + head * call.kv_heads / call.heads;
    const int64_t first = block * QUERIES;
    const int64_t count = call.rows - first < QUERIES ? call.rows - first : QUERIES;
    for (int64_t i = 0; i < QUERIES; ++i) {
      const int64_t at = first + (i < count ? i : 0);
      rotate(static_cast<const float*>(call.x) + (batch * call.rows + at) * call.ldx + head * dim,
             at, call.scale, queries + i * dim, 1);
    }
    small_product(queries, dim, keys(cell_index), padded, dim, padded, scores, padded);
    for (int64_t i = 0; i < QUERIES; ++i) softmax(scores + i * padded, call.keys, padded);
    small_product(scores, padded, values(cell_index), dim, call.keys, dim, out, dim);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(static_cast<float*>(call.y) + (batch * call.rows + first + i) * call.ldy +
                      head * dim,
                  out + i * dim, static_cast<size_t>(dim) * 4);
  }
};

inline Attention attention_of(const qv_call& call, Workspace& work) {
  return Attention{call, work, round_up(call.keys, 2 * VL)};
}

inline int64_t attention_scratch(const Attention& a) {
  return round_up(QUERIES * (2 * int64_t{a.call.head_dim} + a.padded), 64);
}

inline int32_t prepare_attention(const qv_call& call, Workspace& work, int threads) {
  const bool queries = call.kind == QV_GATHER || (call.rows >= 0 && call.heads >= call.kv_heads &&
                                                  call.heads % call.kv_heads == 0);
  const bool shaped = call.keys >= 1 && call.batch >= 1 && call.kv_heads >= 1 && queries &&
                      call.head_dim >= 2 * VL && call.head_dim % (2 * VL) == 0;
  if (!shaped || (call.kind == QV_GATHER && !call.cells)) return QV_SHAPE;
  const Attention a = attention_of(call, work);
  if (call.keys > (1 << 20) || call.rows > (1 << 20) || call.head_dim > 1024) return QV_SIZE;
  const int64_t cells = call.cells ? 0 : int64_t{call.batch} * call.kv_heads * a.cell();
  const bool ok = Workspace::grow(work.keys, work.keys_size, cells) &&
                  Workspace::grow(work.floats, work.floats_size, threads * attention_scratch(a));
  return ok ? QV_OK : QV_MEMORY;
}

}  // namespace
