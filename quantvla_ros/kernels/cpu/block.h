// SPDX-License-Identifier: Apache-2.0
// All tokens of a block against one panel of W, in tiles that stay in registers. The tile itself
// is the Isa's.
#pragma once
#include "quantize.h"

namespace {

constexpr int64_t BLOCK_ROWS = 96;  // most tokens of a block: their sums stay in near caches
constexpr int64_t PAD_ROWS = 32;    // rows behind the last token that a tile may compute and drop

// What a tile needs. out: (rows, NR) = sum over groups of float(exact integer sum) * scale.
struct Tile {
  const int8_t* x;
  int64_t ldx;
  const int32_t* sums;  // [row][lds], negative: times the operand's offset they start the sums
  int64_t lds;
  const uint8_t* panel;
  const float* scales;  // [group][NR]
  int64_t groups, group;
  float* out;
  const uint8_t* ahead;      // bytes of the panel that are wanted next, or null
  bool add;                  // out holds the sum of earlier groups
  bool carry_in, carry_out;  // out holds integers: the columns before, for the columns behind
};

// What most instruction sets have in common.
struct Common {
  static constexpr int64_t PIECE = 0;        // columns of a panel that several tiles share; 0: all
  static constexpr bool OWN_BLOCKS = false;  // whether Isa::block replaces the tiles
  static constexpr int64_t MOST_ROWS = BLOCK_ROWS;
  static int32_t ready() { return 1; }
  static void rest() {}
};

template <class Isa, int FIELDS, int BITS>
void integer_tile(const Tile& tile, int rows) {
  switch (rows) {
    case 1: return Isa::template tile<1, FIELDS, BITS>(tile);
    case 2: return Isa::template tile<2, FIELDS, BITS>(tile);
    case 3: return Isa::template tile<3, FIELDS, BITS>(tile);
    case 4: return Isa::template tile<4, FIELDS, BITS>(tile);
    case 5:
      if constexpr (Isa::MR >= 5) return Isa::template tile<5, FIELDS, BITS>(tile);
      break;
    case 6:
      if constexpr (Isa::MR >= 6) return Isa::template tile<6, FIELDS, BITS>(tile);
      break;
  }
}

// The tiles of a block, of nearly equal height.
template <class Isa, int FIELDS, int BITS>
void tiles(const Tile& whole, int64_t rows) {
  const int64_t count = (rows + Isa::MR - 1) / Isa::MR;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t row = rows * t / count, next = rows * (t + 1) / count;
    Tile tile = whole;
    tile.x += row * tile.ldx;
    tile.sums += row * tile.lds;
    tile.out += row * Isa::NR;
    // Each tile asks for its share, one line in each of its steps.
    if (whole.ahead) tile.ahead += t * (whole.groups * whole.group / Isa::KK) * 64;
    integer_tile<Isa, FIELDS, BITS>(tile, static_cast<int>(next - row));
  }
}

// Several tiles share a panel: cut it along the columns so that a piece stays in the first-level
// cache, and unpack narrow weights once for all tiles. Sums of a row's columns are carried from
// piece to piece as integers, so they stay exact.
template <class Isa, int BITS>
void pieces(const Tile& whole, int64_t rows) {
  alignas(64) uint8_t unpacked[BITS < 8 ? Isa::PIECE * Isa::NR : 64];
  const bool grouped = whole.groups > 1;
  const int64_t columns = whole.groups * whole.group;
  for (int64_t c = 0; c < columns; c += Isa::PIECE) {
    const int64_t count = columns - c < Isa::PIECE ? columns - c : Isa::PIECE;
    const uint8_t* panel = whole.panel + c * Isa::NR * BITS / 8;
    if constexpr (BITS < 8) Isa::template unpack<BITS>(panel, count, unpacked);
    Tile tile = whole;
    tile.x += c;
    tile.panel = BITS < 8 ? unpacked : panel;
    tile.ahead = panel + Isa::PIECE * Isa::NR * BITS / 8;
    if (grouped) {
      tile.sums += c / whole.group;
      tile.scales += c / whole.group * Isa::NR;
      tile.groups = count / whole.group;
      tile.add = c > 0;
    } else {
      tile.group = count;
      tile.carry_in = c > 0;
      tile.carry_out = c + count < columns;
    }
    tiles<Isa, 1, BITS>(tile, rows);
  }
}

template <class Isa, int BITS>
void multiply_block(const Tile& tile, int64_t rows) {
  if constexpr (Isa::OWN_BLOCKS) {
    if (Isa::template block<BITS>(tile, rows)) return;
  }
  if constexpr (Isa::PIECE > 0) {
    // One group that is longer than a row of 32 columns divides a piece, so pieces hold whole ones.
    if (rows > 2 * Isa::MR) return pieces<Isa, BITS>(tile, rows);
  }
  tiles<Isa, 8 / BITS, BITS>(tile, rows);
}

}  // namespace
