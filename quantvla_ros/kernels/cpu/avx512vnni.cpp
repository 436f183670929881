// SPDX-License-Identifier: Apache-2.0
// x86 with AVX-512 VNNI: 512-bit vpdpbusd; the tiles are those of vnni512.h.
#include "vnni512.h"

namespace {

struct Isa : Vnni512 {
  static constexpr const char* NAME = "avx512vnni";
  static constexpr int64_t MOST_ROWS = 72;  // with more, sums and tokens of a piece leave the cache

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
