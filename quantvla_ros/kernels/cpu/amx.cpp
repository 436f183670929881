// SPDX-License-Identifier: Apache-2.0
// x86 with AMX (Xeon since 2023): tdpbsud multiplies 16 tokens x 64 columns by 64 columns x 16 rows
// of W. Few tokens, and groups of 32 columns, take the 512-bit vpdpbusd of vnni512.h: the panels
// are the same, and so is the unsigned weight with its offset.
//
// Eight tiles: four sums, two of tokens, two of weights. A strip of 17 to 32 tokens meets 32 rows
// of W at a time, one of up to 16 tokens all 64 rows of a panel, so that each load serves two
// products or more. All strips of a block have one height, the last may compute rows that nobody
// reads: the tiles are configured once, not for each strip.
#include <sys/syscall.h>
#include <unistd.h>

#include <utility>

#include "vnni512.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

thread_local int configured = 0;  // height of the strips that this thread's tiles are made for

// The compiler's tile instructions do not say which memory they read: what was written must be
// there before they do. A configuration was loaded once before its rows had been stored.
inline void settle() { asm volatile("" ::: "memory"); }

inline void configure(int height) {
  if (configured == height) return;
  TileConfig config;
  const int upper = height < 16 ? height : 16, lower = height > 16 ? height - 16 : upper;
  const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(rows[i]);
  }
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  configured = height;
}

struct Isa : Vnni512 {
  static constexpr const char* NAME = "amx";
  static constexpr bool OWN_BLOCKS = true;
  static constexpr int64_t STEP = 64;  // columns of a tile
  // Columns of a piece: of many strips the sums are carried seldom, of one or two the piece of W
  // that is unpacked stays in the first-level cache.
  static constexpr int64_t DEEP = 1024, SHALLOW = 256;
  static constexpr int64_t ACROSS = NR * KK;  // bytes of one quad of columns of a panel

  static int32_t ready() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }

  static void rest() {
    if (configured) _tile_release();
    configured = 0;
  }

  // Where a strip finds its operands; `packed` is not null while the piece is still unpacked on
  // the way, one step ahead of the products.
  struct Strip {
    const int8_t* x;
    int64_t ldx;
    uint8_t* weights;
    const uint8_t* packed;
  };

  template <int BITS>
  static void unpack_step(const Strip& s, int64_t column) {
    if constexpr (BITS < 8)
      unpack<BITS>(s.packed + column * NR * BITS / 8, STEP, s.weights + column * NR);
    settle();
  }

  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // The sums of four tiles, kept as integers; `half` counts 32 rows of W.
  static void load_sums(const float* out, bool tall, int half) {
    constexpr int64_t LINE = NR * 4;
    const float* at = out + 32 * half;
    _tile_loadd(0, at, LINE);
    _tile_loadd(1, at + 16, LINE);
    const float* below = tall ? at + 16 * NR : at + 32;
    _tile_loadd(2, below, LINE);
    _tile_loadd(3, below + 16, LINE);
  }
  static void store_sums(float* out, bool tall, int half) {
    constexpr int64_t LINE = NR * 4;
    float* at = out + 32 * half;
    _tile_stored(0, at, LINE);
    _tile_stored(1, at + 16, LINE);
    float* below = tall ? at + 16 * NR : at + 32;
    _tile_stored(2, below, LINE);
    _tile_stored(3, below + 16, LINE);
  }

  // 17 to 32 tokens, 32 rows of W.
  template <int BITS>
  static void tall_product(const Strip& s, int64_t begin, int64_t end, int half) {
    const int8_t* low = s.x + 16 * s.ldx;
    for (int64_t c = begin; c < end; c += STEP) {
      if (s.packed && c + STEP < end) unpack_step<BITS>(s, c + STEP);
      const uint8_t* w = s.weights + c * NR + 128 * half;
      _tile_loadd(4, s.x + c, s.ldx);
      _tile_loadd(6, w, ACROSS);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, w + 64, ACROSS);
      _tile_dpbsud(1, 4, 7);
      _tile_loadd(5, low + c, s.ldx);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
  }

  // Up to 16 tokens, 64 rows of W.
  template <int BITS>
  static void flat_product(const Strip& s, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += STEP) {
      if (s.packed && c + STEP < end) unpack_step<BITS>(s, c + STEP);
      const uint8_t* w = s.weights + c * NR;
      _tile_loadd(4, s.x + c, s.ldx);
      _tile_loadd(6, w, ACROSS);
      _tile_dpbsud(0, 4, 6);
      _tile_loadd(7, w + 64, ACROSS);
      _tile_dpbsud(1, 4, 7);
      _tile_loadd(6, w + 128, ACROSS);
      _tile_dpbsud(2, 4, 6);
      _tile_loadd(7, w + 192, ACROSS);
      _tile_dpbsud(3, 4, 7);
    }
  }

  // Columns begin .. end of a strip: out holds the integer sums of all 64 rows of W.
  template <int BITS>
  static void strip_sums(Strip& s, int64_t begin, int64_t end, int height, bool carry, float* out) {
    if (s.packed) unpack_step<BITS>(s, begin);
    settle();
    const bool tall = height > 16;
    for (int half = 0; half < (tall ? 2 : 1); ++half) {
      if (carry)
        load_sums(out, tall, half);
      else
        clear();
      if (tall)
        tall_product<BITS>(s, begin, end, half);
      else
        flat_product<BITS>(s, begin, end);
      store_sums(out, tall, half);
      if (half + 1 == (tall ? 2 : 1)) break;
      const uint8_t* none = nullptr;
      std::swap(s.packed, none);  // the second half finds everything unpacked
    }
  }

  // out = or += float(sums + start) * scale, row by row.
  template <int BITS>
  static void scale_sums(const float* sums, int64_t rows, const int32_t* start, int64_t lds,
                         const float* scale, bool add, float* out) {
    constexpr int SHIFT = BITS == 2 ? 1 : BITS == 4 ? 3 : 7;
    for (int64_t i = 0; i < rows; ++i, sums += NR, out += NR) {
      const __m512i first = _mm512_slli_epi32(_mm512_set1_epi32(start[i * lds]), SHIFT);
#pragma GCC unroll 4
      for (int j = 0; j < NR; j += 16) {
        const __m512 value =
            _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(sums + j), first));
        const __m512 factor = _mm512_load_ps(scale + j);
        _mm512_store_ps(out + j, add ? _mm512_fmadd_ps(value, factor, _mm512_load_ps(out + j))
                                     : _mm512_mul_ps(value, factor));
      }
    }
  }

  // A block against a panel; false where the tiles of vnni512.h serve it better.
  template <int BITS>
  static bool block(const Tile& t, int64_t rows) {
    if (rows < 3 || t.group % STEP) return false;
    alignas(64) uint8_t unpacked[BITS < 8 ? DEEP * NR : 64];
    alignas(64) float group_sums[32 * NR];
    const int64_t strips = (rows + 31) / 32, height = (rows + strips - 1) / strips;
    configure(static_cast<int>(height));
    const int64_t columns = t.groups * t.group;
    const int64_t deep = BITS < 8 && strips <= 2 && t.groups == 1 ? SHALLOW : DEEP;
    for (int64_t c = 0; c < columns; c += deep) {
      const int64_t count = columns - c < deep ? columns - c : deep;
      const uint8_t* panel = t.panel + c * NR * BITS / 8;
      for (int64_t row = 0; row < rows; row += height) {
        Strip s{t.x + row * t.ldx + c, t.ldx, BITS < 8 ? unpacked : const_cast<uint8_t*>(panel),
                BITS < 8 && row == 0 ? panel : nullptr};
        const uint8_t* fresh = s.packed;
        float* out = t.out + row * NR;
        const int64_t real = rows - row < height ? rows - row : height;
        const int32_t* start = t.sums + row * t.lds;
        if (t.groups == 1) {
          strip_sums<BITS>(s, 0, count, static_cast<int>(height), c > 0, out);
          if (c + count == columns)
            scale_sums<BITS>(out, real, start, t.lds, t.scales, false, out);
          continue;
        }
        for (int64_t g = c / t.group; g < (c + count) / t.group; ++g) {
          s.packed = fresh;
          const int64_t begin = g * t.group - c;
          strip_sums<BITS>(s, begin, begin + t.group, static_cast<int>(height), false, group_sums);
          scale_sums<BITS>(group_sums, real, start + g, t.lds, t.scales + g * NR, g > 0, out);
        }
      }
    }
    return true;
  }

  static double peak_burst(int64_t iterations) {
    configure(32);
    clear();
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t n = 0; n < iterations / 8; ++n) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    }
    rest();
    return static_cast<double>(iterations / 8) * 4 * 2 * 16 * 16 * 64;
  }
};

}  // namespace

#include "library.h"
