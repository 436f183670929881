// SPDX-License-Identifier: Apache-2.0
// Runs generated layers through one kernel path: cases on stdin, results on stdout. Linked with the
// path's source, so that it can be cross-compiled and run under emulation, or under sanitizers.
// Every buffer is allocated to its exact size: a byte read beyond it is an error that is seen.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "abi.h"

namespace {

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

}  // namespace

int main() {
  must(qv_ready() ? 0 : 7, "ready");
  const int64_t count = read<int64_t>(1)[0];
  for (int64_t i = 0; i < count; ++i) run(read<Case>(1)[0]);
  std::fprintf(stderr, "%s: %lld cases\n", qv_name(), static_cast<long long>(count));
  std::fflush(nullptr);
  // The pool's threads live as long as the process: leave without tearing them down.
  std::_Exit(0);
}
