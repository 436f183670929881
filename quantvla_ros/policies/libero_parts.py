# SPDX-License-Identifier: Apache-2.0
"""What the linear layers of the shipped network become, for its recorded programs.

Owns the value that a program reads of a layer, and which layers a program can serve. Records and
runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from quantvla_ros.kernels.weights import PackedWeight, Weight, keep, stack
from quantvla_ros.quant.linear import QuantizedLayer, kernel_transform


@dataclass(frozen=True, eq=False)
class Part:
    """What one linear layer became: weight, bias, bits of every token, and how it enters.

    hadamard: block, 0 or 64. diagonal: (in,) multipliers of the input or None. act_scales: static
    scales of the tokens, (1,) or one for each denoising step, or None.
    """

    weight: Weight
    bias: Tensor | None = None
    act_bits: int = 8
    hadamard: int = 0
    diagonal: Tensor | None = None
    act_scales: Tensor | None = None

    def joins(self, other: Part) -> bool:
        """Whether both may be one call: the same tokens, weights of one width and grouping."""
        a, b = self.weight, other.weight
        if not isinstance(a, PackedWeight) or not isinstance(b, PackedWeight):
            return False
        return (
            (a.bits, a.group, self.act_bits, self.hadamard)
            == (b.bits, b.group, other.act_bits, other.hadamard)
            and _same(self.diagonal, other.diagonal)
            and _same(self.act_scales, other.act_scales)
        )

    def act_scale(self, step: int | None) -> float | None:
        """Static scale of a denoising step (None: the prefix); None where tokens have theirs."""
        scales = self.act_scales
        if scales is None or scales.numel() == 1:
            return None if scales is None else float(scales)
        if step is None or step >= scales.numel():
            raise ValueError(
                f'a layer has scales for {scales.numel()} denoising steps, and step {step} runs; '
                'quantize for the number of steps that is used'
            )
        return float(scales[step])


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


PartOf = Callable[[nn.Module], Part]
RUN_AT_LOAD = ('action.time_in', 'action.time_out')  # make the modulation, once for all chunks


class Stored(nn.Module):
    """Stands for a linear layer in a network that is only recorded; holds what is recorded."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        weight, bias = layer.folded()
        fused = kernel_transform(layer.transform)
        assert fused is not None, 'recordable() was asked'
        diagonal, hadamard = fused
        self.part: Part | None = Part(weight, bias, layer.scheme.act_bits, hadamard, diagonal,
                                      layer.act_scales)


def recordable(layers: Mapping[str, QuantizedLayer]) -> bool:
    """Whether programs can serve all layers that run for a chunk: integer tokens, and a transform
    that the kernels take."""
    return all(
        layer.scheme.act_bits < 16 and kernel_transform(layer.transform) is not None
        for name, layer in layers.items()
        if name not in RUN_AT_LOAD
    )


def stored_part(module: nn.Module) -> Part:
    """Take the part of a Stored layer, which lets go of it; a float linear is kept at 16 bits."""
    if isinstance(module, Stored):
        assert module.part is not None, 'recorded once'
        return module.part
    linear = cast(nn.Linear, module)
    return Part(keep(linear.weight.detach()), linear.bias)


def stacked(parts: list[Part]) -> list[Part]:
    """Join parts of one kind into one whose rows follow each other; else return them as they are.

    The biases must be all there or all missing.
    """
    first, biases = parts[0], [part.bias for part in parts if part.bias is not None]
    if len(parts) == 1 or not all(map(first.joins, parts)) or len(biases) not in (0, len(parts)):
        return parts
    weight = stack([cast(PackedWeight, part.weight) for part in parts])
    return [replace(first, weight=weight, bias=torch.cat(biases) if biases else None)]
