# SPDX-License-Identifier: Apache-2.0
"""The numbers of an integer layer by float arithmetic, for tables and for other devices.

Same codes, same scales and the same rounding as the kernels. Where a scale stands for a whole row
and the sums of its integers fit into a float32, they are those of the kernels bit for bit; else
the sums are float32 products, and results agree to float rounding. Runs wherever torch runs.
Saves no memory and no time: what serves a robot is QuantLinear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.kernels.reference import TINY
from quantvla_ros.kernels.weights import (
    MixedWeight,
    PackedWeight,
    Weight,
    dequantize,
    unpack,
)
from quantvla_ros.quant.linear import QuantizedLayer, static_scale
from quantvla_ros.quant.scheme import qmax
from quantvla_ros.quant.transforms import InputTransform, from_tensors

EXACT = 2**24  # integers up to here are float32 numbers


class SimulatedLinear(nn.Module):
    """A QuantizedLayer by float products: (..., in) -> (..., out).

    Buffers: weight (out, in) float32, dequantized with the fold, in the frame of the transform;
    bias (out,) or None; act_scales as stored; the transform's tensors under their names; wide
    (rows,) int64, the rows that are kept at 16 bits and meet unrounded tokens. Where sums are
    exact, weight holds the codes and row_scales (out,) what they are multiplied with.
    """

    weight: Tensor
    wide: Tensor
    bias: Tensor | None
    act_scales: Tensor | None
    row_scales: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.scheme = layer.scheme
        self.out_features, self.in_features = layer.weight.shape
        weight, bias = layer.folded()
        exact = sums_are_exact(weight, layer.scheme.act_bits)
        codes = unpack(weight).float() if exact else dequantize(weight)  # type: ignore[arg-type]
        self.register_buffer('weight', codes, persistent=False)
        self.register_buffer('row_scales', weight.scales[:, 0] if exact else None,  # type: ignore
                             persistent=False)
        self.register_buffer('bias', bias, persistent=False)
        self.register_buffer('act_scales', layer.act_scales, persistent=False)
        self.register_buffer('wide', wide_rows(weight), persistent=False)
        self._names = tuple(layer.transform.tensors())
        self._hadamards = layer.transform.hadamards()
        for name, tensor in layer.transform.tensors().items():
            self.register_buffer('t_' + name.replace('.', '_'), tensor, persistent=False)

    @property
    def transform(self) -> InputTransform:
        """The layer's input transform, on the device where the layer is."""
        tensors = {name: self.get_buffer('t_' + name.replace('.', '_')) for name in self._names}
        return from_tensors(tensors, self._hadamards)

    def forward(self, x: Tensor) -> Tensor:
        """Round the tokens as the kernels do, then multiply."""
        z = self.transform.activations(x.float())
        if self.scheme.act_bits >= 16:
            return F.linear(z, self.weight, self.bias).to(x.dtype)
        codes, steps = token_codes(z, self.scheme.act_bits, static_scale(self.act_scales))
        if self.row_scales is not None:  # in the order of the kernels
            y = F.linear(codes, self.weight) * self.row_scales * steps
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        y = F.linear(codes * steps, self.weight, self.bias)
        if len(self.wide):
            bias = None if self.bias is None else self.bias[self.wide]
            y[..., self.wide] = F.linear(z, self.weight[self.wide], bias)
        return y.to(x.dtype)


def wide_rows(weight: Weight) -> Tensor:
    """Rows of a mixed weight that are kept at 16 bits, as indices."""
    if not isinstance(weight, MixedWeight):
        return torch.zeros(0, dtype=torch.int64)
    widths = torch.tensor([part.bits for part in weight.parts for _ in range(part.shape[0])])
    return weight.order[: len(widths)][widths == 16]


def sums_are_exact(weight: Weight, act_bits: int) -> bool:
    """Whether no integer sum of a row can leave what a float32 holds exactly."""
    if not isinstance(weight, PackedWeight) or weight.bits == 16 or act_bits >= 16:
        return False
    largest = int(unpack(weight).abs().sum(1, dtype=torch.int64).max()) * qmax(act_bits)
    return weight.scales.shape[1] == 1 and largest <= EXACT


def round_tokens(x: Tensor, bits: int, scale: float | None = None) -> Tensor:
    """Round tokens (..., k) to their grid and back: one scale for each, or a static one."""
    codes, steps = token_codes(x, bits, scale)
    return codes * steps


def token_codes(
    x: Tensor, bits: int, scale: float | None = None
) -> tuple[Tensor, Tensor | float]:
    """Integers of tokens (..., k), as floats, and their steps (..., 1) or the static one."""
    top = qmax(bits)
    if scale is not None:
        return (x * (1.0 / scale)).round().clamp(-top, top), scale
    peak = x.abs().amax(-1, keepdim=True)
    silent = peak < TINY
    inverse = torch.where(silent, torch.zeros_like(peak), torch.full_like(peak, top) / peak)
    steps = torch.where(silent, torch.ones_like(peak), peak / top)
    return (x * inverse).round().clamp(-top, top), steps


def simulate(layer: QuantizedLayer) -> nn.Module:
    """Make the module that stands in for QuantLinear in tables and on other devices."""
    return SimulatedLinear(layer)
