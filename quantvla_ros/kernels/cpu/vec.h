// SPDX-License-Identifier: Apache-2.0
// Float vectors as wide as the machine's, written once for all instruction sets with the
// compiler's vector types. Everything is in an unnamed namespace: two libraries compiled with
// different flags must never share a function.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * VL)));
typedef int32_t Ints __attribute__((vector_size(4 * VL)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats splat(float value) { return value - Floats{}; }
typedef uint16_t Halves __attribute__((vector_size(2 * VL)));
inline Floats load_bf16(const uint16_t* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Floats>(__builtin_convertvector(half, Ints) << 16);
}
inline Ints bits_of(Floats v) { return reinterpret_cast<Ints>(v); }
inline Floats floats_of(Ints v) { return reinterpret_cast<Floats>(v); }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Lane i of the result is lane i ^ STRIDE of v.
template <int STRIDE>
inline Floats swapped(Floats v) {
#if defined(__clang__)
  Floats other;
  for (int i = 0; i < VL; ++i) other[i] = v[i ^ STRIDE];
  return other;
#else
  Ints mask;
  for (int i = 0; i < VL; ++i) mask[i] = i ^ STRIDE;
  return __builtin_shuffle(v, mask);
#endif
}

// Of all lanes, by halves: a chain of lane after lane would wait for each addition.
inline float sum(Floats v) {
#if defined(__AVX512F__)
  v += swapped<8>(v);
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  v += swapped<4>(v);
#endif
  v += swapped<2>(v);
  v += swapped<1>(v);
  return v[0];
}
inline float largest(Floats v) {
#if defined(__AVX512F__)
  v = larger(v, swapped<8>(v));
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  v = larger(v, swapped<4>(v));
#endif
  v = larger(v, swapped<2>(v));
  v = larger(v, swapped<1>(v));
  return v[0];
}

// Of non-negative floats by their bits, where NaN > infinity > every finite value.
inline int32_t largest_bits(Ints v) {
  Floats best = floats_of(v);
  const auto fold = [&](Floats other) {
    const Ints a = bits_of(best), b = bits_of(other);
    best = floats_of(a > b ? a : b);
  };
#if defined(__AVX512F__)
  fold(swapped<8>(best));
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  fold(swapped<4>(best));
#endif
  fold(swapped<2>(best));
  fold(swapped<1>(best));
  return bits_of(best)[0];
}

// The same float in all lanes. Assembly where it pays: as an operand that each product broadcasts
// for itself, it would be loaded twice.
inline __attribute__((always_inline)) Floats broadcast_from(const float* p) {
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
  Floats v;
  asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
  return v;
#else
  return splat(*p);
#endif
}

// Rows and columns of VL vectors of VL floats change places, by halves.
template <int STRIDE>
inline void transpose_step(Floats (&v)[VL]) {
  Ints low, high;  // lane i of the other operand is VL + i
  for (int i = 0; i < VL; ++i) {
    low[i] = i & STRIDE ? VL + i - STRIDE : i;
    high[i] = i & STRIDE ? VL + i : i + STRIDE;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) {
    if (i & STRIDE) continue;
    const Floats a = v[i], b = v[i + STRIDE];
#if defined(__clang__)
    for (int j = 0; j < VL; ++j) {
      v[i][j] = j & STRIDE ? b[j - STRIDE] : a[j];
      v[i + STRIDE][j] = j & STRIDE ? b[j] : a[j + STRIDE];
    }
#else
    v[i] = __builtin_shuffle(a, b, low);
    v[i + STRIDE] = __builtin_shuffle(a, b, high);
#endif
  }
}
inline void transpose(Floats (&v)[VL]) {
#if defined(__AVX512F__)
  transpose_step<8>(v);
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  transpose_step<4>(v);
#endif
  transpose_step<2>(v);
  transpose_step<1>(v);
}

// a / b to about 1e-7 relative, for b from 1 to 2^127.
inline Floats divided(Floats a, Floats b) {
#if defined(__AVX512F__)
  const Floats near = reinterpret_cast<Floats>(_mm512_rcp14_ps(reinterpret_cast<__m512>(b)));
  return a * (near * (splat(2.0f) - b * near));
#else
  return a / b;
#endif
}

// e^x to about 1e-7 relative; the argument is clamped to where float32 stays normal. NaN stays NaN.
inline Floats exponential(Floats x) {
  const Floats magic = splat(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  Floats limited = x > splat(88.0f) ? splat(88.0f) : x;
  limited = limited < splat(-87.0f) ? splat(-87.0f) : limited;
  const Floats shifted = limited * splat(1.44269504088896341f) + magic;
  const Floats n = shifted - magic;
  const Floats r = (limited - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const Ints power = (bits_of(shifted) - bits_of(magic) + 127) << 23;
  return p * floats_of(power);
}

inline Floats silu(Floats x) { return divided(x, splat(1.0f) + exponential(-x)); }
inline Floats gelu_tanh(Floats x) {
  const Floats cubic = x + splat(0.044715f) * x * x * x;
  return divided(x, splat(1.0f) + exponential(splat(-1.5957691216057308f) * cubic));
}

// 16-bit floats by their bits, so that no compiler support and no instruction set is assumed.
inline float from_bf16(uint16_t half) {
  const uint32_t wide = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_bf16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could make it infinite
  return static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
}
inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t wide = magnitude << 13;
  if (magnitude >= 0x7c00u) {
    wide += 0x70000000u;  // infinity and NaN
  } else if (magnitude >= 0x0400u) {
    wide += 0x38000000u;
  } else {
    const float small = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
    std::memcpy(&wide, &small, 4);
  }
  wide |= sign;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t to_f16(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((wide >> 16) & 0x8000u);
  wide &= 0x7fffffffu;
  if (wide > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (wide >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (wide < 0x38800000u) {  // subnormal: let the float adder round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &wide, 4);
    magnitude += 0.5f;
    std::memcpy(&wide, &magnitude, 4);
    return static_cast<uint16_t>(sign | (wide - 0x3f000000u));
  }
  const uint32_t odd = (wide >> 13) & 1u;
  return static_cast<uint16_t>(sign | ((wide - 0x38000000u + 0xfffu + odd) >> 13));
}

}  // namespace
