# SPDX-License-Identifier: Apache-2.0
"""QVLA's rows of different widths: who gets how many bits, and the weight that holds them.

Rows are units of quant/sensitivity.py; their errors come from quant/jacobian.py, so that layers
compete in one currency, the squared action error. Runs no frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from quantvla_ros.kernels.weights import MixedWeight, PackedWeight, keep, mix
from quantvla_ros.quant.pack import absmax_scale, dequantize, packed, quantize
from quantvla_ros.quant.scheme import PerRow
from quantvla_ros.quant.sensitivity import Unit, bit_costs, demote

Errors = Mapping[str, Mapping[int, Tensor]]  # layer -> width -> (out,)


def at_width(weight: Tensor, bits: int) -> Tensor:
    """The float weight that rows of a width stand for; 0 bits are pruned."""
    weight = weight.float()
    if bits == 0:
        return torch.zeros_like(weight)
    if bits == 16:
        return weight.to(torch.bfloat16).float()
    scale = absmax_scale(weight, bits, PerRow())
    return dequantize(quantize(weight, scale, bits, PerRow()), scale, PerRow())


def assign_rows(
    errors: Errors, columns: Mapping[str, int], widths: Sequence[int], mean_bits: float
) -> dict[str, list[int]]:
    """Give every row of every layer a width, at most mean_bits for each weight on average."""
    units, table = [], {}
    for layer, by_width in errors.items():
        for row in range(len(by_width[widths[0]])):
            unit = Unit(f'{layer}/{row}', columns[layer])
            units.append(unit)
            table[unit.name] = {bits: float(by_width[bits][row]) for bits in widths}
    budget = mean_bits * sum(unit.size for unit in units)
    chosen = demote(bit_costs(units, widths), table, widths, budget)
    return {
        layer: [chosen[f'{layer}/{row}'] for row in range(len(by_width[widths[0]]))]
        for layer, by_width in errors.items()
    }


def pack_rows(weight: Tensor, bits: Sequence[int]) -> MixedWeight | PackedWeight:
    """Pack W (out, in) with a width for each row; rows of equal width become one product.

    A layer whose rows are all pruned keeps one row of 2 bits that is zero.
    """
    width = torch.tensor(bits)
    parts = []
    for b in sorted(set(bits) - {0}, reverse=True):
        rows = (width == b).nonzero().flatten()
        part = weight[rows].float()
        if b == 16:
            parts.append((keep(part), rows))
            continue
        scale = absmax_scale(part, b, PerRow())
        parts.append((packed(quantize(part, scale, b, PerRow()), scale, b, PerRow()), rows))
    if not parts:
        zero = torch.zeros(1, weight.shape[1])
        scale = absmax_scale(zero, 2, PerRow())
        codes = quantize(zero, scale, 2, PerRow())
        parts.append((packed(codes, scale, 2, PerRow()), torch.zeros(1, dtype=torch.int64)))
    return mix(parts, len(width))
