// SPDX-License-Identifier: Apache-2.0
// 64-bit Arm with i8mm: smmla multiplies 2 tokens x 8 columns by 8 columns x 2 rows of W.
// Panels hold eight consecutive columns of each row (KK = 8); the rest is as in dotprod.cpp.
#include <arm_neon.h>

#include "drive.h"

namespace {

struct Isa : Common {
  static constexpr const char* NAME = "i8mm";
  static constexpr int NR = 16, MR = 4, KK = 8, W8_OFFSET = 0, PAIRS = NR / 2;

  template <int ROWS, int FIELDS, int BITS>
  static void tile(const Tile& t) {
    constexpr int OFFSET = FIELDS == 1 ? 0 : FIELDS == 2 ? 8 : 2;
    constexpr int TWOS = (ROWS + 1) / 2;  // an odd last token is multiplied twice, stored once
    const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
    const uint8_t* p = t.panel;
    for (int64_t g = 0; g < t.groups; ++g) {
      int32x4_t sum[TWOS][PAIRS];
#pragma GCC unroll 2
      for (int r = 0; r < TWOS; ++r) {
        const int second = 2 * r + 1 < ROWS ? 2 * r + 1 : 2 * r;
        const int32x2_t a = vdup_n_s32(OFFSET * t.sums[2 * r * t.lds + g]);
        const int32x2_t b = vdup_n_s32(OFFSET * t.sums[second * t.lds + g]);
#pragma GCC unroll 8
        for (int v = 0; v < PAIRS; ++v) sum[r][v] = vcombine_s32(a, b);
      }
      const int8_t* x = t.x + g * t.group;
      for (int64_t k = 0; k < t.group; k += 8 * FIELDS, x += 8 * FIELDS, p += 8 * NR) {
#pragma GCC unroll 4
        for (int f = 0; f < FIELDS; ++f) {
          int8x16_t token[TWOS];
#pragma GCC unroll 2
          for (int r = 0; r < TWOS; ++r) {
            const int second = 2 * r + 1 < ROWS ? 2 * r + 1 : 2 * r;
            token[r] = vcombine_s8(vld1_s8(x + 2 * r * t.ldx + 8 * f),
                                   vld1_s8(x + second * t.ldx + 8 * f));
          }
#pragma GCC unroll 8
          for (int v = 0; v < PAIRS; ++v) {
            uint8x16_t field = vld1q_u8(p + 16 * v);
            if (FIELDS > 1) {
              if (f) field = vreinterpretq_u8_u16(vshlq_u16(
                  vreinterpretq_u16_u8(field), vdupq_n_s16(static_cast<int16_t>(-f * BITS))));
              field = vandq_u8(field, mask);
            }
#pragma GCC unroll 2
            for (int r = 0; r < TWOS; ++r)
              sum[r][v] = vmmlaq_s32(sum[r][v], token[r], vreinterpretq_s8_u8(field));
          }
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < PAIRS; ++v) {
        const float32x2_t scale = vld1_f32(t.scales + g * NR + 2 * v);
#pragma GCC unroll 2
        for (int r = 0; r < TWOS; ++r) {
          const float32x4_t value = vcvtq_f32_s32(sum[r][v]);
          float* out = t.out + 2 * r * NR + 2 * v;
          put(out, vget_low_f32(value), scale, g == 0);
          if (2 * r + 1 < ROWS) put(out + NR, vget_high_f32(value), scale, g == 0);
        }
      }
    }
  }

  static void put(float* out, float32x2_t value, float32x2_t scale, bool first) {
    vst1_f32(out, first ? vmul_f32(value, scale) : vfma_f32(vld1_f32(out), value, scale));
  }

  static int32_t round_chunk(const float*, int8_t*, int64_t, float, float, int64_t* done) {
    *done = 0;
    return 0;
  }

  static double peak_burst(int64_t iterations) {
    int32x4_t s[16];
    const int8x16_t a = vdupq_n_s8(3);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) s[i] = vdupq_n_s32(i);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        s[i] = vmmlaq_s32(s[i], a, a);
        asm volatile("" : "+w"(s[i]));
      }
    }
    return static_cast<double>(iterations) * 16 * 64;
  }
};

}  // namespace

#include "library.h"
