// SPDX-License-Identifier: Apache-2.0
// A prepared layer: the canonical weight brought into panels for the machine's instructions.
//
// Panel: NR rows of W side by side, all their columns. A step of a panel is FIELDS * KK columns of
// each of its rows, stored [NR][KK] bytes; field f of byte j of row n is column step + f*KK + j.
// So one shift and one mask of a vector give the operand of one dot-product instruction.
//   bits 8: FIELDS 1, bits 4: FIELDS 2, bits 2: FIELDS 4; bits 16: [K][NR] bfloat16
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "abi.h"
#include "vec.h"

namespace {

constexpr int64_t DEPTH_STEP = 64;  // columns of an ungrouped panel are padded to this
constexpr int MAX_PARTS = 5;        // 16, 8, 4, 2 bits and pruned rows
constexpr int64_t MAX_K = 1 << 16;
constexpr int64_t MAX_N = 1 << 24;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Large blocks ask for large pages: one token reads a whole weight once, a page table entry per
// 4 KiB would be missed all along.
inline void* aligned(int64_t bytes) {
  constexpr int64_t LARGE = 2 << 20;
  void* memory = nullptr;
  const bool large = bytes >= LARGE;
  const auto size = static_cast<size_t>(round_up(bytes + 64, large ? LARGE : 64));
  if (posix_memalign(&memory, large ? LARGE : 64, size)) return nullptr;
  if (large) madvise(memory, size, MADV_HUGEPAGE);
  return memory;
}

struct Part {
  int bits;
  int64_t rows, first;    // stored rows first .. first + rows
  int64_t panels, depth;  // depth: columns of a panel, padded
  int64_t groups, group;  // group: columns that share a scale
  uint8_t* data;
  float* scales;  // [panel][group][NR]
};

struct Product {
  int parts = 0;
  Part part[MAX_PARTS];
  int64_t stored = 0;         // rows added so far
  int32_t* column = nullptr;  // stored row -> output column, or null where they are the same
  float* bias = nullptr;      // by stored row, padded to NR; null where there is none
};

}  // namespace

// What tokens looked like when they were quantized; see qv_layer_seen.
struct Seen {
  double tokens = 0, sum = 0, largest = 0, broken = 0, clipped = 0;
};

struct qv_layer {
  int64_t n, k;
  int32_t act_bits, hadamard, activation;
  float* diagonal = nullptr;  // (k) multipliers of the input, or null
  mutable Seen seen;          // written by the thread that begins a phase, read under the turn
  bool watched = false;
  Product product[2];
  bool gated = false;
  int64_t groups = 0;   // groups that the quantizer sums: 1 or k / group
  bool wide = false;    // some part has 16 bits and reads the floats
  int64_t bytes = 0;
};

namespace {

inline int canonical(const uint8_t* row, int bits, int64_t k) {
  if (bits == 8) return reinterpret_cast<const int8_t*>(row)[k];
  const int fields = 8 / bits;
  return (row[k / fields] >> (bits * (k % fields))) & ((1 << bits) - 1);
}

template <class Isa>
void fill_integers(Part& part, int64_t k, const uint8_t* source) {
  const int fields = 8 / part.bits;
  const int64_t step = fields * Isa::KK;
  const int64_t bytes = part.bits == 8 ? k : (k * part.bits + 7) / 8;
  const int add = part.bits == 8 ? Isa::W8_OFFSET : 0;  // narrower ones are stored unsigned
  const int64_t panel_bytes = part.depth / fields * Isa::NR;
  std::memset(part.data, 0, static_cast<size_t>(part.panels * panel_bytes));
  for (int64_t row = 0; row < part.rows; ++row) {
    uint8_t* panel = part.data + row / Isa::NR * panel_bytes + row % Isa::NR * Isa::KK;
    const uint8_t* from = source + row * bytes;
    for (int64_t c = 0; c < k; ++c) {
      const int64_t field = c % step / Isa::KK;
      uint8_t& to = panel[c / step * Isa::NR * Isa::KK + c % Isa::KK];
      to = static_cast<uint8_t>(to | ((canonical(from, part.bits, c) + add) & 0xff)
                                         << (part.bits * field));
    }
  }
}

template <class Isa>
void fill_wide(Part& part, int64_t k, const uint16_t* source) {
  uint16_t* data = reinterpret_cast<uint16_t*>(part.data);
  std::memset(data, 0, static_cast<size_t>(part.panels * k * Isa::NR * 2));
  for (int64_t row = 0; row < part.rows; ++row)
    for (int64_t c = 0; c < k; ++c)
      data[(row / Isa::NR * k + c) * Isa::NR + row % Isa::NR] = source[row * k + c];
}

template <class Isa>
void fill_scales(Part& part, const float* source) {
  for (int64_t panel = 0; panel < part.panels; ++panel)
    for (int64_t g = 0; g < part.groups; ++g)
      for (int64_t j = 0; j < Isa::NR; ++j) {
        const int64_t row = panel * Isa::NR + j;
        part.scales[(panel * part.groups + g) * Isa::NR + j] =
            row < part.rows ? source[row * part.groups + g] : 0.0f;
      }
}

template <class Isa>
int32_t add_part(qv_layer& layer, int which, int bits, int64_t rows, int64_t group,
                 const void* data, const float* scales) {
  Product& product = layer.product[which];
  if (rows < 1 || product.stored + rows > layer.n || product.parts == MAX_PARTS) return QV_SHAPE;
  if (group && (layer.k % group || group % (4 * Isa::KK) || group % 32)) return QV_SHAPE;
  Part part{};
  part.bits = bits;
  part.rows = rows;
  part.first = product.stored;
  part.panels = (rows + Isa::NR - 1) / Isa::NR;
  part.depth = bits == 16 || group ? layer.k : round_up(layer.k, DEPTH_STEP);
  part.group = group ? group : part.depth;
  part.groups = group ? layer.k / group : 1;
  if (bits) {
    const int64_t data_bytes = part.panels * Isa::NR * part.depth * bits / 8;
    const int64_t scale_bytes = bits == 16 ? 0 : part.panels * Isa::NR * part.groups * 4;
    part.data = static_cast<uint8_t*>(aligned(data_bytes));
    part.scales = static_cast<float*>(aligned(scale_bytes));
    if (!part.data || !part.scales) {
      std::free(part.data);
      std::free(part.scales);
      return QV_MEMORY;
    }
    layer.bytes += data_bytes + scale_bytes;
    if (bits == 16) {
      fill_wide<Isa>(part, layer.k, static_cast<const uint16_t*>(data));
      layer.wide = true;
    } else {
      if (layer.groups && layer.groups != part.groups) return QV_SHAPE;
      layer.groups = part.groups;
      fill_integers<Isa>(part, layer.k, static_cast<const uint8_t*>(data));
      fill_scales<Isa>(part, scales);
    }
  }
  product.part[product.parts++] = part;
  product.stored += rows;
  return QV_OK;
}

template <class Isa>
int32_t finish_product(qv_layer& layer, int which, const int64_t* order, const float* bias) {
  Product& product = layer.product[which];
  if (product.stored != layer.n) return QV_SHAPE;
  layer.gated = layer.gated || which == 1;
  if (order) {
    product.column = static_cast<int32_t*>(aligned(layer.n * 4));
    if (!product.column) return QV_MEMORY;
    for (int64_t i = 0; i < layer.n; ++i) product.column[i] = static_cast<int32_t>(order[i]);
  }
  if (bias) {
    const int64_t padded = round_up(layer.n, Isa::NR) + Isa::NR;
    product.bias = static_cast<float*>(aligned(padded * 4));
    if (!product.bias) return QV_MEMORY;
    std::memset(product.bias, 0, static_cast<size_t>(padded * 4));
    for (int64_t i = 0; i < layer.n; ++i) product.bias[i] = bias[order ? order[i] : i];
  }
  if (which == 1) {
    // A tile of each product is combined in registers' reach, so both must have the same cut.
    const Product& main = layer.product[0];
    if (main.parts != 1 || product.parts != 1 || main.column || product.column) return QV_SHAPE;
  }
  return QV_OK;
}

inline void free_layer(qv_layer* layer) {
  for (Product& product : layer->product) {
    for (int i = 0; i < product.parts; ++i) {
      std::free(product.part[i].data);
      std::free(product.part[i].scales);
    }
    std::free(product.column);
    std::free(product.bias);
  }
  std::free(layer->diagonal);
  delete layer;
}

}  // namespace
