// SPDX-License-Identifier: Apache-2.0
// Any machine with a C++17 compiler: plain loops, no intrinsic. The slow but exact last resort.
#include "drive.h"

namespace {

struct Isa : Common {
  static constexpr const char* NAME = "scalar";
  static constexpr int NR = 16, MR = 4, KK = 4, W8_OFFSET = 0;

  template <int ROWS, int FIELDS, int BITS>
  static void tile(const Tile& t) {
    constexpr int OFFSET = FIELDS == 1 ? 0 : FIELDS == 2 ? 8 : 2;
    const uint8_t* p = t.panel;
    for (int64_t g = 0; g < t.groups; ++g) {
      int32_t sum[ROWS][NR];
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < NR; ++j) sum[i][j] = OFFSET * t.sums[i * t.lds + g];
      const int8_t* x = t.x + g * t.group;
      for (int64_t k = 0; k < t.group; k += 4 * FIELDS, p += 4 * NR, x += 4 * FIELDS)
        for (int f = 0; f < FIELDS; ++f) {
          int16_t field[4 * NR];
          for (int b = 0; b < 4 * NR; ++b)
            field[b] = FIELDS == 1 ? static_cast<int8_t>(p[b])
                                   : static_cast<int16_t>((p[b] >> (f * BITS)) & ((1 << BITS) - 1));
          for (int i = 0; i < ROWS; ++i) {
            const int8_t* token = x + i * t.ldx + 4 * f;
            for (int j = 0; j < NR; ++j)
              for (int b = 0; b < 4; ++b) sum[i][j] += field[4 * j + b] * token[b];
          }
        }
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < NR; ++j) {
          const float part = static_cast<float>(sum[i][j]) * t.scales[g * NR + j];
          t.out[i * NR + j] = g ? t.out[i * NR + j] + part : part;
        }
    }
  }

  static int32_t round_chunk(const float*, int8_t*, int64_t, float, float, int64_t* done) {
    *done = 0;
    return 0;
  }

  static double peak_burst(int64_t iterations) {
    int32_t s[16] = {};
    int32_t a = 3, b = 2;
    for (int64_t n = 0; n < iterations; ++n) {
      asm volatile("" : "+r"(a), "+r"(b));
      for (int i = 0; i < 16; ++i) s[i] += a * (b + i);
      asm volatile("" ::"m"(s));
    }
    return static_cast<double>(iterations) * 32;
  }
};

}  // namespace

#include "library.h"
