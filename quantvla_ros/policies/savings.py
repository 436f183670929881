# SPDX-License-Identifier: Apache-2.0
"""Work and memory that a checkpoint carries and no action needs: dropped, exactly.

Each saving is proven by a test that compares chunks with and without it. What is dropped is set to
None, so that nothing can use it by mistake. Rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantvla_ros.policies.decoder import Decoder
from quantvla_ros.policies.gemma import GemmaStack


@dataclass(frozen=True)
class Saving:
    """One saving of a model: parameters no longer held, multiply-adds no longer done a chunk."""

    name: str
    parameters: int
    operations: int

    def bytes(self, bytes_per_parameter: int = 2) -> int:
        """Memory no longer held."""
        return self.parameters * bytes_per_parameter


def count(*modules: nn.Module | None) -> int:
    """Parameters of some modules."""
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())


def drop_backbone_tail(stack: GemmaStack | Decoder, tokens: int) -> Saving:
    """Drop what follows the keys and values of the last backbone layer: nothing reads it.

    tokens: length of a prefix, for the operations.
    """
    last: Any = stack.layers[-1]
    unused = (last.attn.q_proj, last.attn.o_proj, last.mlp_norm, last.mlp, stack.norm)
    parameters = count(*unused)
    last.attn.q_proj = last.attn.o_proj = last.mlp_norm = last.mlp = None
    stack.norm = None  # type: ignore[assignment]
    return Saving('last backbone layer behind its keys and values', parameters,
                  parameters * tokens)


def condition_table(model: Any, steps: int) -> list[Tensor]:
    """Conditions of every denoising step at its fixed time."""
    first = model.NOISE_TIME
    with torch.inference_mode():
        return [model.conditions(abs(first - step / steps)) for step in range(steps)]


def drop_modulation(model: Any, steps: int) -> Saving:
    """Drop the layers that make modulation from the time; a table has taken their place."""
    parameters = 0
    for module in list(model.modules()):
        if isinstance(getattr(module, 'dense', None), nn.Linear):
            parameters += count(module.dense)
            module.dense = None
    for name in ('time_in', 'time_out', 'last_modulation'):
        parameters += count(getattr(model, name, None))
        if hasattr(model, name):
            setattr(model, name, None)
    return Saving(f'modulation of {steps} fixed times, now a table', parameters,
                  parameters * steps)


def drop_unused(model: Any, steps: int, tokens: int = 0) -> list[Saving]:
    """Drop everything that a served model of any family carries and does not need."""
    found = [drop_modulation(model, steps)]
    if isinstance(getattr(model, 'backbone', None), GemmaStack) or hasattr(model, 'expert'):
        found.append(drop_backbone_tail(model.backbone, tokens))
    return [saving for saving in found if saving.parameters]
