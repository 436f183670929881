// SPDX-License-Identifier: Apache-2.0
// A layer call: quantize the tokens, then tiles of (rows x one panel), each finished in place with
// scale, bias, activation, second product, gate and residual. The tile itself is the Isa's.
#pragma once
#include "pool.h"
#include "quantize.h"

namespace {

// What a tile needs. out: (rows, NR) = sum over groups of float(exact integer sum) * scale.
struct Tile {
  const int8_t* x;
  int64_t ldx;
  const int32_t* sums;  // [row][group], negative: times the operand's offset they start the sums
  const uint8_t* panel;
  const float* scales;  // [group][NR]
  int64_t groups, group;
  float* out;
};

// Scratch that all threads share; grows, never shrinks.
struct Workspace {
  int8_t* q = nullptr;
  float* scale = nullptr;
  int32_t* sums = nullptr;
  float* floats = nullptr;  // rows for 16-bit parts, else one row per thread
  float* keys = nullptr;    // attention: rotated keys, transposed
  int64_t q_size = 0, scale_size = 0, sums_size = 0, floats_size = 0, keys_size = 0;

  template <class T>
  static bool grow(T*& memory, int64_t& size, int64_t wanted) {
    if (wanted <= size) return true;
    std::free(memory);
    memory = static_cast<T*>(aligned(wanted * static_cast<int64_t>(sizeof(T))));
    size = memory ? wanted : 0;
    return memory != nullptr;
  }
};

template <class Isa>
void wide_tile(const qv_layer& layer, const Part& part, int64_t panel, const float* x,
               int64_t ldx, int rows, float* out) {
  const uint16_t* w =
      reinterpret_cast<const uint16_t*>(part.data) + panel * layer.k * Isa::NR;
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * Isa::NR));
  for (int64_t k = 0; k < layer.k; ++k) {
    float wide[Isa::NR];
    for (int j = 0; j < Isa::NR; ++j) wide[j] = from_bf16(w[k * Isa::NR + j]);
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < Isa::NR; ++j) out[i * Isa::NR + j] += x[i * ldx + k] * wide[j];
  }
}

template <class Isa, int BITS>
void integer_tile(const Tile& tile, int rows) {
  constexpr int FIELDS = 8 / BITS;
  switch (rows) {
    case 1: return Isa::template tile<1, FIELDS>(tile);
    case 2: return Isa::template tile<2, FIELDS>(tile);
    case 3: return Isa::template tile<3, FIELDS>(tile);
    case 4: return Isa::template tile<4, FIELDS>(tile);
    case 5:
      if constexpr (Isa::MR >= 5) return Isa::template tile<5, FIELDS>(tile);
      break;
    case 6:
      if constexpr (Isa::MR >= 6) return Isa::template tile<6, FIELDS>(tile);
      break;
  }
}

// One call in flight: what the threads share.
template <class Isa>
struct Run {
  const qv_call& call;
  const qv_layer& layer;
  Workspace& work;
  int64_t depth;

  int8_t* q(int64_t row) const { return work.q + row * depth; }

  void product_tile(const Part& part, int64_t panel, int64_t row, int rows, float* out) const {
    if (part.bits == 0) {
      std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * Isa::NR));
      return;
    }
    if (part.bits == 16) {
      wide_tile<Isa>(layer, part, panel, work.floats + row * depth, depth, rows, out);
      return;
    }
    const Tile tile{q(row),
                    depth,
                    work.sums + row * layer.groups,
                    part.data + panel * Isa::NR * part.depth * part.bits / 8,
                    part.scales + panel * part.groups * Isa::NR,
                    part.groups,
                    part.group,
                    out};
    if (part.bits == 4)
      integer_tile<Isa, 4>(tile, rows);
    else if (part.bits == 8)
      integer_tile<Isa, 8>(tile, rows);
    else
      integer_tile<Isa, 2>(tile, rows);
  }

  // Scale and bias one row of a tile. 16-bit parts carry no activation scale, but a token that is
  // not finite must be NaN in all its outputs: 0 * NaN brings it in.
  void scale_row(const Part& part, const float* bias, float scale, float* out) const {
    const bool integers = part.bits == 2 || part.bits == 4 || part.bits == 8;
    const Floats s = splat(integers ? scale : 1.0f);
    const Floats poison = splat(integers ? 0.0f : 0.0f * scale);
    for (int j = 0; j < Isa::NR; j += VL) {
      Floats v = load(out + j) * s + poison;
      if (bias) v += load(bias + j);
      store(out + j, v);
    }
  }

  void activate(float* out) const {
    if (layer.activation == QV_SILU)
      for (int j = 0; j < Isa::NR; j += VL) store(out + j, silu(load(out + j)));
    else if (layer.activation == QV_GELU_TANH)
      for (int j = 0; j < Isa::NR; j += VL) store(out + j, gelu_tanh(load(out + j)));
  }

  float residual_at(int64_t at) const {
    if (call.dtype == QV_F32) return static_cast<const float*>(call.residual)[at];
    const uint16_t half = static_cast<const uint16_t*>(call.residual)[at];
    return call.dtype == QV_BF16 ? from_bf16(half) : from_f16(half);
  }

  void write_any(const Part& part, int64_t panel, int64_t row, const float* out) const {
    const int32_t* map = layer.product[0].column;
    const int64_t first = panel * Isa::NR;
    const int64_t count = part.rows - first < Isa::NR ? part.rows - first : Isa::NR;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t stored = part.first + first + j;
      const int64_t column = map ? map[stored] : stored;
      const int64_t at = row * call.ldy + column;
      float v = out[j];
      if (call.gate) v *= call.gate[column];
      if (call.residual) v += residual_at(at);
      if (call.dtype == QV_F32)
        static_cast<float*>(call.y)[at] = v;
      else
        static_cast<uint16_t*>(call.y)[at] = call.dtype == QV_BF16 ? to_bf16(v) : to_f16(v);
    }
  }

  void write_row(const Part& part, int64_t panel, int64_t row, const float* out) const {
    const bool whole = (panel + 1) * Isa::NR <= part.rows;
    if (!whole || call.dtype != QV_F32 || layer.product[0].column) {
      write_any(part, panel, row, out);
      return;
    }
    const int64_t column = part.first + panel * Isa::NR;
    float* y = static_cast<float*>(call.y) + row * call.ldy + column;
    const float* residual =
        call.residual ? static_cast<const float*>(call.residual) + row * call.ldy + column : nullptr;
    for (int j = 0; j < Isa::NR; j += VL) {
      Floats v = load(out + j);
      if (call.gate) v *= load(call.gate + column + j);
      if (residual) v += load(residual + j);
      store(y + j, v);
    }
  }

  // Ask for the lines of y now, so that they are here when the sums are done.
  void fetch_output(int64_t stored, int64_t row, int rows) const {
    if (call.dtype != QV_F32 || layer.product[0].column) return;
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < Isa::NR; j += 16)
        __builtin_prefetch(static_cast<const float*>(call.y) + (row + i) * call.ldy + stored + j,
                           1, 3);
  }

  void tile(int64_t part_index, int64_t panel, int64_t row, int rows) const {
    alignas(64) float out[Isa::MR * Isa::NR];
    alignas(64) float second[Isa::MR * Isa::NR];
    const Product& main = layer.product[0];
    const Part& part = main.part[part_index];
    const int64_t at = part.first + panel * Isa::NR;
    fetch_output(at, row, rows);
    product_tile(part, panel, row, rows, out);
    if (layer.gated) product_tile(layer.product[1].part[0], panel, row, rows, second);
    for (int i = 0; i < rows; ++i) {
      float* line = out + i * Isa::NR;
      scale_row(part, main.bias ? main.bias + at : nullptr, work.scale[row + i], line);
      activate(line);
      if (layer.gated) {
        const Product& up = layer.product[1];
        float* other = second + i * Isa::NR;
        scale_row(up.part[0], up.bias ? up.bias + at : nullptr, work.scale[row + i], other);
        for (int j = 0; j < Isa::NR; j += VL) store(line + j, load(line + j) * load(other + j));
      }
      write_row(part, panel, row + i, line);
    }
  }

  // All rows of a block against one panel, in tiles of nearly equal height.
  void strip(int64_t part_index, int64_t panel, int64_t begin, int64_t end) const {
    const int64_t tiles = (end - begin + Isa::MR - 1) / Isa::MR;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = begin + (end - begin) * t / tiles;
      const int64_t next = begin + (end - begin) * (t + 1) / tiles;
      tile(part_index, panel, row, static_cast<int>(next - row));
    }
  }

  // Rows of a block: their integers stay in the second-level cache while the panels pass by.
  int64_t block_rows() const {
    const int64_t fit = 256 * 1024 / depth / Isa::MR * Isa::MR;
    return fit < 2 * Isa::MR ? 2 * Isa::MR : fit;
  }

  void quantize(Worker& worker) const {
    const int64_t step = call.rows < 4 * worker.count ? 1 : 4;
    float* scratch = work.floats + (layer.wide ? 0 : worker.id * depth);
    for (int64_t row = worker.take(step); row < call.rows; row = worker.take(step))
      for (int64_t r = row; r < row + step && r < call.rows; ++r) {
        const Token token{&call, &layer,     depth,
                          layer.wide ? scratch + r * depth : scratch,
                          q(r),  work.sums + r * layer.groups, work.scale + r};
        quantize_token<Isa>(token, r);
      }
  }

  void multiply(Worker& worker) const {
    const Product& main = layer.product[0];
    int64_t panels = 0;
    for (int i = 0; i < main.parts; ++i) panels += main.part[i].panels;
    const int64_t height = block_rows();
    const int64_t blocks = (call.rows + height - 1) / height;
    const int64_t total = blocks * panels;
    const int64_t step = worker.count == 1 ? total : 1 + total / (16 * worker.count);
    for (int64_t task = worker.take(step); task < total; task = worker.take(step))
      for (int64_t t = task; t < task + step && t < total; ++t) {
        int64_t panel = t % panels;
        int part = 0;
        while (panel >= main.part[part].panels) panel -= main.part[part++].panels;
        const int64_t block = t / panels;
        strip(part, panel, call.rows * block / blocks, call.rows * (block + 1) / blocks);
      }
  }
};

template <class Isa>
void run_linear(Worker& worker, const qv_call& call, Workspace& work) {
  const Run<Isa> run{call, *call.layer, work, round_up(call.layer->k, DEPTH_STEP)};
  run.quantize(worker);
  worker.barrier();
  run.multiply(worker);
  worker.barrier();
}

inline int32_t prepare_linear(const qv_call& call, Workspace& work, int threads) {
  if (!call.layer || call.rows < 0 || call.layer->product[0].stored != call.layer->n)
    return QV_SHAPE;
  const int64_t depth = round_up(call.layer->k, DEPTH_STEP);
  const int64_t groups = call.layer->groups ? call.layer->groups : 1;
  if (call.rows > (int64_t{1} << 40) / (depth > call.layer->n ? depth : call.layer->n))
    return QV_SIZE;
  const int64_t lines = call.layer->wide ? call.rows : threads;
  const bool ok = Workspace::grow(work.q, work.q_size, call.rows * depth) &&
                  Workspace::grow(work.scale, work.scale_size, call.rows) &&
                  Workspace::grow(work.sums, work.sums_size, call.rows * groups) &&
                  Workspace::grow(work.floats, work.floats_size, lines * depth);
  return ok ? QV_OK : QV_MEMORY;
}

}  // namespace
