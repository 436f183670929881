# SPDX-License-Identifier: Apache-2.0
"""Generated cases for driver.cpp, and the comparison of what it prints with the reference."""

import subprocess
from pathlib import Path

import numpy as np
import torch
from kernel_cases import packed

from quantvla_ros.kernels import reference, weights
from quantvla_ros.kernels.cpu import build
from quantvla_ros.kernels.layer import ACTIVATION_CODES, DTYPES

HERE = Path(__file__).parent
SHAPES = [(1, 16, 64), (5, 33, 9), (13, 70, 130), (4, 5, 256), (6, 130, 384), (22, 17, 128),
          (40, 66, 1152)]


def compile_driver(path, cxx, output, extra=()):
    """Build the driver with one path's source; the assertion shows what the compiler said."""
    line = [word for word in build.command(path, cxx, output, extra) if word != '-shared']
    line += [str(HERE / 'driver.cpp'), f'-I{build.FOLDER}']
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def generate():
    """[(bytes for the driver, expected result, relative bound)]."""
    made = []
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
        head = np.array([rows, n, k, bits, group, act_bits, hadamard,
                         ACTIVATION_CODES[activation], gated, 1 + index % 2, DTYPES[dtype],
                         weight.data.numel() * weight.data.element_size(),
                         weight.scales.numel(), ordered, diagonal is not None], dtype=np.int64)
        parts = [head.tobytes(), _bytes(weight.data), _bytes(weight.scales),
                 _bytes(order) if ordered else b'']
        parts += [_bytes(t) for t in (bias, gate)]
        parts += [b'' if diagonal is None else _bytes(diagonal)]
        parts += [_bytes(t) for t in (x, residual)]
        bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        made.append((b''.join(parts), expected, bound))
    return made


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
