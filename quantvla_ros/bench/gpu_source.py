# SPDX-License-Identifier: Apache-2.0
"""Random weights of a published network, made on the card layer by layer, at any precision.

Speed and memory do not depend on the values. Nothing of a float model is ever held beside a
quantized one. Shapes are those of the family's modules on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantvla_ros.kernels.weights import PackedWeight
from quantvla_ros.policies.full_size import full_size
from quantvla_ros.policies.groot_n15 import GrootConditions, GrootN15
from quantvla_ros.policies.pi05 import Pi05
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.layout import EVERYTHING
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.scheme import PerGroup, Scheme, parse_scheme
from quantvla_ros.quant.transforms import InputTransform


@dataclass(frozen=True)
class Precision:
    """scheme 'float' or as w4a8; rotate: a Hadamard of 64 wherever the inputs divide by it."""

    scheme: str
    rotate: bool = False

    @property
    def kind(self) -> str:
        """The scheme without its group."""
        return self.scheme.partition('g')[0]

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.scheme + (' rotated' if self.rotate else '')


def resized(model: Any, horizon: int) -> Any:
    """The same network with another number of actions; no weight depends on it."""
    model.config = replace(model.config, horizon=horizon)
    return model


class RandomSource:
    """See policies.cuda_source.Source."""

    def __init__(
        self, family: str, precision: Precision, device: torch.device, dtype: torch.dtype,
        model: Any = None,
    ) -> None:
        self.device, self.dtype, self.precision = device, dtype, precision
        self.kind = precision.kind
        self.model = full_size(family) if model is None else model
        chosen = policy_sites(self.model).in_groups(EVERYTHING)
        self._quantized = set() if precision.scheme == 'float' else {s.name for s in chosen}
        self.weights = sum(site.out_features * site.in_features for site in chosen)

    def linear(self, name: str) -> nn.Linear | QuantizedLayer:
        """See Source."""
        module = self.model.get_submodule(name)
        rows, columns = module.weight.shape
        if name in self._quantized:
            return self._layer(rows, columns, module.bias is not None)
        made = nn.Linear(columns, rows, bias=module.bias is not None, device=self.device,
                         dtype=self.dtype)
        nn.init.normal_(made.weight, std=columns**-0.5)
        if made.bias is not None:
            nn.init.normal_(made.bias, std=0.02)
        return made.requires_grad_(False)

    def _layer(self, rows: int, columns: int, bias: bool) -> QuantizedLayer:
        scheme: Scheme = parse_scheme(self.precision.scheme)
        group = scheme.weight.size if isinstance(scheme.weight, PerGroup) else 0
        if group and columns % group:
            group, scheme = 0, replace(scheme, weight=Scheme().weight)
        bits = scheme.weight_bits
        if bits == 8:
            data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8,
                                 device=self.device)
        else:
            data = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8,
                                 device=self.device)
        count = columns // group if group else 1
        # codes are uniform: their spread over a row is that of a normal weight's
        scale = columns**-0.5 / (0.58 * 2 ** (bits - 1))
        scales = torch.full((rows, count), scale, device=self.device)
        rotate = self.precision.rotate and columns % 64 == 0
        return QuantizedLayer(
            scheme, PackedWeight(bits, (rows, columns), group, data, scales),
            torch.randn(rows, device=self.device) * 0.02 if bias else None,
            InputTransform(hadamard=64 if rotate else 0))

    def value(self, name: str) -> Tensor:
        """See Source."""
        shape = self.model.get_parameter(name).shape
        return torch.randn(shape, device=self.device) * (0.02 if len(shape) > 1 else 0.1)

    def conditions(self, steps: int) -> Sequence[Any]:
        """See Source."""
        return [self._condition() for _ in range(steps)]

    def _condition(self) -> Any:
        def some(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device) * 0.1

        c = self.model.config
        if isinstance(self.model, GrootN15):
            blocks = [some(1, 2 * c.width) for _ in range(c.depth)]
            return GrootConditions(some(1, 1, c.width), blocks, some(1, 2 * c.width))
        if isinstance(self.model, Pi05):
            return some(2 * c.expert.depth + 1, 3 * c.expert.width)
        return some(1, c.expert.width)
