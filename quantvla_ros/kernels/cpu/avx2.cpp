// SPDX-License-Identifier: Apache-2.0
// x86 with 256-bit vectors, compiled three times: AVX2 alone, with AVX-VNNI, and with the 256-bit
// form of AVX-512 VNNI.
//
// Without VNNI the 2- and 4-bit weights are the unsigned operand of vpmaddubsw. A pair of products
// is at most 2 * 15 * 127 = 3810, so eight of them fit a 16-bit sum (30480) and the widening to 32
// bits is paid once for 32 columns. 8-bit weights would overflow there (2 * 255 * 127): |x| is the
// unsigned operand instead and the weight takes the sign of x, 2 * 127 * 127 = 32258.
#include <immintrin.h>

#include "drive.h"

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define QV_VNNI 1
#endif

namespace {

typedef int32_t __attribute__((may_alias)) Quad;

inline __m256i quad(const int8_t* x) {
  return _mm256_set1_epi32(*reinterpret_cast<const Quad*>(x));
}

template <int FIELDS>
inline __m256i field_of(const uint8_t* packed, int f) {
  constexpr int BITS = 8 / FIELDS;
  const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(packed));
  if (FIELDS == 1) return all;
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1);
  return _mm256_and_si256(f ? _mm256_srli_epi16(all, f * BITS) : all, mask);
}

// out += or = float(sum) * scale for eight columns.
inline void flush(__m256i sum, const float* scale, bool first, float* out) {
  const __m256 value = _mm256_cvtepi32_ps(sum);
  const __m256 factor = _mm256_load_ps(scale);
  _mm256_store_ps(out, first ? _mm256_mul_ps(value, factor)
                             : _mm256_fmadd_ps(value, factor, _mm256_load_ps(out)));
}

struct Base : Common {
  static constexpr int NR = 16, KK = 4;

  static int32_t round_chunk(const float* x, int8_t* q, int64_t k, float inverse, float top,
                             int64_t* done) {
    const __m256 factor = _mm256_set1_ps(inverse), high = _mm256_set1_ps(top);
    const __m256 low = _mm256_set1_ps(-top);
    __m256i total = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 8 <= k; i += 8) {
      const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), factor);
      const __m256i rounded = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(v, high), low));
      total = _mm256_add_epi32(total, rounded);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded),
                                            _mm256_extracti128_si256(rounded, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), _mm_packs_epi16(words, words));
    }
    *done = i;
    alignas(32) int32_t lanes[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), total);
    int32_t sum = 0;
    for (int32_t lane : lanes) sum += lane;
    return sum;
  }
};

#if defined(QV_VNNI)

inline __m256i dot(__m256i sum, __m256i weights, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, weights, x);
#else
  return _mm256_dpbusd_epi32(sum, weights, x);
#endif
}

struct Isa : Base {
#if defined(__AVXVNNI__)
  static constexpr const char* NAME = "avx2vnni";
#else
  static constexpr const char* NAME = "avx512vl";
#endif
  static constexpr int MR = 5, W8_OFFSET = 128;  // ten sums, two operands, one quad, one mask

  template <int ROWS, int FIELDS, int BITS>
  static void tile(const Tile& t) {
    constexpr int SHIFT = FIELDS == 1 ? 7 : FIELDS == 2 ? 3 : 1;
    const uint8_t* p = t.panel;
    // With few rows the sums of one chain wait for each other: give each field its own.
    constexpr int CHAINS = ROWS <= 2 ? FIELDS : 1;
    for (int64_t g = 0; g < t.groups; ++g) {
      __m256i sum[CHAINS][ROWS][2];
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
        sum[0][i][0] = sum[0][i][1] =
            _mm256_slli_epi32(_mm256_set1_epi32(t.sums[i * t.lds + g]), SHIFT);
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; ++c) sum[c][i][0] = sum[c][i][1] = _mm256_setzero_si256();
      }
      const int8_t* x = t.x + g * t.group;
      const uint8_t* end = p + t.group / FIELDS * NR;
      for (; p < end; p += 64, x += 4 * FIELDS) {
#pragma GCC unroll 4
        for (int f = 0; f < FIELDS; ++f) {
          const __m256i left = field_of<FIELDS>(p, f), right = field_of<FIELDS>(p + 32, f);
#pragma GCC unroll 6
          for (int i = 0; i < ROWS; ++i) {
            const __m256i token = quad(x + i * t.ldx + 4 * f);
            __m256i* to = sum[CHAINS > 1 ? f : 0][i];
            to[0] = dot(to[0], left, token);
            to[1] = dot(to[1], right, token);
          }
        }
      }
#pragma GCC unroll 6
      for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; ++c) {
          sum[0][i][0] = _mm256_add_epi32(sum[0][i][0], sum[c][i][0]);
          sum[0][i][1] = _mm256_add_epi32(sum[0][i][1], sum[c][i][1]);
        }
        flush(sum[0][i][0], t.scales + g * NR, g == 0, t.out + i * NR);
        flush(sum[0][i][1], t.scales + g * NR + 8, g == 0, t.out + i * NR + 8);
      }
    }
  }

  static double peak_burst(int64_t iterations) {
    __m256i s[12];
    const __m256i a = _mm256_set1_epi8(3);
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) s[i] = _mm256_set1_epi32(i);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
      for (int i = 0; i < 12; ++i) {
        s[i] = dot(s[i], a, a);
        asm volatile("" : "+x"(s[i]));
      }
    }
    return static_cast<double>(iterations) * 12 * 64;
  }
};

#else

struct Isa : Base {
  static constexpr const char* NAME = "avx2";
  static constexpr int MR = 4, W8_OFFSET = 0;

  // 32 columns of 2- or 4-bit weights into 16-bit sums, then once into the 32-bit ones.
  template <int ROWS, int FIELDS>
  static void narrow(const uint8_t* p, const int8_t* x, int64_t ldx, __m256i* sum) {
    __m256i part[ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) part[i][0] = part[i][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int step = 0; step < 8 / FIELDS; ++step)
#pragma GCC unroll 4
      for (int f = 0; f < FIELDS; ++f) {
        const __m256i left = field_of<FIELDS>(p + 64 * step, f);
        const __m256i right = field_of<FIELDS>(p + 64 * step + 32, f);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          const __m256i token = quad(x + i * ldx + 4 * (step * FIELDS + f));
          part[i][0] = _mm256_add_epi16(part[i][0], _mm256_maddubs_epi16(left, token));
          part[i][1] = _mm256_add_epi16(part[i][1], _mm256_maddubs_epi16(right, token));
          // Keeps the compiler from summing in another order, which needs more registers.
          asm("" : "+x"(part[i][0]), "+x"(part[i][1]));
        }
      }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      sum[2 * i] = _mm256_add_epi32(sum[2 * i], _mm256_madd_epi16(part[i][0], ones));
      sum[2 * i + 1] = _mm256_add_epi32(sum[2 * i + 1], _mm256_madd_epi16(part[i][1], ones));
    }
  }

  template <int ROWS>
  static void whole(const uint8_t* p, const int8_t* x, int64_t ldx, int64_t columns,
                    __m256i* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns; k += 4, p += 64, x += 4) {
      const __m256i left = field_of<1>(p, 0), right = field_of<1>(p + 32, 0);
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        const __m256i token = quad(x + i * ldx);
        const __m256i size = _mm256_abs_epi8(token);
        const __m256i a = _mm256_maddubs_epi16(size, _mm256_sign_epi8(left, token));
        const __m256i b = _mm256_maddubs_epi16(size, _mm256_sign_epi8(right, token));
        sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_madd_epi16(a, ones));
        sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_madd_epi16(b, ones));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) out[2 * i] = sum[i][0], out[2 * i + 1] = sum[i][1];
  }

  template <int ROWS, int FIELDS, int BITS>
  static void tile(const Tile& t) {
    const int64_t group_bytes = t.group / FIELDS * NR;
    for (int64_t g = 0; g < t.groups; ++g) {
      alignas(32) __m256i sum[2 * ROWS];  // in memory on purpose: touched once in 32 columns
      const uint8_t* p = t.panel + g * group_bytes;
      const int8_t* x = t.x + g * t.group;
      if constexpr (FIELDS == 1) {
        whole<ROWS>(p, x, t.ldx, t.group, sum);
      } else {
        for (int i = 0; i < ROWS; ++i)
          sum[2 * i] = sum[2 * i + 1] = _mm256_slli_epi32(
              _mm256_set1_epi32(t.sums[i * t.lds + g]), FIELDS == 2 ? 3 : 1);
        for (int64_t k = 0; k < t.group; k += 32)
          narrow<ROWS, FIELDS>(p + k / FIELDS * NR, x + k, t.ldx, sum);
      }
      for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < 2; ++v)
          flush(sum[2 * i + v], t.scales + g * NR + 8 * v, g == 0, t.out + i * NR + 8 * v);
    }
  }

  // The textbook sequence without VNNI: multiply-add to 16 bits, to 32 bits, add.
  static double peak_burst(int64_t iterations) {
    __m256i s[10];
    const __m256i a = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) s[i] = _mm256_set1_epi32(i);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 10
      for (int i = 0; i < 10; ++i) {
        __m256i product;
        asm volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
                     : "+x"(s[i]), "=&x"(product)
                     : "x"(a), "x"(ones));
      }
    }
    return static_cast<double>(iterations) * 10 * 64;
  }
};

#endif

}  // namespace

#include "library.h"
