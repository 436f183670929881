# SPDX-License-Identifier: Apache-2.0
"""Where a plan for the GPU finds its weights: a protocol, and a loaded model that keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantvla_ros.policies.loading import HeldLayer
from quantvla_ros.quant.linear import QuantizedLayer

Linear = nn.Linear | QuantizedLayer


class Source(Protocol):
    """Where a plan finds its weights. Names are those of the family's modules."""

    device: torch.device
    dtype: torch.dtype
    kind: str  # scheme of its quantized layers without the group, or 'float'

    def linear(self, name: str) -> Linear:
        """A linear layer: float with its values on the device, or quantized."""

    def value(self, name: str) -> Tensor:
        """A parameter on the device, in its own type."""

    def conditions(self, steps: int) -> Sequence[Any]:
        """What the model says of each denoising time; see savings.condition_table."""


class ModelSource:
    """Weights of a loaded model, with quantized layers in the places of some linears."""

    def __init__(
        self, model: Any, device: torch.device, dtype: torch.dtype, conditions: Sequence[Any]
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._conditions = conditions
        held = [m.layer for m in model.modules() if isinstance(m, HeldLayer) and m.layer]
        self.kind = held[0].scheme.name.partition('g')[0] if held else 'float'

    def linear(self, name: str) -> Linear:
        """See Source. A quantized layer is handed over, once."""
        module = self.model.get_submodule(name)
        if isinstance(module, HeldLayer):
            return module.give()
        return module.to(self.device, self.dtype)

    def value(self, name: str) -> Tensor:
        """See Source."""
        return self.model.get_parameter(name).detach().to(self.device)

    def conditions(self, steps: int) -> Sequence[Any]:
        """See Source."""
        if len(self._conditions) != steps:
            raise ValueError(f'{len(self._conditions)} conditions for {steps} steps')
        return self._conditions
