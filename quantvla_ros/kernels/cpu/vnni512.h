// SPDX-License-Identifier: Apache-2.0
// Tiles of 512-bit vpdpbusd, six tokens by sixty-four rows of W; of avx512vnni.cpp and amx.cpp.
//
// The weight is the unsigned operand (w + 2, + 8 or + 128) and the token the signed one, so a
// 4-bit weight needs one mask and one shift for 128 products and no sign extension. Sums start at
// -offset * sum(token), which takes the offset out again for free.
#pragma once
#include <immintrin.h>

#include "drive.h"

namespace {

typedef int32_t __attribute__((may_alias)) Quad;

// Where the quads of a tile's tokens are: token i at near + i * distance for i < 3, then from far.
struct Tokens {
  const int8_t* near;
  const int8_t* far;
  int64_t distance;
  const int8_t* operator[](int i) const { return (i < 3 ? near : far) + i % 3 * distance; }
};

// sum += weights . quad of token i, byte `at`. Assembly with the address spelled out: three
// registers reach six tokens, and no compiler hoists broadcasts into registers that the sums need.
inline __attribute__((always_inline)) void dot(__m512i& sum, __m512i weights, const Tokens& tokens,
                                               int i, int at) {
#if defined(__SANITIZE_ADDRESS__)
  const int8_t* quad = tokens[i] + at;
  sum = _mm512_dpbusd_epi32(sum, weights,
                            _mm512_set1_epi32(*reinterpret_cast<const Quad*>(quad)));
#else
  const int8_t* base = i < 3 ? tokens.near : tokens.far;
  typedef const int8_t(*Bytes)[];
  if (i % 3 == 0)
    asm("vpdpbusd %c3(%2)%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(weights), "r"(base), "i"(at), "m"(*reinterpret_cast<Bytes>(base)));
  else if (i % 3 == 1)
    asm("vpdpbusd %c3(%2,%4)%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(weights), "r"(base), "i"(at), "r"(tokens.distance),
          "m"(*reinterpret_cast<Bytes>(base)));
  else
    asm("vpdpbusd %c3(%2,%4,2)%{1to16%}, %1, %0"
        : "+v"(sum)
        : "v"(weights), "r"(base), "i"(at), "r"(tokens.distance),
          "m"(*reinterpret_cast<Bytes>(base)));
#endif
}
// One quad of a token in all lanes. Assembly, so that no compiler keeps more of them in registers
// than there are.
inline __attribute__((always_inline)) __m512i broadcast(const Tokens& x, int i) {
#if defined(__SANITIZE_ADDRESS__)
  return _mm512_set1_epi32(*reinterpret_cast<const Quad*>(x[i]));
#else
  __m512i quad;
  asm("vpbroadcastd %1, %0" : "=v"(quad) : "m"(*reinterpret_cast<const Quad*>(x[i])));
  return quad;
#endif
}

struct Vnni512 : Common {
  static constexpr int NR = 64, MR = 6, KK = 4, W8_OFFSET = 128;
  static constexpr int64_t PIECE = 256;

  // Columns of a packed panel into the order of 8-bit ones, unsigned.
  template <int BITS>
  static void unpack(const uint8_t* from, int64_t columns, uint8_t* to) {
    constexpr int FIELDS = 8 / BITS, STEP = NR * KK;
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    for (const uint8_t* end = to + columns * NR; to < end; from += STEP, to += FIELDS * STEP)
#pragma GCC unroll 4
      for (int v = 0; v < STEP; v += 64) {
        const __m512i packed = _mm512_load_si512(from + v);
#pragma GCC unroll 4
        for (int f = 0; f < FIELDS; ++f)
          _mm512_store_si512(to + f * STEP + v,
                             _mm512_and_si512(_mm512_srli_epi16(packed, f * BITS), mask));
      }
  }

  // Whole bytes against ROWS tokens, while the lines at `ahead` are asked for: a token's quad is loaded once for four products. With the
  // embedded broadcast of dot() the loads would be the limit where two products start in a cycle.
  template <int ROWS>
  static __attribute__((always_inline)) void bytes(const uint8_t* p, const uint8_t* end, Tokens x,
                                                   const uint8_t* ahead,
                                                   __m512i (&sum)[ROWS][4]) {
    for (; p < end; p += 256, x.near += 4, x.far += 4, ahead += 64) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      const __m512i w0 = _mm512_load_si512(p), w1 = _mm512_load_si512(p + 64);
      const __m512i w2 = _mm512_load_si512(p + 128), w3 = _mm512_load_si512(p + 192);
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        const __m512i quad = broadcast(x, i);
        sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], w0, quad);
        sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], w1, quad);
        sum[i][2] = _mm512_dpbusd_epi32(sum[i][2], w2, quad);
        sum[i][3] = _mm512_dpbusd_epi32(sum[i][3], w3, quad);
      }
    }
  }

  // Packed fields, unpacked on the way: for a few tokens, which read each weight once. Masks and
  // products share two ports, so of two fields with chains of their own each stays where it is in
  // its byte, and the sums are shifted instead: 240 * 127 * K / 2 fits into 32 bits.
  template <int ROWS, int FIELDS, int CHAINS>
  static __attribute__((always_inline)) void fields(const uint8_t* p, const uint8_t* end, Tokens x,
                                                    __m512i (&sum)[CHAINS][ROWS][4]) {
    constexpr int BITS = 8 / FIELDS;
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    for (; p < end; p += 256, x.near += 4 * FIELDS, x.far += 4 * FIELDS) {
      __m512i held[FIELDS][ROWS];
      if (ROWS <= 2)
#pragma GCC unroll 4
        for (int f = 0; f < FIELDS; ++f)
#pragma GCC unroll 6
          for (int i = 0; i < ROWS; ++i)
            held[f][i] = _mm512_set1_epi32(*reinterpret_cast<const Quad*>(x[i] + 4 * f));
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i packed = _mm512_load_si512(p + 64 * v);
        // a weight that is read once: the machine's own prefetch comes too late for it
        if (ROWS <= 2) _mm_prefetch(p + 64 * v + 2048, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int f = 0; f < FIELDS; ++f) {
          __m512i field = packed;
          if (CHAINS == 2)
            field = _mm512_and_si512(packed, _mm512_slli_epi16(mask, f * BITS));
          else if (FIELDS > 1)
            field = _mm512_and_si512(f ? _mm512_srli_epi16(packed, f * BITS) : packed, mask);
#pragma GCC unroll 6
          for (int i = 0; i < ROWS; ++i)
            if (ROWS <= 2)
              sum[CHAINS > 1 ? f : 0][i][v] =
                  _mm512_dpbusd_epi32(sum[CHAINS > 1 ? f : 0][i][v], field, held[f][i]);
            else
              dot(sum[CHAINS > 1 ? f : 0][i][v], field, x, i, 4 * f);
        }
      }
    }
  }

  template <int ROWS, int FIELDS, int BITS>
  static void tile(Tile t) {  // by value: stores of vectors may alias a reference
    constexpr int SHIFT = BITS == 2 ? 1 : BITS == 4 ? 3 : 7;
    // With few rows the sums of one chain wait for each other: give each field its own.
    constexpr int CHAINS = ROWS * FIELDS <= 4 ? FIELDS : 1;
    const uint8_t* p = t.panel;
    for (int64_t g = 0; g < t.groups; ++g) {
      __m512i sum[CHAINS][ROWS][4];
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        const __m512i start = _mm512_slli_epi32(_mm512_set1_epi32(t.sums[i * t.lds + g]), SHIFT);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          sum[0][i][v] = t.carry_in ? _mm512_load_si512(t.out + i * NR + 16 * v) : start;
#pragma GCC unroll 4
          for (int c = 1; c < CHAINS; ++c) sum[c][i][v] = _mm512_setzero_si512();
        }
      }
      const int8_t* x = t.x + g * t.group;
      const uint8_t* end = p + t.group / FIELDS * NR;
      if constexpr (FIELDS == 1 && ROWS > 2)
        bytes<ROWS>(p, end, {x, x + 3 * t.ldx, t.ldx}, t.ahead + g * t.group / KK * 64, sum[0]);
      else
        fields<ROWS, FIELDS, CHAINS>(p, end, {x, x + 3 * t.ldx, t.ldx}, sum);
      p = end;
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512 scale = _mm512_load_ps(t.scales + g * NR + 16 * v);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
          __m512i whole = sum[0][i][v];
#pragma GCC unroll 4
          for (int c = 1; c < CHAINS; ++c)
            whole = _mm512_add_epi32(
                whole, CHAINS == 2 ? _mm512_srai_epi32(sum[c][i][v], c * BITS) : sum[c][i][v]);
          float* out = t.out + i * NR + 16 * v;
          if (t.carry_out) {
            _mm512_store_si512(out, whole);
            continue;
          }
          const __m512 value = _mm512_cvtepi32_ps(whole);
          _mm512_store_ps(out, g || t.add ? _mm512_fmadd_ps(value, scale, _mm512_load_ps(out))
                                          : _mm512_mul_ps(value, scale));
        }
      }
    }
  }

  static __m512i rounded(const float* x, __m512 factor, __m512 low, __m512 high) {
    __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x), factor);
    v = _mm512_max_ps(_mm512_min_ps(v, high), low);
    return _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }

  static int32_t round_chunk(const float* x, int8_t* q, int64_t k, float inverse, float top,
                             int64_t* done) {
    const __m512 factor = _mm512_set1_ps(inverse), high = _mm512_set1_ps(top);
    const __m512 low = _mm512_set1_ps(-top);
    // packing works in quarters of a register: quads of x come out four apart
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i total = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
      const __m512i first = _mm512_packs_epi32(rounded(x + i, factor, low, high),
                                               rounded(x + i + 16, factor, low, high));
      const __m512i second = _mm512_packs_epi32(rounded(x + i + 32, factor, low, high),
                                                rounded(x + i + 48, factor, low, high));
      const __m512i bytes =
          _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second));
      total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), bytes);
      _mm512_storeu_si512(q + i, bytes);
    }
    for (; i + 16 <= k; i += 16) {
      const __m512i whole = rounded(x + i, factor, low, high);
      total = _mm512_add_epi32(total, whole);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(whole));
    }
    *done = i;
    return _mm512_reduce_add_epi32(total);
  }
};

}  // namespace
