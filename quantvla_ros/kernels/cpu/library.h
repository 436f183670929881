// SPDX-License-Identifier: Apache-2.0
// The C functions of one library. Included last by the file of each instruction set, with
// its Isa: { NR, MR, KK, W8_OFFSET, PIECE, NAME, ready, rest, round_chunk, block, tile, peak_burst }.
// PIECE: columns of a panel that several tiles share at a time; 0 for all.
#pragma once
#include <chrono>

#include "attention.h"

namespace {

inline Workspace& workspace() {
  static Workspace* made = new Workspace;  // guarded by the pool's turn
  return *made;
}

// A program as phases: two for each call, quantize and multiply, gather and attend, or measure and
// normalize.
struct Program {
  const qv_call* calls;
  Workspace& work;
  int threads;

  Run<Isa> linear(const qv_call& call) const { return {call, *call.layer, work, threads}; }

  int64_t tasks(int64_t phase) const {
    const int64_t index = phase / 2;
    const qv_call& call = calls[index];
    const bool first = phase % 2 == 0;
    if (call.kind == QV_LINEAR) {
      if (call.rows == 0) return 0;
      if (first) {
        const bool there = index > 0 && same_tokens(calls[index - 1], call);
        return there ? 0 : linear(call).quantize_tasks();
      }
      if (call.layer->watched) observe(call, work);
      return linear(call).multiply_tasks();
    }
    if (call.kind == QV_GROUP_NORM) return GroupNorm{call, work.keys}.tasks();
    if (first) return call.kind == QV_ATTENTION && call.cells ? 0 : call.batch * call.kv_heads;
    return call.kind == QV_GATHER ? 0 : attention_of(call, work).tasks();
  }

  void run(int64_t phase, int64_t task, int worker) const {
    const qv_call& call = calls[phase / 2];
    const bool first = phase % 2 == 0;
    if (call.kind == QV_LINEAR) {
      if (first)
        linear(call).quantize(task, worker);
      else
        linear(call).multiply(task);
      return;
    }
    if (call.kind == QV_GROUP_NORM) {
      const GroupNorm norm{call, work.keys};
      if (first)
        norm.measure(task);
      else
        norm.apply(task);
      return;
    }
    const Attention attention = attention_of(call, work);
    if (first)
      attention.gather(task);
    else
      attention.attend(task, work.floats + worker * attention_scratch(attention));
  }
};

inline int32_t prepare(const qv_call& call, Workspace& work, int threads) {
  if (call.kind == QV_LINEAR) return prepare_linear(call, work, threads);
  if (call.kind != QV_GROUP_NORM) return prepare_attention(call, work, threads);
  if (!GroupNorm::fits(call)) return QV_SHAPE;
  const bool ok = Workspace::grow(work.keys, work.keys_size, GroupNorm::room(call));
  return ok ? QV_OK : QV_MEMORY;
}

inline int64_t tasks_of(void* context, int64_t phase) {
  return static_cast<const Program*>(context)->tasks(phase);
}

inline void run_task(void* context, int64_t phase, int64_t task, int worker) {
  static_cast<const Program*>(context)->run(phase, task, worker);
}

}  // namespace

qv_layer* qv_layer_new(int64_t n, int64_t k, int32_t act_bits, int32_t hadamard,
                       int32_t activation) {
  const bool fits = n >= 1 && n <= MAX_N && k >= 1 && k <= MAX_K;
  if (!fits || (act_bits != 8 && act_bits != 4 && act_bits != 3)) return nullptr;
  if ((hadamard != 0 && hadamard != 64) || (hadamard && k % hadamard)) return nullptr;
  qv_layer* layer = new (std::nothrow) qv_layer;
  if (!layer) return nullptr;
  layer->n = n;
  layer->k = k;
  layer->act_bits = act_bits;
  layer->hadamard = hadamard;
  layer->activation = activation;
  return layer;
}

int32_t qv_layer_part(qv_layer* layer, int32_t which, int32_t bits, int64_t rows, int64_t group,
                      const void* data, const float* scales) {
  if (!layer || which < 0 || which > 1) return QV_SHAPE;
  if (bits != 0 && bits != 2 && bits != 4 && bits != 8 && bits != 16) return QV_SHAPE;
  return add_part<Isa>(*layer, which, bits, rows, group, data, scales);
}

int32_t qv_layer_finish(qv_layer* layer, int32_t which, const int64_t* order, const float* bias) {
  if (!layer->groups) layer->groups = 1;
  return finish_product<Isa>(*layer, which, order, bias);
}

int32_t qv_layer_diagonal(qv_layer* layer, const float* multipliers) {
  if (layer->diagonal) return QV_SHAPE;
  layer->diagonal = static_cast<float*>(aligned(layer->k * 4));
  if (!layer->diagonal) return QV_MEMORY;
  std::memcpy(layer->diagonal, multipliers, static_cast<size_t>(layer->k) * 4);
  layer->bytes += layer->k * 4;
  return QV_OK;
}

void qv_layer_watch(qv_layer* layer) {
  std::lock_guard<std::mutex> lock(pool().turn);
  layer->watched = true;
}

void qv_layer_seen(qv_layer* layer, double* five) {
  std::lock_guard<std::mutex> lock(pool().turn);
  const Seen seen = layer->seen;
  layer->seen = Seen{};
  five[0] = seen.tokens;
  five[1] = seen.sum;
  five[2] = seen.largest;
  five[3] = seen.broken;
  five[4] = seen.clipped;
}

int64_t qv_layer_bytes(const qv_layer* layer) { return layer->bytes; }

void qv_layer_free(qv_layer* layer) {
  if (layer) free_layer(layer);
}

int32_t qv_run(const qv_call* calls, int64_t count) {
  Pool& threads = pool();
  std::lock_guard<std::mutex> lock(threads.turn);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t status = prepare(calls[i], workspace(), threads.threads());
    if (status) return status;
  }
  Program program{calls, workspace(), threads.threads()};
  threads.run({&program, 2 * count, tasks_of, run_task, Isa::rest});
  return QV_OK;
}

int32_t qv_linear(const qv_layer* layer, int64_t rows, const void* x, void* y, int32_t dtype,
                  float act_scale, const float* gate, const void* residual) {
  qv_call call{};
  call.kind = QV_LINEAR;
  call.dtype = dtype;
  call.layer = layer;
  call.rows = rows;
  call.x = x;
  call.ldx = layer->k;
  call.y = y;
  call.ldy = layer->n;
  call.residual = residual;
  call.gate = gate;
  call.act_scale = act_scale;
  return qv_run(&call, 1);
}

int64_t qv_cells(int64_t keys, int32_t batch, int32_t kv_heads, int32_t head_dim) {
  return 2 * round_up(keys, 2 * VL) * head_dim * batch * kv_heads;
}

int64_t qv_call_bytes() { return sizeof(qv_call); }
int32_t qv_ready() { return Isa::ready(); }

int32_t qv_set_threads(int32_t count) {
  if (count < 1 || count > 1024) return QV_SIZE;
  if (count != pool().threads()) pool().resize(count);
  return QV_OK;
}

int32_t qv_threads() { return pool().threads(); }

const char* qv_name() { return Isa::NAME; }

double qv_peak() {
  double best = 0;
  for (int i = 0; i < 40; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    const double done = Isa::peak_burst(20000);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (done / took.count() > best) best = done / took.count();
  }
  return best;
}

double qv_read_rate(const void* memory, int64_t bytes) {
  const float* from = static_cast<const float*>(memory);
  const int64_t count = bytes / 4 / (8 * VL) * (8 * VL);
  double best = 0;
  for (int i = 0; i < 20; ++i) {
    Ints seen[8] = {};
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t at = 0; at < count; at += 8 * VL)
      for (int v = 0; v < 8; ++v) seen[v] |= bits_of(load(from + at + v * VL));
    for (Ints& lane : seen) asm volatile("" : "+m"(lane));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    if (count * 4 / took.count() > best) best = count * 4 / took.count();
  }
  return best;
}
