// SPDX-License-Identifier: Apache-2.0
// The C functions of one library. Included last by the file of each instruction set, with
// its Isa: { NR, MR, KK, W8_OFFSET, NAME, round_chunk, tile, peak_burst }.
#pragma once
#include <chrono>

#include "attention.h"

namespace {

struct Program {
  const qv_call* calls;
  int64_t count;
};

inline Workspace& workspace() {
  static Workspace* made = new Workspace;  // guarded by the pool's turn
  return *made;
}

inline void run_program(Worker& worker, void* context) {
  const Program& program = *static_cast<const Program*>(context);
  for (int64_t i = 0; i < program.count; ++i) {
    const qv_call& call = program.calls[i];
    if (call.rows == 0) continue;
    if (call.kind == QV_LINEAR)
      run_linear<Isa>(worker, call, workspace());
    else
      run_attention(worker, call, workspace());
  }
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

int64_t qv_layer_bytes(const qv_layer* layer) { return layer->bytes; }

void qv_layer_free(qv_layer* layer) {
  if (layer) free_layer(layer);
}

int32_t qv_run(const qv_call* calls, int64_t count) {
  Pool& threads = pool();
  std::lock_guard<std::mutex> lock(threads.turn);
  for (int64_t i = 0; i < count; ++i) {
    const qv_call& call = calls[i];
    const int32_t status = call.kind == QV_LINEAR
                               ? prepare_linear(call, workspace(), threads.threads())
                               : prepare_attention(call, workspace(), threads.threads());
    if (status) return status;
  }
  Program program{calls, count};
  threads.run(run_program, &program);
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
