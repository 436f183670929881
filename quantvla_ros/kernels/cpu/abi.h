// SPDX-License-Identifier: Apache-2.0
// The C interface of every kernel library, and the only header that native.py mirrors.
// Pointers are checked by the caller once, at load or when a buffer is made; sizes are checked here.
#pragma once
#include <cstdint>

#define QV_API extern "C" __attribute__((visibility("default")))

enum qv_kind : int32_t { QV_LINEAR = 0, QV_ATTENTION = 1, QV_GATHER = 2, QV_GROUP_NORM = 3 };
enum qv_dtype : int32_t { QV_F32 = 0, QV_BF16 = 1, QV_F16 = 2 };
enum qv_activation : int32_t { QV_NONE = 0, QV_SILU = 1, QV_GELU_TANH = 2 };
enum qv_status : int32_t { QV_OK = 0, QV_MEMORY = 1, QV_SIZE = 2, QV_SHAPE = 3 };

struct qv_layer;

// One operation. A program is an array of them, run in order with one wake-up of the threads.
struct qv_call {
  int32_t kind;   // qv_kind
  int32_t dtype;  // of x, y and residual; attention is float32 only
  const qv_layer* layer;
  int64_t rows;     // tokens; for attention: queries of one batch entry
  const void* x;    // (rows, K), rows `ldx` elements apart; attention: queries
  int64_t ldx;
  void* y;  // (rows, N), rows `ldy` elements apart
  int64_t ldy;
  const float* factor;   // (rows, N) with the row distance of y, or null; may be y itself
  const void* residual;  // (rows, N) with the row distance of y, or null; may be y itself
  const float* gate;     // (N) or null
  const float* norm_multiply;  // (K) or null; read only when norm_eps > 0
  const float* norm_add;       // (K) or null
  float norm_eps;              // > 0: RMS norm of x before anything else
  float act_scale;             // 0: one dynamic scale per token
  // attention
  const float* k;  // (keys, kv_heads * head_dim), rows ldk apart
  const float* v;
  int64_t ldk, ldv, keys;
  const float* cos;  // (positions, head_dim / 2) or null: rotate queries and keys
  const float* sin;
  int32_t batch, heads, kv_heads, head_dim;
  float scale;
  float* cells;  // qv_cells() floats, aligned to 64 bytes: gather writes keys (turned, transposed)
                 // and values there; attention reads them from there, or gathers where it is null
  // A linear whose tokens are windows of a map: x (batch * height * width, K / window^2), a token
  // holds its window row by row, channels innermost, zero beyond the edge; float32 only. Group
  // norm of a map: x and y (rows, channels), batch entries of rows / batch, with norm_eps,
  // norm_multiply, norm_add, then the activation; y may be x.
  int32_t window;  // pixels along a side; 0: x holds the tokens themselves
  int32_t stride, pad, height, width;
  int32_t channels, groups, activation;
};

// A layer is made in steps: new, one part per width, finish; which = 0 main, 1 up (gated MLP).
QV_API qv_layer* qv_layer_new(int64_t n, int64_t k, int32_t act_bits, int32_t hadamard,
                              int32_t activation);
QV_API int32_t qv_layer_part(qv_layer* layer, int32_t which, int32_t bits, int64_t rows,
                             int64_t group, const void* data, const float* scales);
QV_API int32_t qv_layer_finish(qv_layer* layer, int32_t which, const int64_t* order,
                               const float* bias);
// K multipliers of the input, before the Hadamard; copied.
QV_API int32_t qv_layer_diagonal(qv_layer* layer, const float* multipliers);
QV_API int64_t qv_layer_bytes(const qv_layer* layer);
// From now on count what the tokens of a layer look like when they are quantized.
QV_API void qv_layer_watch(qv_layer* layer);
// Five numbers since the last call, which are then set back: finite tokens, sum of their largest
// magnitudes, the largest of these, tokens that were not finite, tokens clipped by a static scale.
QV_API void qv_layer_seen(qv_layer* layer, double* five);
QV_API void qv_layer_free(qv_layer* layer);

// Floats that the keys and values of an attention take once they are gathered.
QV_API int64_t qv_cells(int64_t keys, int32_t batch, int32_t kv_heads, int32_t head_dim);
QV_API int32_t qv_run(const qv_call* calls, int64_t count);
// The plain case of qv_run without filling a structure: contiguous x and y, no norm.
QV_API int32_t qv_linear(const qv_layer* layer, int64_t rows, const void* x, void* y,
                         int32_t dtype, float act_scale, const float* gate, const void* residual);

// Size of a qv_call: a library that was built from older sources says another.
QV_API int64_t qv_call_bytes();
// 1 where the system lets this process use the instructions of this path.
QV_API int32_t qv_ready();
QV_API int32_t qv_set_threads(int32_t count);
QV_API int32_t qv_threads();
QV_API const char* qv_name();
// Integer operations per second that this path's multiply-accumulate reaches in registers, best of
// several short runs on the calling thread.
QV_API double qv_peak();
// Bytes per second at which this thread reads `bytes` of memory again and again, best of several.
QV_API double qv_read_rate(const void* memory, int64_t bytes);
