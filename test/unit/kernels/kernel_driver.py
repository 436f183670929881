# SPDX-License-Identifier: Apache-2.0
"""Generated cases for driver.cpp, and the comparison of what it prints with the reference."""

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from kernel_cases import packed

from quantvla_ros.kernels import reference, weights
from quantvla_ros.kernels.cpu import build
from quantvla_ros.kernels.layer import ACTIVATION_CODES, DTYPES
from quantvla_ros.kernels.windows import Window

HERE = Path(__file__).parent
SHAPES = [(1, 16, 64), (5, 33, 9), (13, 70, 130), (4, 5, 256), (6, 130, 384), (22, 17, 128),
          (40, 66, 1152)]
WINDOWS = [(3, 2, 1, 12, 12, 2, 3), (2, 2, 0, 6, 10, 1, 64), (3, 1, 1, 5, 4, 3, 16),
           (1, 1, 0, 3, 3, 1, 7), (5, 3, 2, 7, 9, 2, 8)]  # size, stride, pad, map, batch, channels
NORMS = [(2, 64, 64, 16), (1, 7, 16, 1), (3, 20, 192, 16), (1, 1, 32, 4)]
ATTENTIONS = [(1, 16, 16, 4, 2, 64), (2, 5, 33, 2, 1, 32), (1, 17, 70, 3, 3, 64)]
LAYER, WINDOW, NORM, ATTENTION = range(4)  # Kind of driver.cpp


def compile_driver(path, cxx, output, extra=()):
    """Build the driver with one path's source; the assertion shows what the compiler said."""
    line = [word for word in build.command(path, cxx, output, extra) if word != '-shared']
    line += [str(HERE / 'driver.cpp'), f'-I{build.FOLDER}']
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


@contextmanager
def compiled(paths, cxx, folder, extra=()) -> Iterator[Callable[[str], Path]]:
    """Build the drivers of these paths, one on each core; gives path -> its driver, once built."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    made = {path: pool.submit(compile_driver, path, cxx, folder / path, extra) for path in paths}
    try:
        yield lambda path: made[path].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def _head(*numbers):
    return np.array(numbers, dtype=np.int64).tobytes()


def _spaced(x, loose):
    """Rows of x with `loose` NaNs between them, none behind the last; the bytes."""
    wide = torch.full((x.shape[0], x.shape[1] + loose), torch.nan)
    wide[:, : x.shape[1]] = x
    return _bytes(wide.flatten()[: wide.numel() - loose])


def windows():
    """Cases of layers whose tokens are windows of a map."""
    for index, (size, stride, pad, height, width, batch, channels) in enumerate(WINDOWS * 2):
        window, loose = Window(size, stride, pad, height, width, batch), (0, 5)[index // 5]
        bits, n = (4, 8, 16)[index % 3], 24 + index
        weight = packed(n, size * size * channels, bits)
        bias, residual = torch.randn(n), torch.randn(window.tokens, n)
        x = torch.randn(batch * height * width, channels)
        head = _head(WINDOW, batch, height, width, channels, size, stride, pad, window.tokens, n,
                     bits, 1 + index % 2, loose, weight.data.numel() * weight.data.element_size(),
                     weight.scales.numel())
        parts = [head, _bytes(weight.data), _bytes(weight.scales), _bytes(bias),
                 _spaced(x, loose), _bytes(residual)]
        yield (b''.join(parts), reference.linear(window.of(x), weight, bias, residual=residual),
               1e-6)


def norms():
    """Cases of group norms, in place and not."""
    for index, (batch, pixels, channels, groups) in enumerate(NORMS * 2):
        activation, loose = ('none', 'silu')[index // 4], (0, 3)[index % 2]
        x = torch.randn(batch * pixels, channels) + 5 * torch.rand(channels)
        multiply, add = torch.randn(channels), torch.randn(channels)
        head = _head(NORM, batch, pixels, channels, groups, ACTIVATION_CODES[activation],
                     1 + index % 2, loose, index % 3 == 0)
        expected = reference.group_norm(x, batch, groups, multiply, add, 1e-5, activation)
        yield b''.join([head, _spaced(x, loose), _bytes(multiply), _bytes(add)]), expected, 3e-6


def attentions():
    """Cases of attention, rotated or with keys that were gathered before."""
    for index, (batch, queries, keys, heads, pairs, dim) in enumerate(ATTENTIONS * 2):
        loose, gathered = (0, 7)[index % 2], index >= len(ATTENTIONS)
        shapes = ((batch, queries, heads, dim), (batch, keys, pairs, dim))
        q, k, v = (torch.randn(shapes[i]) for i in (0, 1, 1))
        angles = torch.rand(max(queries, keys), dim // 2)
        rotary = [] if gathered else [angles.cos(), angles.sin()]
        head = _head(ATTENTION, batch, queries, keys, heads, pairs, dim, len(rotary) > 0,
                     gathered, 1 + index % 2, loose)
        parts = [head, *(_spaced(t.reshape(t.shape[0] * t.shape[1], -1), loose)
                         for t in (q, k, v)), *map(_bytes, rotary)]
        expected = reference.attention(q, k, v, *rotary).reshape(batch * queries, -1)
        yield b''.join(parts), expected, 3e-6


def layers():
    """Cases of layers."""
    for index, (rows, n, k) in enumerate(SHAPES * 3):
        bits = (4, 8, 2, 16)[index % 4]
        group = 0 if bits == 16 or k % 128 else (0, 128)[index % 2]
        act_bits = (8, 8, 4)[index % 3]
        hadamard = 64 if k % 64 == 0 and index % 2 else 0
        activation = ('none', 'silu', 'gelu_tanh')[index % 3]
        gated = index % 5 == 0
        dtype = (torch.float32, torch.float32, torch.bfloat16, torch.float16)[index % 4]
        ordered = not gated and index % 2 == 0
        weight = packed(n, k, bits, group)
        order = torch.randperm(n)
        bias, gate = torch.randn(n), torch.randn(n)
        x, residual = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        diagonal = torch.rand(k) + 0.5 if index % 3 else None
        whole = weights.MixedWeight((weight,), order) if ordered else weight
        expected = reference.linear(
            x, whole, bias, act_bits=act_bits, hadamard=hadamard, diagonal=diagonal,
            activation=activation,
            up=weight if gated else None, up_bias=bias if gated else None, gate=gate,
            residual=residual)
        head = _head(LAYER, rows, n, k, bits, group, act_bits, hadamard,
                     ACTIVATION_CODES[activation], gated, 1 + index % 2, DTYPES[dtype],
                     weight.data.numel() * weight.data.element_size(), weight.scales.numel(),
                     ordered, diagonal is not None)
        parts = [head, _bytes(weight.data), _bytes(weight.scales),
                 _bytes(order) if ordered else b'']
        parts += [_bytes(t) for t in (bias, gate)]
        parts += [b'' if diagonal is None else _bytes(diagonal)]
        parts += [_bytes(t) for t in (x, residual)]
        bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        yield b''.join(parts), expected, bound


def generate():
    """[(bytes for the driver, expected result, relative bound)]."""
    return [*layers(), *windows(), *norms(), *attentions()]


def run_and_compare(command, env=None):
    """Feed the cases to a built driver and hold its output against the reference."""
    cases = generate()
    given = np.int64(len(cases)).tobytes() + b''.join(case for case, _, _ in cases)
    done = subprocess.run(command, input=given, capture_output=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    said = done.stdout
    for index, (_, expected, bound) in enumerate(cases):
        size = expected.numel() * expected.element_size()
        y = torch.frombuffer(bytearray(said[:size]), dtype=expected.dtype).view(expected.shape)
        said = said[size:]
        error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= bound, f'case {index}: {error}'
    assert said == b''
