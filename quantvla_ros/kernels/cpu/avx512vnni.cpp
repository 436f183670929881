// SPDX-License-Identifier: Apache-2.0
// x86 with AVX-512 VNNI: 512-bit vpdpbusd, six tokens by sixty-four rows of W per tile.
//
// The weight is the unsigned operand (w + 2, + 8 or + 128) and the token the signed one, so a
// 4-bit weight needs one mask and one shift for 128 products and no sign extension. The token is
// the memory operand with embedded broadcast, which costs no register and no instruction. Sums
// start at -offset * sum(token), which takes the offset out again for free.
#include <immintrin.h>

#include "quantize.h"

namespace {
struct Tile;

typedef int32_t __attribute__((may_alias)) Quad;

// Where the quads of a tile's tokens are: token i at near + i * distance for i < 3, then from far.
struct Tokens {
  const int8_t* near;
  const int8_t* far;
  int64_t distance;
};

// sum += weights . quad of token i, byte `at`. Assembly with the address spelled out: three
// registers reach six tokens, and no compiler hoists broadcasts into registers that the sums need.
inline __attribute__((always_inline)) void dot(__m512i& sum, __m512i weights, const Tokens& tokens,
                                               int i, int at) {
  const int8_t* base = i < 3 ? tokens.near : tokens.far;
#if defined(__SANITIZE_ADDRESS__)
  const int8_t* quad = base + i % 3 * tokens.distance + at;
  sum = _mm512_dpbusd_epi32(sum, weights,
                            _mm512_set1_epi32(*reinterpret_cast<const Quad*>(quad)));
#else
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
}  // namespace

#include "drive.h"

namespace {

struct Isa {
  static constexpr const char* NAME = "avx512vnni";
  static constexpr int NR = 64, MR = 6, KK = 4, W8_OFFSET = 128;

  template <int ROWS, int FIELDS>
  static void tile(Tile t) {  // by value: stores of vectors may alias a reference
    constexpr int BITS = 8 / FIELDS, SHIFT = BITS == 2 ? 1 : BITS == 4 ? 3 : 7;
    // With few rows the sums of one chain wait for each other: give each field its own.
    constexpr int CHAINS = ROWS * FIELDS <= 4 ? FIELDS : 1;
    const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
    const uint8_t* p = t.panel;
    for (int64_t g = 0; g < t.groups; ++g) {
      __m512i sum[CHAINS][ROWS][4];
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        const __m512i start =
            _mm512_slli_epi32(_mm512_set1_epi32(t.sums[i * t.groups + g]), SHIFT);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          sum[0][i][v] = start;
#pragma GCC unroll 4
          for (int c = 1; c < CHAINS; ++c) sum[c][i][v] = _mm512_setzero_si512();
        }
      }
      Tokens x{t.x + g * t.group, t.x + g * t.group + 3 * t.ldx, t.ldx};
      const uint8_t* end = p + t.group / FIELDS * NR;
      for (; p < end; p += 256, x.near += 4 * FIELDS, x.far += 4 * FIELDS) {
        __m512i held[FIELDS][ROWS];
        if (ROWS <= 2)
#pragma GCC unroll 4
          for (int f = 0; f < FIELDS; ++f)
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i)
              held[f][i] = _mm512_set1_epi32(
                  *reinterpret_cast<const Quad*>((i < 3 ? x.near : x.far) + i % 3 * x.distance + 4 * f));
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const __m512i packed = _mm512_load_si512(p + 64 * v);
#pragma GCC unroll 4
          for (int f = 0; f < FIELDS; ++f) {
            const __m512i field =
                FIELDS == 1 ? packed
                            : _mm512_and_si512(
                                  f ? _mm512_srli_epi16(packed, f * BITS) : packed, mask);
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
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512 scale = _mm512_load_ps(t.scales + g * NR + 16 * v);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i) {
          __m512i whole = sum[0][i][v];
#pragma GCC unroll 4
          for (int c = 1; c < CHAINS; ++c) whole = _mm512_add_epi32(whole, sum[c][i][v]);
          float* out = t.out + i * NR + 16 * v;
          const __m512 value = _mm512_cvtepi32_ps(whole);
          _mm512_store_ps(out, g ? _mm512_fmadd_ps(value, scale, _mm512_load_ps(out))
                                 : _mm512_mul_ps(value, scale));
        }
      }
    }
  }

  static int32_t round_chunk(const float* x, int8_t* q, int64_t k, float inverse, float top,
                             int64_t* done) {
    const __m512 factor = _mm512_set1_ps(inverse), high = _mm512_set1_ps(top);
    const __m512 low = _mm512_set1_ps(-top);
    __m512i total = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 16 <= k; i += 16) {
      __m512 v = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
      v = _mm512_max_ps(_mm512_min_ps(v, high), low);
      const __m512i rounded =
          _mm512_cvt_roundps_epi32(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      total = _mm512_add_epi32(total, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q + i), _mm512_cvtepi32_epi8(rounded));
    }
    *done = i;
    return _mm512_reduce_add_epi32(total);
  }

  static double peak_burst(int64_t iterations) {
    __m512i s[14];
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(2);
#pragma GCC unroll 14
    for (int i = 0; i < 14; ++i) s[i] = _mm512_set1_epi32(i);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 14
      for (int i = 0; i < 14; ++i) asm volatile("vpdpbusd %2, %1, %0" : "+v"(s[i]) : "v"(a), "v"(b));
    }
#pragma GCC unroll 14
    for (int i = 0; i < 14; ++i) asm volatile("" ::"v"(s[i]));
    return static_cast<double>(iterations) * 14 * 128;
  }
};

}  // namespace

#include "library.h"
