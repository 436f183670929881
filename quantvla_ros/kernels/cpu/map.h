// SPDX-License-Identifier: Apache-2.0
// Maps of a convolutional stem, channels innermost: windows of a map as tokens of a linear layer,
// and the group norm between two such layers.
#pragma once
#include "layer.h"

namespace {

inline int64_t window_count(int64_t size, const qv_call& call) {
  return (size + 2 * call.pad - call.window) / call.stride + 1;
}

inline bool windows_fit(const qv_call& call) {
  const int64_t area = int64_t{call.window} * call.window;
  if (call.dtype != QV_F32 || call.window < 1 || call.stride < 1 || call.pad < 0 ||
      call.pad >= call.window || call.height < 1 || call.width < 1 || call.batch < 1 ||
      call.layer->k % area)
    return false;
  const int64_t down = window_count(call.height, call), across = window_count(call.width, call);
  return down > 0 && across > 0 && call.rows == down * across * call.batch &&
         call.ldx >= call.layer->k / area;
}

// The window of token `row`, as K floats.
inline void take_window(const qv_call& call, int64_t row, int64_t k, float* to) {
  const int64_t side = call.window, channels = k / (side * side);
  const int64_t across = window_count(call.width, call), down = window_count(call.height, call);
  const int64_t left = row % across * call.stride - call.pad;
  const int64_t top = row / across % down * call.stride - call.pad;
  const int64_t entry = row / across / down;
  const int64_t first = left < 0 ? -left : 0;  // columns of the window inside the map
  const int64_t last = call.width - left < side ? call.width - left : side;
  for (int64_t i = 0; i < side; ++i, to += side * channels) {
    const int64_t y = top + i;
    if (y < 0 || y >= call.height) {
      std::memset(to, 0, static_cast<size_t>(side * channels) * 4);
      continue;
    }
    const int64_t line = (entry * call.height + y) * call.width + left;
    const float* from = static_cast<const float*>(call.x) + (line + first) * call.ldx;
    if (first) std::memset(to, 0, static_cast<size_t>(first * channels) * 4);
    if (call.ldx == channels) {
      const int64_t run = (last - first) * channels;
      float* at = to + first * channels;
      if (run < 16)  // shorter than a call
        for (int64_t j = 0; j < run; ++j) at[j] = from[j];
      else
        std::memcpy(at, from, static_cast<size_t>(run) * 4);
    } else {
      for (int64_t j = first; j < last; ++j, from += call.ldx)
        std::memcpy(to + j * channels, from, static_cast<size_t>(channels) * 4);
    }
    if (last < side)
      std::memset(to + last * channels, 0, static_cast<size_t>((side - last) * channels) * 4);
  }
}

// Group norm in two phases: sums of each channel over a strip of rows, then the strips again.
struct GroupNorm {
  static constexpr int64_t STRIPS = 8;  // of each batch entry
  static constexpr int64_t MAX_CHANNELS = 2048;
  const qv_call& call;
  float* sums;  // [batch][strip][3][channels]: of x - shift, of its square, and the shift: y may be x

  static int64_t room(const qv_call& call) {
    return int64_t{call.batch} * STRIPS * 3 * call.channels;
  }
  static bool fits(const qv_call& call) {
    return call.dtype == QV_F32 && call.batch >= 1 && call.rows >= 1 && call.groups >= 1 &&
           call.rows % call.batch == 0 && call.channels % 16 == 0 && call.channels >= 16 &&
           call.channels <= MAX_CHANNELS && call.channels % call.groups == 0 &&
           call.norm_eps > 0.0f && call.norm_multiply && call.norm_add;
  }

  int64_t tasks() const { return int64_t{call.batch} * STRIPS; }
  int64_t pixels() const { return call.rows / call.batch; }
  const float* input(int64_t row) const {
    return static_cast<const float*>(call.x) + row * call.ldx;
  }
  int64_t begin(int64_t task) const {
    return task / STRIPS * pixels() + pixels() * (task % STRIPS) / STRIPS;
  }
  int64_t end(int64_t task) const {
    return task / STRIPS * pixels() + pixels() * (task % STRIPS + 1) / STRIPS;
  }

  // Each channel is measured from its first pixel, so that little cancels in the variance.
  template <int VECTORS>
  void measure_channels(int64_t task, int64_t c) const {
    float* total = sums + task * 3 * call.channels + c;
    const float* shift = input(task / STRIPS * pixels()) + c;
    Floats sum[VECTORS] = {}, square[VECTORS] = {}, from[VECTORS];
    for (int v = 0; v < VECTORS; ++v) from[v] = load(shift + v * VL);
    for (int64_t row = begin(task); row < end(task); ++row) {
      const float* pixel = input(row) + c;
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Floats x = load(pixel + v * VL) - from[v];
        sum[v] += x;
        square[v] += x * x;
      }
    }
    for (int v = 0; v < VECTORS; ++v) {
      store(total + v * VL, sum[v]);
      store(total + call.channels + v * VL, square[v]);
      store(total + 2 * call.channels + v * VL, from[v]);
    }
  }

  void measure(int64_t task) const {
    int64_t c = 0;
    for (; c + 4 * VL <= call.channels; c += 4 * VL) measure_channels<4>(task, c);
    for (; c < call.channels; c += VL) measure_channels<1>(task, c);
  }

  // y = x * multiply + add of each channel of a batch entry.
  void factors(int64_t entry, float* multiply, float* add) const {
    const int64_t n = call.channels, size = n / call.groups;
    const float* shift = sums + entry * STRIPS * 3 * n + 2 * n;
    double mean[MAX_CHANNELS], square[MAX_CHANNELS];
    for (int64_t c = 0; c < n; ++c) mean[c] = square[c] = 0.0;
    for (int64_t strip = 0; strip < STRIPS; ++strip) {
      const float* part = sums + (entry * STRIPS + strip) * 3 * n;
      for (int64_t c = 0; c < n; ++c) mean[c] += part[c];
      for (int64_t c = 0; c < n; ++c) square[c] += part[n + c];
    }
    const double count = static_cast<double>(pixels());
    for (int64_t first = 0; first < n; first += size) {
      double middle = 0.0, spread = 0.0;
      for (int64_t c = first; c < first + size; ++c) {
        square[c] -= mean[c] * mean[c] / count;
        mean[c] = mean[c] / count + shift[c];
        middle += mean[c] / static_cast<double>(size);
      }
      for (int64_t c = first; c < first + size; ++c)
        spread += square[c] + count * (mean[c] - middle) * (mean[c] - middle);
      const double scale =
          1.0 / __builtin_sqrt(spread / (count * static_cast<double>(size)) + call.norm_eps);
      for (int64_t c = first; c < first + size; ++c) {
        multiply[c] = static_cast<float>(scale * call.norm_multiply[c]);
        add[c] = static_cast<float>(call.norm_add[c] - middle * scale * call.norm_multiply[c]);
      }
    }
  }

  void apply(int64_t task) const {
    float multiply[MAX_CHANNELS], add[MAX_CHANNELS];
    factors(task / STRIPS, multiply, add);
    for (int64_t row = begin(task); row < end(task); ++row) {
      const float* x = input(row);
      float* y = static_cast<float*>(call.y) + row * call.ldy;
      for (int64_t c = 0; c < call.channels; c += VL) {
        const Floats v = load(x + c) * load(multiply + c) + load(add + c);
        store(y + c, call.activation == QV_SILU ? silu(v) : v);
      }
    }
  }
};

}  // namespace
