// SPDX-License-Identifier: Apache-2.0
// Runs generated layers, windows, group norms and attentions through one kernel path: cases on
// stdin, results on stdout. Linked with the path's source, so that it can be cross-compiled and run
// under emulation, or under sanitizers. Every buffer is allocated to its exact size: a byte read
// beyond it is an error that is seen.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "abi.h"

namespace {

enum Kind : int64_t { LAYER = 0, WINDOWS = 1, NORM = 2, ATTENTION = 3 };

struct Case {
  int64_t rows, n, k, bits, group, act_bits, hadamard, activation, gated, threads, dtype;
  int64_t data_bytes, scale_count, ordered, smoothed;
};

template <class T>
std::vector<T> read(int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (count && std::fread(values.data(), sizeof(T), values.size(), stdin) != values.size()) {
    std::fprintf(stderr, "the input ends early\n");
    std::exit(3);
  }
  return values;
}

void must(int32_t status, const char* what) {
  if (status) {
    std::fprintf(stderr, "%s: status %d\n", what, status);
    std::exit(4);
  }
}

void run(const Case& c) {
  const auto data = read<uint8_t>(c.data_bytes);
  const auto scales = read<float>(c.scale_count);
  const auto order = read<int64_t>(c.ordered ? c.n : 0);
  const auto bias = read<float>(c.n);
  const auto gate = read<float>(c.n);
  const auto diagonal = read<float>(c.smoothed ? c.k : 0);
  const int64_t size = c.dtype ? 2 : 4;
  const auto x = read<uint8_t>(c.rows * c.k * size);
  const auto residual = read<uint8_t>(c.rows * c.n * size);
  must(qv_set_threads(static_cast<int32_t>(c.threads)), "threads");
  qv_layer* layer = qv_layer_new(c.n, c.k, static_cast<int32_t>(c.act_bits),
                                 static_cast<int32_t>(c.hadamard),
                                 static_cast<int32_t>(c.activation));
  must(layer ? 0 : 5, "new");
  for (int32_t which = 0; which <= static_cast<int32_t>(c.gated); ++which) {
    must(qv_layer_part(layer, which, static_cast<int32_t>(c.bits), c.n, c.group, data.data(),
                       scales.data()),
         "part");
    must(qv_layer_finish(layer, which, c.ordered ? order.data() : nullptr, bias.data()), "finish");
  }
  if (c.smoothed) must(qv_layer_diagonal(layer, diagonal.data()), "diagonal");
  qv_layer_watch(layer);
  std::vector<uint8_t> y(static_cast<size_t>(c.rows * c.n * size), 0xff);
  must(qv_linear(layer, c.rows, x.data(), y.data(), static_cast<int32_t>(c.dtype), 0.0f,
                 gate.data(), residual.data()),
       "linear");
  double five[5];
  qv_layer_seen(layer, five);
  must(five[0] == static_cast<double>(c.rows) ? 0 : 6, "seen");
  std::fwrite(y.data(), 1, y.size(), stdout);
  qv_layer_free(layer);
}

// `loose`: elements between the end of a row and the next, of which the last row has none.
int64_t extent(int64_t rows, int64_t columns, int64_t loose) {
  return rows ? (rows - 1) * (columns + loose) + columns : 0;
}

void write(const std::vector<float>& y) { std::fwrite(y.data(), 4, y.size(), stdout); }

struct Windows {
  int64_t batch, height, width, channels, window, stride, pad, rows, n, bits, threads, loose;
  int64_t data_bytes, scale_count;
};

void run(const Windows& c) {
  const auto data = read<uint8_t>(c.data_bytes);
  const auto scales = read<float>(c.scale_count);
  const auto bias = read<float>(c.n);
  const auto x = read<float>(extent(c.batch * c.height * c.width, c.channels, c.loose));
  const auto residual = read<float>(c.rows * c.n);
  must(qv_set_threads(static_cast<int32_t>(c.threads)), "threads");
  qv_layer* layer = qv_layer_new(c.n, c.window * c.window * c.channels, 8, 0, QV_NONE);
  must(layer ? 0 : 5, "new");
  must(qv_layer_part(layer, 0, static_cast<int32_t>(c.bits), c.n, 0, data.data(), scales.data()),
       "part");
  must(qv_layer_finish(layer, 0, nullptr, bias.data()), "finish");
  std::vector<float> y(static_cast<size_t>(c.rows * c.n), -1.0f);
  qv_call call{};
  call.kind = QV_LINEAR;
  call.layer = layer;
  call.rows = c.rows;
  call.x = x.data();
  call.ldx = c.channels + c.loose;
  call.y = y.data();
  call.ldy = c.n;
  call.residual = residual.data();
  call.window = static_cast<int32_t>(c.window);
  call.stride = static_cast<int32_t>(c.stride);
  call.pad = static_cast<int32_t>(c.pad);
  call.height = static_cast<int32_t>(c.height);
  call.width = static_cast<int32_t>(c.width);
  call.batch = static_cast<int32_t>(c.batch);
  must(qv_run(&call, 1), "windows");
  call.rows += 1;
  must(qv_run(&call, 1) == QV_SHAPE ? 0 : 8, "windows beyond the map");
  write(y);
  qv_layer_free(layer);
}

struct GroupNorm {
  int64_t batch, pixels, channels, groups, activation, threads, loose, in_place;
};

void run(const GroupNorm& c) {
  const int64_t rows = c.batch * c.pixels;
  auto x = read<float>(extent(rows, c.channels, c.loose));
  const auto multiply = read<float>(c.channels);
  const auto add = read<float>(c.channels);
  must(qv_set_threads(static_cast<int32_t>(c.threads)), "threads");
  std::vector<float> y(static_cast<size_t>(rows * c.channels), -1.0f);
  qv_call call{};
  call.kind = QV_GROUP_NORM;
  call.rows = rows;
  call.x = x.data();
  call.ldx = c.channels + c.loose;
  call.y = c.in_place ? x.data() : y.data();
  call.ldy = c.in_place ? call.ldx : c.channels;
  call.norm_multiply = multiply.data();
  call.norm_add = add.data();
  call.norm_eps = 1e-5f;
  call.batch = static_cast<int32_t>(c.batch);
  call.channels = static_cast<int32_t>(c.channels);
  call.groups = static_cast<int32_t>(c.groups);
  call.activation = static_cast<int32_t>(c.activation);
  must(qv_run(&call, 1), "group norm");
  if (c.in_place)
    for (int64_t i = 0; i < rows; ++i)
      std::fwrite(x.data() + i * call.ldx, 4, static_cast<size_t>(c.channels), stdout);
  else
    write(y);
}

struct Attention {
  int64_t batch, queries, keys, heads, kv_heads, dim, rotary, gathered, threads, loose;
};

void run(const Attention& c) {
  const int64_t width = c.heads * c.dim, pair = c.kv_heads * c.dim;
  const int64_t positions = c.queries > c.keys ? c.queries : c.keys;
  const auto q = read<float>(extent(c.batch * c.queries, width, c.loose));
  const auto k = read<float>(extent(c.batch * c.keys, pair, c.loose));
  const auto v = read<float>(extent(c.batch * c.keys, pair, c.loose));
  const auto cosines = read<float>(c.rotary ? positions * c.dim / 2 : 0);
  const auto sines = read<float>(c.rotary ? positions * c.dim / 2 : 0);
  must(qv_set_threads(static_cast<int32_t>(c.threads)), "threads");
  std::vector<float> y(static_cast<size_t>(c.batch * c.queries * width), -1.0f);
  qv_call call{};
  call.kind = QV_ATTENTION;
  call.rows = c.queries;
  call.x = q.data();
  call.ldx = width + c.loose;
  call.y = y.data();
  call.ldy = width;
  call.k = k.data();
  call.v = v.data();
  call.ldk = call.ldv = pair + c.loose;
  call.keys = c.keys;
  call.cos = c.rotary ? cosines.data() : nullptr;
  call.sin = c.rotary ? sines.data() : nullptr;
  call.batch = static_cast<int32_t>(c.batch);
  call.heads = static_cast<int32_t>(c.heads);
  call.kv_heads = static_cast<int32_t>(c.kv_heads);
  call.head_dim = static_cast<int32_t>(c.dim);
  call.scale = 1.0f / __builtin_sqrtf(static_cast<float>(c.dim));
  void* cells = nullptr;
  if (c.gathered) {
    const int64_t floats = qv_cells(c.keys, call.batch, call.kv_heads, call.head_dim);
    must(posix_memalign(&cells, 64, static_cast<size_t>(floats) * 4), "memory");
    qv_call gather = call;
    gather.kind = QV_GATHER;
    gather.rows = 0;
    call.cells = gather.cells = static_cast<float*>(cells);
    must(qv_run(&gather, 1), "gather");
    call.k = call.v = nullptr;  // nobody reads them now
  }
  must(qv_run(&call, 1), "attention");
  write(y);
  std::free(cells);
}

void run_next() {
  switch (read<int64_t>(1)[0]) {
    case LAYER: return run(read<Case>(1)[0]);
    case WINDOWS: return run(read<Windows>(1)[0]);
    case NORM: return run(read<GroupNorm>(1)[0]);
    case ATTENTION: return run(read<Attention>(1)[0]);
    default: must(9, "kind");
  }
}

}  // namespace

int main() {
  must(qv_ready() ? 0 : 7, "ready");
  const int64_t count = read<int64_t>(1)[0];
  for (int64_t i = 0; i < count; ++i) run_next();
  std::fprintf(stderr, "%s: %lld cases\n", qv_name(), static_cast<long long>(count));
  std::fflush(nullptr);
  // The pool's threads live as long as the process: leave without tearing them down.
  std::_Exit(0);
}
