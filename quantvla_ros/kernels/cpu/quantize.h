// SPDX-License-Identifier: Apache-2.0
// One token on its way in: to float, RMS norm, diagonal, block Hadamard, integers, sums per group.
// The rounding rules are those of reference.py and agree with it bit for bit.
#pragma once
#include "map.h"

namespace {

constexpr float TINY = 7.888609052210118e-31f;  // 2^-100: below this a token counts as zero

inline float top_of(const qv_layer& layer) {
  return layer.act_bits == 3 ? 3.0f : layer.act_bits == 4 ? 7.0f : 127.0f;
}

struct Token {
  const qv_call* call;
  const qv_layer* layer;
  int64_t depth;    // K padded to DEPTH_STEP
  float* floats;    // (depth) scratch of this thread, or the row kept for 16-bit parts
  int8_t* q;        // (depth) out
  int32_t* sums;    // (groups) out: minus the sum of the integers
  float* scale;     // out
  float* amax;      // out: largest magnitude
};

inline const float* as_floats(const qv_call& call, int64_t row, int64_t k, float* scratch) {
  if (call.window) {
    take_window(call, row, k, scratch);
    return scratch;
  }
  const int64_t at = row * call.ldx;
  if (call.dtype == QV_F32) return static_cast<const float*>(call.x) + at;
  const uint16_t* x = static_cast<const uint16_t*>(call.x) + at;
  if (call.dtype == QV_BF16)
    for (int64_t i = 0; i < k; ++i) scratch[i] = from_bf16(x[i]);
  else
    for (int64_t i = 0; i < k; ++i) scratch[i] = from_f16(x[i]);
  return scratch;
}

inline void rms_norm(const qv_call& call, int64_t k, const float* x, float* y) {
  Floats total[4] = {};  // the additions of one would wait for each other
  int64_t i = 0;
  for (; i + 4 * VL <= k; i += 4 * VL)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[v] += load(x + i + v * VL) * load(x + i + v * VL);
  for (; i + VL <= k; i += VL) total[0] += load(x + i) * load(x + i);
  float mean = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < k; ++i) mean += x[i] * x[i];
  const float inverse = 1.0f / __builtin_sqrtf(mean / static_cast<float>(k) + call.norm_eps);
  const float* multiply = call.norm_multiply;
  const float* add = call.norm_add;
  for (i = 0; i + VL <= k; i += VL) {
    Floats v = load(x + i) * splat(inverse);
    if (multiply) v *= load(multiply + i);
    if (add) v += load(add + i);
    store(y + i, v);
  }
  for (; i < k; ++i) {
    y[i] = x[i] * inverse;
    if (multiply) y[i] *= multiply[i];
    if (add) y[i] += add[i];
  }
}

template <int STRIDE>
inline Floats butterfly(Floats v) {
  Floats sign;
  for (int i = 0; i < VL; ++i) sign[i] = i & STRIDE ? -1.0f : 1.0f;
  return swapped<STRIDE>(v) + sign * v;  // a + b where the bit is clear, a - b where it is set
}

// Blocks of 64, butterflies from stride 1 upward, then the exact factor 1/8.
inline void hadamard64(const float* x, float* y, int64_t k) {
  constexpr int REGISTERS = 64 / VL;
  for (int64_t at = 0; at < k; at += 64) {
    Floats v[REGISTERS];
    for (int r = 0; r < REGISTERS; ++r) {
      v[r] = butterfly<2>(butterfly<1>(load(x + at + r * VL)));
#if defined(__AVX512F__) || defined(__AVX2__)
      v[r] = butterfly<4>(v[r]);
#endif
#if defined(__AVX512F__)
      v[r] = butterfly<8>(v[r]);
#endif
    }
    for (int stride = 1; stride < REGISTERS; stride *= 2)
      for (int r = 0; r < REGISTERS; ++r)
        if (!(r & stride)) {
          const Floats a = v[r], b = v[r + stride];
          v[r] = a + b;
          v[r + stride] = a - b;
        }
    for (int r = 0; r < REGISTERS; ++r) store(y + at + r * VL, v[r] * splat(0.125f));
  }
}

// Bits of max |x|. As integers, NaN > infinity > every finite value, so that none is lost.
inline int32_t magnitude_bits(const float* x, int64_t k) {
  Ints top[2] = {};
  const Ints mask = Ints{} + 0x7fffffff;
  int64_t i = 0;
  const auto look = [&](int64_t at, Ints& seen) {
    const Ints bits = bits_of(load(x + at)) & mask;
    seen = bits > seen ? bits : seen;
  };
  for (; i + 2 * VL <= k; i += 2 * VL) {
    look(i, top[0]);
    look(i + VL, top[1]);
  }
  if (i + VL <= k) {
    look(i, top[0]);
    i += VL;
  }
  int32_t best = largest_bits(top[0] > top[1] ? top[0] : top[1]);
  for (; i < k; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    best = bits > best ? bits : best;
  }
  return best;
}

// Round k floats to integers in [-top, top] and return their sum.
template <class Isa>
inline int32_t round_group(const float* x, int8_t* q, int64_t k, float inverse, float top) {
  int64_t i = 0;
  int32_t total = Isa::round_chunk(x, q, k, inverse, top, &i);
  for (; i < k; ++i) {
    float v = x[i] * inverse;
    v = v > top ? top : v < -top ? -top : v;
    const float shifted = v + 12582912.0f;  // 1.5 * 2^23: the adder rounds half to even
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    bits -= 0x4b400000;
    q[i] = static_cast<int8_t>(bits);
    total += bits;
  }
  return total;
}

template <class Isa>
void quantize_token(const Token& token, int64_t row) {
  const qv_call& call = *token.call;
  const qv_layer& layer = *token.layer;
  const int64_t k = layer.k;
  const float* x = as_floats(call, row, k, token.floats);
  if (call.norm_eps > 0.0f) {
    rms_norm(call, k, x, token.floats);
    x = token.floats;
  }
  if (layer.diagonal) {
    for (int64_t i = 0; i < k; ++i) token.floats[i] = x[i] * layer.diagonal[i];
    x = token.floats;
  }
  if (layer.hadamard) {
    hadamard64(x, token.floats, k);
    x = token.floats;
  }
  if (layer.wide && x != token.floats) std::memcpy(token.floats, x, static_cast<size_t>(k) * 4);

  // Our own floats may have zeros behind them, so that nothing is left over from the vectors.
  const bool padded = x == token.floats && layer.groups == 1;
  // The line of a thread ends there: behind it begins the next thread's.
  const int64_t count = padded ? round_up(k, DEPTH_STEP) : k;
  if (padded) std::memset(token.floats + k, 0, static_cast<size_t>(count - k) * 4);
  const int32_t bits = magnitude_bits(x, count);
  float amax;
  std::memcpy(&amax, &bits, 4);
  *token.amax = amax;
  const float top = top_of(layer);
  float inverse, scale;
  if (bits >= 0x7f800000) {
    std::memset(token.q, 0, static_cast<size_t>(token.depth));
    std::memset(token.sums, 0, static_cast<size_t>(layer.groups) * 4);
    *token.scale = __builtin_nanf("");
    return;
  }
  if (call.act_scale != 0.0f) {
    scale = call.act_scale;
    inverse = 1.0f / scale;
  } else {
    scale = amax < TINY ? 1.0f : amax / top;
    inverse = amax < TINY ? 0.0f : top / amax;
  }
  *token.scale = scale;
  const int64_t length = count / layer.groups;
  for (int64_t g = 0; g < layer.groups; ++g)
    token.sums[g] = -round_group<Isa>(x + g * length, token.q + g * length, length, inverse, top);
  if (token.depth > count)
    std::memset(token.q + count, 0, static_cast<size_t>(token.depth - count));
}

}  // namespace
