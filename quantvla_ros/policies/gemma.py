# SPDX-License-Identifier: Apache-2.0
"""Gemma decoder layers: the backbone of pi0 and pi0.5, and their action expert.

The expert attends over the backbone's keys and values and its own. Its norms are Gemma's (pi0) or
adaptive (pi0.5): scale, shift and gate come from the denoising time alone, so that a table of
fixed times replaces the layers that make them. Owns no vision, no words, no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantvla_ros.policies.blocks import (
    Attention,
    GatedMlp,
    GemmaNorm,
    Heads,
    KeysValues,
    append,
    gelu_tanh,
    rms_normalize,
    rotary,
    rotate,
)

EPS = 1e-6


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one stack of layers."""

    width: int
    depth: int
    hidden: int
    heads: int = 8
    kv_heads: int = 1
    head_width: int = 256


GEMMA_2B = GemmaConfig(width=2048, depth=18, hidden=16384)
GEMMA_300M = GemmaConfig(width=1024, depth=18, hidden=4096)


class AdaptiveNorm(nn.Module):
    """rms_normalize(x) * (1 + scale) + shift, and a gate for the branch that follows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, width), modulation (3 * width,) -> normed x and the gate (width,)."""
        scale, shift, gate = modulation.chunk(3)
        normed = rms_normalize(x, EPS) * (1 + scale.float()) + shift.float()
        return normed.to(x.dtype), gate.to(x.dtype)


class PlainNorm(GemmaNorm):
    """Gemma's own norm in the place of an adaptive one: no modulation, a gate of one."""

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> tuple[Tensor, float]:  # type: ignore[override]
        """x (B, T, width) -> normed x and 1."""
        del modulation
        return super().forward(x), 1.0


class GemmaLayer(nn.Module):
    """Attention with rotary positions and one shared key-value head, then a gated MLP."""

    def __init__(self, c: GemmaConfig, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.attn_norm = norm(c.width)
        self.attn = Attention(c.width, Heads(c.heads, c.kv_heads, c.head_width))
        self.mlp_norm = norm(c.width)
        self.mlp = GatedMlp(c.width, c.hidden, gelu_tanh)

    def keys_values(self, normed: Tensor, table: Tensor) -> KeysValues:
        """Keys, rotated, and values of normed tokens."""
        keys, values = self.attn.keys_values(normed)
        return rotate(keys, table), values

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        past: KeysValues | None = None,
        modulation: Sequence[Tensor | None] = (None, None),
    ) -> tuple[Tensor, KeysValues]:
        """x (B, T, width) -> x of the next layer, and the keys and values of these tokens."""
        normed, gate = self.attn_norm(x, modulation[0])
        own = self.keys_values(normed, table)
        seen = own if past is None else append(past, own)
        x = x + gate * self.attn.attend(rotate(self.attn.queries(normed), table), seen)
        normed, gate = self.mlp_norm(x, modulation[1])
        return x + gate * self.mlp(normed), own


class GemmaStack(nn.Module):
    """All layers of a backbone or of an expert, and the last norm."""

    def __init__(self, c: GemmaConfig, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = c
        self.layers = nn.ModuleList(GemmaLayer(c, norm) for _ in range(c.depth))
        self.norm = norm(c.width)

    def positions(self, first: int, tokens: int, device: torch.device) -> Tensor:
        """Rotary table of a run of tokens."""
        return rotary(torch.arange(first, first + tokens, device=device), self.config.head_width)

    def encode(self, x: Tensor) -> list[KeysValues]:
        """Keys and values of every layer for a prefix in which every token sees all.

        The last layer stops at its keys and values: nothing reads what it would compute next.
        """
        table = self.positions(0, x.shape[1], x.device)
        found = []
        for layer in self.layers[:-1]:
            x, own = layer(x, table)
            found.append(own)
        last = self.layers[-1]
        found.append(last.keys_values(last.attn_norm(x, None)[0], table))  # type: ignore[operator]
        return found

    def modulation(self, condition: Tensor) -> Tensor:
        """(1, width) -> (norms, 3 * width), in the order in which the norms run."""
        norms = [norm for layer in self.layers for norm in (layer.attn_norm, layer.mlp_norm)]
        return torch.cat([norm.dense(condition) for norm in (*norms, self.norm)])  # type: ignore[operator, union-attr]

    def forward(
        self, x: Tensor, past: Sequence[KeysValues], modulation: Tensor | None = None
    ) -> tuple[Tensor, list[KeysValues]]:
        """x (B, T, width) after a prefix -> last norm of x, and keys and values of these tokens.

        modulation: (norms, 3 * width) for adaptive norms, None for plain ones.
        """
        table = self.positions(past[0][0].shape[2], x.shape[1], x.device)
        rows: Sequence[Tensor | None] = (
            [None] * (2 * len(self.layers) + 1) if modulation is None else modulation.unbind()
        )
        found = []
        for i, (layer, seen) in enumerate(zip(self.layers, past, strict=True)):
            x, own = layer(x, table, seen, rows[2 * i : 2 * i + 2])
            found.append(own)
        return self.norm(x, rows[-1])[0], found
