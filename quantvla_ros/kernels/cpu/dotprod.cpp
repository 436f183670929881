// SPDX-License-Identifier: Apache-2.0
// 64-bit Arm with dot product (Armv8.2; Jetson Orin): sdot by element, four tokens by sixteen rows.
// 2- and 4-bit weights enter as w + 2 and w + 8, which a signed byte holds: one mask, no sign
// extension, and sums that start at -offset * sum(token).
#include <arm_neon.h>

#include "drive.h"

namespace {

// The lane of sdot is part of the instruction; the switch is gone once the loop is unrolled.
inline __attribute__((always_inline)) int32x4_t dot(int32x4_t sum, int8x16_t weights,
                                                    int8x16_t tokens, int lane) {
  switch (lane) {
    case 0: return vdotq_laneq_s32(sum, weights, tokens, 0);
    case 1: return vdotq_laneq_s32(sum, weights, tokens, 1);
    case 2: return vdotq_laneq_s32(sum, weights, tokens, 2);
    default: return vdotq_laneq_s32(sum, weights, tokens, 3);
  }
}

struct Isa : Common {
  static constexpr const char* NAME = "dotprod";
  static constexpr int NR = 16, MR = 4, KK = 4, W8_OFFSET = 0;

  template <int ROWS, int FIELDS, int BITS>
  static void tile(const Tile& t) {
    constexpr int OFFSET = FIELDS == 1 ? 0 : FIELDS == 2 ? 8 : 2;
    const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
    const uint8_t* p = t.panel;
    for (int64_t g = 0; g < t.groups; ++g) {
      int32x4_t sum[ROWS][4];
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) sum[i][v] = vdupq_n_s32(OFFSET * t.sums[i * t.lds + g]);
      const int8_t* x = t.x + g * t.group;
      for (int64_t k = 0; k < t.group; k += 16, x += 16) {
        int8x16_t token[ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) token[i] = vld1q_s8(x + i * t.ldx);
#pragma GCC unroll 4
        for (int step = 0; step < 4 / FIELDS; ++step, p += 64)
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const uint8x16_t packed = vld1q_u8(p + 16 * v);
#pragma GCC unroll 4
            for (int f = 0; f < FIELDS; ++f) {
              uint8x16_t field = packed;
              if (FIELDS > 1) {
                if (f) field = vreinterpretq_u8_u16(vshlq_u16(
                    vreinterpretq_u16_u8(packed), vdupq_n_s16(static_cast<int16_t>(-f * BITS))));
                field = vandq_u8(field, mask);
              }
              const int8x16_t weights = vreinterpretq_s8_u8(field);
#pragma GCC unroll 4
              for (int i = 0; i < ROWS; ++i)
                sum[i][v] = dot(sum[i][v], weights, token[i], step * FIELDS + f);
            }
          }
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const float32x4_t scale = vld1q_f32(t.scales + g * NR + 4 * v);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
          float* out = t.out + i * NR + 4 * v;
          const float32x4_t value = vcvtq_f32_s32(sum[i][v]);
          vst1q_f32(out, g ? vfmaq_f32(vld1q_f32(out), value, scale) : vmulq_f32(value, scale));
        }
      }
    }
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
        s[i] = vdotq_s32(s[i], a, a);
        asm volatile("" : "+w"(s[i]));
      }
    }
    return static_cast<double>(iterations) * 16 * 32;
  }
};

}  // namespace

#include "library.h"
