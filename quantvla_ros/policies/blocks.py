# SPDX-License-Identifier: Apache-2.0
"""The parts that every published architecture is made of, once: norms, rotary, attention, MLPs.

Inference only. Every linear is a plain nn.Linear under a stable name, so that quantization can
replace it; each attention runs through a parameter-free `core`, so that a forward hook can see
queries, keys and values by head. Knows no checkpoint format and no policy.

B batch, T queries, S keys, H heads, G key-value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # (B, G, S, D) each


@dataclass(frozen=True)
class Heads:
    """How an attention is divided: heads of queries, groups of keys and values, width of one."""

    count: int
    groups: int
    width: int

    def __post_init__(self) -> None:
        if self.count % self.groups:
            raise ValueError(f'{self.groups} key-value heads do not divide {self.count} heads')


def rms_normalize(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class RmsNorm(nn.Module):
    """rms_normalize(x) * weight: Llama, Qwen."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return rms_normalize(x, self.eps).to(x.dtype) * self.weight


class GemmaNorm(nn.Module):
    """rms_normalize(x) * (1 + weight): Gemma stores the gain less one."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return (rms_normalize(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


def rotary(positions: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """(T,) positions -> (2, T, width): cosines and signed sines, for rotate()."""
    step = torch.arange(0, width, 2, device=positions.device).float() / width
    angle = positions.float()[:, None] / base**step
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) of (B, heads, T, D) by its angle at each position."""
    table = table.to(x.dtype)
    return x * table[0] + x.roll(x.shape[-1] // 2, -1) * table[1]


def causal_mask(tokens: int, device: torch.device) -> Tensor:
    """(tokens, tokens) bool, True where a token may look: at itself and before."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(D)) v; heads g*r .. g*r + r-1 share key-value head g."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend: q (B, H, T, D), k and v (B, G, S, D), mask (T, S) bool -> (B, H, T, D).

        Heads that share keys stand one after the other as further queries: nothing is copied.
        """
        batch, heads, tokens, width = q.shape
        sharing = heads // k.shape[1]
        grouped = q.reshape(batch, k.shape[1], sharing * tokens, width)
        wide = None if mask is None else mask.repeat(sharing, 1)
        attended = F.scaled_dot_product_attention(grouped, k, v, attn_mask=wide)
        return attended.reshape(batch, heads, tokens, width)


class Attention(nn.Module):
    """Four linears and a core; the layer around it owns positions, cache and mask."""

    def __init__(
        self,
        width: int,
        heads: Heads,
        *,
        bias: bool = False,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        inner, shared = heads.count * heads.width, heads.groups * heads.width
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(context_width or width, shared, bias=bias)
        self.v_proj = nn.Linear(context_width or width, shared, bias=bias)
        self.o_proj = nn.Linear(inner, width, bias=bias)
        self.core = AttentionCore()

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return x.view(x.shape[0], x.shape[1], heads, self.heads.width).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, H, T, D)."""
        return self.split(self.q_proj(x), self.heads.count)

    def keys_values(self, x: Tensor) -> KeysValues:
        """(B, S, context_width) -> keys and values (B, G, S, D)."""
        keys = self.split(self.k_proj(x), self.heads.groups)
        return keys, self.split(self.v_proj(x), self.heads.groups)

    def attend(self, q: Tensor, keys_values: KeysValues, mask: Tensor | None = None) -> Tensor:
        """Queries (B, H, T, D) over keys and values -> (B, T, width)."""
        k, v = keys_values
        return self.o_proj(self.core(q, k, v, mask).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend from x to itself, without positions."""
        return self.attend(self.queries(x), self.keys_values(x), mask)


def append(past: KeysValues, new: KeysValues) -> KeysValues:
    """Join two runs of keys and values along the tokens."""
    return torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula."""
    return F.gelu(x, approximate='tanh')


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Mlp(nn.Module):
    """fc2(act(fc1(x))), with biases."""

    def __init__(
        self, width: int, hidden: int, act: Callable[[Tensor], Tensor], out: int | None = None
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out or width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, out)."""
        return self.fc2(self.act(self.fc1(x)))


def time_features(time: float, width: int, periods: tuple[float, float]) -> Tensor:
    """Sines and cosines of a time in [0, 1] -> (1, width) float32; pi0, pi0.5, SmolVLA.

    The periods are spaced geometrically; the time is rounded to float32 first, as the published
    implementations do, because the shortest period turns 6e-8 of time into 1e-4 of angle.
    """
    shortest, longest = periods
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64)
    period = shortest * (longest / shortest) ** fraction
    angle = 2 * math.pi / period * torch.tensor(time, dtype=torch.float32).double()
    return torch.cat([angle.sin(), angle.cos()]).float()[None]
