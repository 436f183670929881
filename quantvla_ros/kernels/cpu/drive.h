// SPDX-License-Identifier: Apache-2.0
// A layer call as two phases: quantize the tokens, then blocks of tokens against panels of W, each
// finished at once with scale, bias, activation, second product, factor, gate and residual.
#pragma once
#include "block.h"
#include "pool.h"

namespace {

// Scratch that all threads share; grows, never shrinks.
struct Workspace {
  int8_t* q = nullptr;
  float* scale = nullptr;
  float* amax = nullptr;
  int32_t* sums = nullptr;
  float* floats = nullptr;  // rows for 16-bit parts, else one row per thread
  float* keys = nullptr;    // attention: rotated keys, transposed; group norm: sums
  int64_t q_size = 0, scale_size = 0, amax_size = 0, sums_size = 0, floats_size = 0, keys_size = 0;

  template <class T>
  static bool grow(T*& memory, int64_t& size, int64_t wanted) {
    if (wanted <= size) return true;
    std::free(memory);
    memory = static_cast<T*>(aligned(wanted * static_cast<int64_t>(sizeof(T))));
    size = memory ? wanted : 0;
    return memory != nullptr;
  }
};

// Bytes from one quantized token to the next. A power of two would send the same columns of all
// tokens to the same few sets of the first-level cache.
inline int64_t distance_of(int64_t k) {
  const int64_t depth = round_up(k, DEPTH_STEP);
  return depth % 512 ? depth : depth + DEPTH_STEP;
}

// ROWS tokens against VL columns of rows that are kept at bfloat16: the sums of one token would
// wait for each other.
template <class Isa, int ROWS>
inline void wide_tile(const uint16_t* w, int64_t k, const float* x, int64_t ldx, float* out) {
  Floats sum[ROWS] = {};
  for (int64_t c = 0; c < k; ++c) {
    const Floats weight = load_bf16(w + c * Isa::NR);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) sum[i] += weight * x[i * ldx + c];
  }
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i) store(out + i * Isa::NR, sum[i]);
}

template <class Isa>
void wide_block(const qv_layer& layer, const Part& part, int64_t panel, const float* x,
                int64_t ldx, int64_t rows, float* out) {
  const uint16_t* w =
      reinterpret_cast<const uint16_t*>(part.data) + panel * layer.k * Isa::NR;
  const int64_t left = part.rows - panel * Isa::NR;
  for (int64_t j = 0; j < Isa::NR; j += VL) {
    const bool read = j < left;  // behind the last row of W nothing is asked for
    for (int64_t i = 0; i < rows; ++i) {
      float* to = out + i * Isa::NR + j;
      if (!read) {
        store(to, Floats{});
      } else if (i + 4 <= rows) {
        wide_tile<Isa, 4>(w + j, layer.k, x + i * ldx, ldx, to);
        i += 3;
      } else {
        wide_tile<Isa, 1>(w + j, layer.k, x + i * ldx, ldx, to);
      }
    }
  }
}

// One call in flight: what the threads share.
template <class Isa>
struct Run {
  const qv_call& call;
  const qv_layer& layer;
  Workspace& work;
  int threads;
  int64_t depth = round_up(layer.k, DEPTH_STEP);
  int64_t distance = distance_of(layer.k);

  void product(const Part& part, int64_t panel, int64_t row, int64_t rows, float* out) const {
    if (part.bits == 0) {
      std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * Isa::NR));
      return;
    }
    if (part.bits == 16) {
      wide_block<Isa>(layer, part, panel, work.floats + row * depth, depth, rows, out);
      return;
    }
    const Tile tile{work.q + row * distance,
                    distance,
                    work.sums + row * layer.groups,
                    layer.groups,
                    part.data + panel * Isa::NR * part.depth * part.bits / 8,
                    part.scales + panel * part.groups * Isa::NR,
                    part.groups,
                    part.group,
                    out,
                    nullptr,
                    false,
                    false,
                    false};
    if (part.bits == 4)
      multiply_block<Isa, 4>(tile, rows);
    else if (part.bits == 8)
      multiply_block<Isa, 8>(tile, rows);
    else
      multiply_block<Isa, 2>(tile, rows);
  }

  // Scale and bias of one row. 16-bit parts carry no activation scale, but a token that is not
  // finite must be NaN in all its outputs: 0 * NaN brings it in.
  struct Affine {
    Floats scale, poison;
    const float* bias;
    Floats operator()(const float* out, int j) const {
      Floats v = load(out + j) * scale + poison;
      if (bias) v += load(bias + j);
      return v;
    }
  };

  Affine affine(const Product& product, const Part& part, int64_t panel, int64_t row) const {
    const bool integers = part.bits == 2 || part.bits == 4 || part.bits == 8;
    const float scale = work.scale[row];
    const float* bias = product.bias ? product.bias + part.first + panel * Isa::NR : nullptr;
    return {splat(integers ? scale : 1.0f), splat(integers ? 0.0f : 0.0f * scale), bias};
  }

  Floats activate(Floats v) const {
    if (layer.activation == QV_SILU) return silu(v);
    return layer.activation == QV_GELU_TANH ? gelu_tanh(v) : v;
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
      if (call.factor) v *= call.factor[at];
      if (call.gate) v *= call.gate[column];
      if (call.residual) v += residual_at(at);
      if (call.dtype == QV_F32)
        static_cast<float*>(call.y)[at] = v;
      else
        static_cast<uint16_t*>(call.y)[at] = call.dtype == QV_BF16 ? to_bf16(v) : to_f16(v);
    }
  }

  // One vector of a whole panel of float32: nothing is read twice.
  void write_vector(int64_t at, int64_t column, Floats v) const {
    if (call.factor) v *= load(call.factor + at);
    if (call.gate) v *= load(call.gate + column);
    if (call.residual) v += load(static_cast<const float*>(call.residual) + at);
    store(static_cast<float*>(call.y) + at, v);
  }

  void finish_row(const Part& part, int64_t panel, int64_t row, float* out, float* second) const {
    const Affine main = affine(layer.product[0], part, panel, row);
    const Affine up = layer.gated ? affine(layer.product[1], layer.product[1].part[0], panel, row)
                                  : main;
    const bool whole = (panel + 1) * Isa::NR <= part.rows && call.dtype == QV_F32 &&
                       !layer.product[0].column;
    const int64_t column = part.first + panel * Isa::NR;
    for (int j = 0; j < Isa::NR; j += VL) {
      Floats v = activate(main(out, j));
      if (layer.gated) v *= up(second, j);
      if (whole)
        write_vector(row * call.ldy + column + j, column + j, v);
      else
        store(out + j, v);
    }
    if (!whole) write_any(part, panel, row, out);
  }

  // Ask for the lines of y now, so that they are here when the sums are done.
  void fetch_output(int64_t stored, int64_t row, int64_t rows) const {
    if (call.dtype != QV_F32 || layer.product[0].column) return;
    for (int64_t i = 0; i < rows; ++i)
      for (int j = 0; j < Isa::NR; j += 16)
        __builtin_prefetch(static_cast<const float*>(call.y) + (row + i) * call.ldy + stored + j,
                           1, 3);
  }

  void block(int64_t part_index, int64_t panel, int64_t row, int64_t rows) const {
    constexpr int64_t ROOM = (BLOCK_ROWS + PAD_ROWS) * Isa::NR;
    alignas(64) float out[ROOM], second[ROOM];
    const Part& part = layer.product[0].part[part_index];
    fetch_output(part.first + panel * Isa::NR, row, rows);
    product(part, panel, row, rows, out);
    if (layer.gated) product(layer.product[1].part[0], panel, row, rows, second);
    for (int64_t i = 0; i < rows; ++i)
      finish_row(part, panel, row + i, out + i * Isa::NR, second + i * Isa::NR);
  }

  // -- the two phases --------------------------------------------------------------------------

  int64_t quantize_step() const {
    if (threads == 1) return call.rows;
    return call.rows < 4 * threads ? 1 : 4 + call.rows / (32 * threads);
  }
  int64_t quantize_tasks() const { return (call.rows + quantize_step() - 1) / quantize_step(); }

  void quantize(int64_t task, int worker) const {
    const int64_t step = quantize_step(), end = (task + 1) * step;
    float* scratch = work.floats + (layer.wide ? 0 : worker * depth);
    for (int64_t row = task * step; row < end && row < call.rows; ++row) {
      const Token token{&call, &layer, distance, layer.wide ? scratch + row * depth : scratch,
                        work.q + row * distance, work.sums + row * layer.groups,
                        work.scale + row, work.amax + row};
      quantize_token<Isa>(token, row);
    }
  }

  int64_t panels() const {
    int64_t total = 0;
    const Product& main = layer.product[0];
    for (int i = 0; i < main.parts; ++i) total += main.part[i].panels;
    return total;
  }

  // Rows of a block: their integers stay in the second-level cache while the panels pass by. As
  // many blocks for each thread as for the others, so that a thread keeps its rows.
  int64_t blocks() const {
    const int64_t fit = 512 * 1024 / depth / Isa::MR * Isa::MR;
    const int64_t least = 2 * Isa::MR, most = Isa::MOST_ROWS;
    const int64_t height = fit < least ? least : fit > most ? most : fit;
    const int64_t count = (call.rows + height - 1) / height;
    const int64_t even = round_up(count, threads);
    return count > 1 && call.rows / even >= 32 ? even : count;
  }

  // Several small tasks are taken at once; one thread takes everything.
  int64_t multiply_step() const {
    const int64_t total = blocks() * panels();
    return threads == 1 ? total : 1 + total / (16 * threads);
  }
  int64_t multiply_tasks() const {
    const int64_t step = multiply_step();
    return (blocks() * panels() + step - 1) / step;
  }

  void multiply(int64_t task) const {
    const Product& main = layer.product[0];
    const int64_t width = panels(), height = blocks(), step = multiply_step();
    for (int64_t t = task * step; t < (task + 1) * step && t < width * height; ++t) {
      int64_t panel = t % width;
      int part = 0;
      while (panel >= main.part[part].panels) panel -= main.part[part++].panels;
      const int64_t row = call.rows * (t / width) / height;
      block(part, panel, row, call.rows * (t / width + 1) / height - row);
    }
  }
};

// Whether the tokens that `before` quantized are those that `call` asks for.
inline bool same_tokens(const qv_call& before, const qv_call& call) {
  if (before.kind != QV_LINEAR || call.kind != QV_LINEAR || before.window || call.window)
    return false;
  const qv_layer &a = *before.layer, &b = *call.layer;
  const char* x = static_cast<const char*>(call.x);
  const char* y = static_cast<const char*>(before.y);
  const int64_t size = call.dtype == QV_F32 ? 4 : 2;
  const bool untouched = y >= x + ((call.rows - 1) * call.ldx + b.k) * size ||
                         y + ((before.rows - 1) * before.ldy + a.n) * size <= x;
  const bool alike = before.x == call.x && before.rows == call.rows && before.ldx == call.ldx &&
                     before.dtype == call.dtype && before.act_scale == call.act_scale &&
                     before.norm_eps == call.norm_eps && before.norm_add == call.norm_add &&
                     before.norm_multiply == call.norm_multiply;
  if (!alike || !untouched || a.k != b.k || a.act_bits != b.act_bits || a.groups != b.groups ||
      a.hadamard != b.hadamard || a.wide != b.wide || !a.diagonal != !b.diagonal)
    return false;
  return !a.diagonal || !std::memcmp(a.diagonal, b.diagonal, static_cast<size_t>(a.k) * 4);
}

// The tokens of a call are quantized: count what a watched layer sees.
inline void observe(const qv_call& call, const Workspace& work) {
  Seen& seen = call.layer->seen;
  const float reach = call.act_scale * top_of(*call.layer);
  for (int64_t i = 0; i < call.rows; ++i) {
    if (work.scale[i] != work.scale[i]) {
      seen.broken += 1;
      continue;
    }
    const double amax = work.amax[i];
    seen.tokens += 1;
    seen.sum += amax;
    seen.largest = amax > seen.largest ? amax : seen.largest;
    seen.clipped += call.act_scale != 0.0f && work.amax[i] > reach;
  }
}

inline int32_t prepare_linear(const qv_call& call, Workspace& work, int threads) {
  if (!call.layer || call.rows < 0 || call.layer->product[0].stored != call.layer->n)
    return QV_SHAPE;
  const int64_t depth = round_up(call.layer->k, DEPTH_STEP);
  const int64_t groups = call.layer->groups ? call.layer->groups : 1;
  if (call.rows > (int64_t{1} << 40) / (depth > call.layer->n ? depth : call.layer->n) ||
      call.rows > int64_t{1} << 30)
    return QV_SIZE;
  if (call.window && !windows_fit(call)) return QV_SHAPE;
  const int64_t lines = call.layer->wide ? call.rows : threads;
  const int64_t bytes = (call.rows + PAD_ROWS) * distance_of(call.layer->k);
  const bool ok = Workspace::grow(work.q, work.q_size, bytes) &&
                  Workspace::grow(work.scale, work.scale_size, call.rows) &&
                  Workspace::grow(work.amax, work.amax_size, call.rows) &&
                  Workspace::grow(work.sums, work.sums_size, call.rows * groups) &&
                  Workspace::grow(work.floats, work.floats_size, lines * depth);
  return ok ? QV_OK : QV_MEMORY;
}

}  // namespace
