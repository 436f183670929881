# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a layer, chosen once for the process; says so when asked.

Layers are prepared at load (`prepare`), which checks everything that can be checked once and
brings the weight into the order that the machine's instructions want. QUANTVLA_KERNEL forces a
path: amx, avx512vnni, avx2vnni, avx512vl, avx2, i8mm, dotprod, scalar or reference. Where no
library can be loaded the reference serves, with one warning.
"""

from __future__ import annotations

import ctypes
import os
import platform
import warnings
from functools import lru_cache

from torch import Tensor

from quantvla_ros.kernels import native
from quantvla_ros.kernels.layer import (
    Layer,
    Options,
    ReferenceLayer,
    check_layer,
    make_native,
)
from quantvla_ros.kernels.weights import Weight

FORCE = 'QUANTVLA_KERNEL'
REBUILD = 'python -m quantvla_ros.kernels.cpu.build'


@lru_cache(maxsize=1)
def _chosen() -> tuple[str, str, ctypes.CDLL | None]:
    """(path, why, library); the library is None for the reference."""
    forced = os.environ.get(FORCE, '')
    if forced == 'reference':
        return forced, f'{FORCE} asks for it', None
    if forced:
        if forced not in native.PATHS:
            known = ', '.join([*native.PATHS, 'reference'])
            raise ValueError(f'{FORCE} is {forced!r}; expected one of {known}')
        try:
            return forced, f'{FORCE} asks for it', native.load(forced)
        except OSError as error:
            raise ValueError(f'{FORCE}: {error}. To build the kernels: {REBUILD}') from error
    reasons = []
    for name in native.PATHS:
        try:
            return name, 'the fastest that this machine runs', native.load(name)
        except OSError as error:
            reasons.append(str(error))
    warnings.warn(
        'No integer kernel can be loaded, so quantized layers run on the slow reference '
        f'(100 times slower or worse). Build them with: {REBUILD}\n  ' + '\n  '.join(reasons),
        RuntimeWarning, stacklevel=3)
    return 'reference', 'no kernel library can be loaded', None


def path_name() -> str:
    """Return the path in use: amx, avx512vnni, avx2vnni, ..., scalar or reference."""
    return _chosen()[0]


def library() -> ctypes.CDLL | None:
    """Return the loaded library, None for the reference."""
    return _chosen()[2]


def prepare(
    weight: Weight,
    bias: Tensor | None = None,
    *,
    act_bits: int = 8,
    hadamard: int = 0,
    diagonal: Tensor | None = None,
    activation: str = 'none',
    up: Weight | None = None,
    up_bias: Tensor | None = None,
    device: str = 'cpu',
) -> Layer:
    """Make a Layer: once, at load. See reference.linear for what it computes.

    act_bits 8, 4 or 3; diagonal (K,) float32 multipliers of x, then hadamard 0 or 64, both before
    x is quantized; activation 'none', 'silu' or 'gelu_tanh' of the product;
    up: a second weight whose product multiplies the activated first one (gated MLP).
    device: 'cpu', or 'cuda' for the Triton kernels, where tokens of 4 bits run as 8-bit ones.
    Raises ValueError with a sentence for what no kernel serves.
    """
    options = Options(act_bits, hadamard, activation, diagonal)
    check_layer(weight, bias, options, up, up_bias)
    if device != 'cpu':
        return _on_gpu(weight, bias, options, up, up_bias, device)
    kernels = library()
    if kernels is None:
        return ReferenceLayer(weight, bias, options, up, up_bias)
    return make_native(kernels, weight, bias, options, up, up_bias)


def _on_gpu(
    weight: Weight, bias: Tensor | None, options: Options, up: Weight | None,
    up_bias: Tensor | None, device: str,
) -> Layer:
    # imported here: Triton must not be loaded by a process that runs on the CPU
    import torch

    from quantvla_ros.kernels.cuda.layer import CudaLayer

    return CudaLayer(weight, bias, options, up, up_bias, torch.device(device))


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    act_bits: int = 8,
    act_scale: float | None = None,
    hadamard: int = 0,
    diagonal: Tensor | None = None,
    activation: str = 'none',
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Prepare and call in one: for tests and scripts, it brings the weight in order every time."""
    layer = prepare(weight, bias, act_bits=act_bits, hadamard=hadamard, diagonal=diagonal,
                    activation=activation)
    return layer(x, act_scale=act_scale, gate=gate, residual=residual)


def set_threads(count: int) -> None:
    """Use `count` threads, the caller's included. They are persistent and serve one call at a
    time: a second calling thread waits for its turn.

    A robot keeps one core for the control timer: the default is one thread less than the machine
    has cores, and both cores of a machine with two.
    """
    kernels = library()
    if kernels is not None and kernels.qv_set_threads(int(count)):
        raise ValueError(f'threads is {count}; expected 1 to 1024')


def threads() -> int:
    """Return the number of threads in use; the reference uses torch's."""
    kernels = library()
    return 1 if kernels is None else int(kernels.qv_threads())


def describe() -> dict[str, str]:
    """Return what was chosen, why, and why each other path was not, for `quantvla doctor`."""
    name, why, _ = _chosen()
    rows = {'kernels': f'{name} ({why})', 'kernel threads': str(threads()),
            'machine': platform.machine()}
    for other in native.PATHS:
        if other != name:
            rows[f'kernel path {other}'] = native.why_not(other) or 'can run here'
    return rows
