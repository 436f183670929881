# SPDX-License-Identifier: Apache-2.0
"""Causal decoder layers of Llama and Qwen3: GR00T's backbone, SmolVLA's and OpenVLA's language.

Qwen3 norms each head's queries and keys after the projection; Llama does not. Owns no words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import (
    Attention,
    GatedMlp,
    Heads,
    KeysValues,
    RmsNorm,
    append,
    causal_mask,
    rotary,
    rotate,
)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a stack; the defaults are GR00T N1.5's twelve layers of Qwen3-1.7B."""

    width: int = 2048
    depth: int = 12
    hidden: int = 6144
    heads: int = 16
    kv_heads: int = 8
    head_width: int = 128
    base: float = 1e6
    eps: float = 1e-6
    head_norm: bool = True


class DecoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: DecoderConfig, context_width: int | None = None) -> None:
        super().__init__()
        heads = Heads(c.heads, c.kv_heads, c.head_width)
        self.attn_norm = RmsNorm(c.width, c.eps)
        self.attn = Attention(c.width, heads, context_width=context_width)
        if c.head_norm:
            self.q_norm = RmsNorm(c.head_width, c.eps)
            self.k_norm = RmsNorm(c.head_width, c.eps)
        self.head_norm = c.head_norm
        self.mlp_norm = RmsNorm(c.width, c.eps)
        self.mlp = GatedMlp(c.width, c.hidden, F.silu)

    def queries(self, normed: Tensor, table: Tensor) -> Tensor:
        """Rotated queries of normed tokens."""
        q = self.attn.queries(normed)
        return rotate(self.q_norm(q) if self.head_norm else q, table)

    def keys_values(self, normed: Tensor, table: Tensor) -> KeysValues:
        """Rotated keys, and values, of normed tokens."""
        k, v = self.attn.keys_values(normed)
        return rotate(self.k_norm(k) if self.head_norm else k, table), v

    def finish(self, x: Tensor, q: Tensor, seen: KeysValues, mask: Tensor | None) -> Tensor:
        """Attend, add, and run the MLP."""
        x = x + self.attn.attend(q, seen, mask)
        return x + self.mlp(self.mlp_norm(x))

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        mask: Tensor | None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """x (B, T, width) -> x of the next layer, and keys and values so far."""
        normed = self.attn_norm(x)
        own = self.keys_values(normed, table)
        seen = own if past is None else append(past, own)
        return self.finish(x, self.queries(normed, table), seen, mask), seen


class Decoder(nn.Module):
    """All layers and the last norm."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.config = c
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.depth))
        self.norm = RmsNorm(c.width, c.eps)

    def table(self, first: int, tokens: int, device: torch.device) -> Tensor:
        """Rotary table of a run of tokens."""
        positions = torch.arange(first, first + tokens, device=device)
        return rotary(positions, self.config.head_width, self.config.base)

    def forward(
        self,
        x: Tensor,
        past: list[KeysValues] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Tokens (1, T, width) behind a past -> normed tokens, keys and values so far.

        mask (T, past + T) bool: where a token looks; None is causal for a first run, and
        everything for a single further token.
        """
        first = 0 if past is None else past[0][0].shape[2]
        tokens = x.shape[1]
        if mask is None and tokens > 1:
            mask = causal_mask(first + tokens, x.device)[first:]
        table = self.table(first, tokens, x.device)
        kept = []
        for i, layer in enumerate(self.layers):
            x, seen = layer(x, table, mask, None if past is None else past[i])
            kept.append(seen)
        return self.norm(x), kept
