# SPDX-License-Identifier: Apache-2.0
"""SigLIP's vision tower, as pi0, pi0.5, GR00T N1.5 and SmolVLA use it.

Patches, learned positions, pre-norm layers, a last norm. The pooling head that some checkpoints
store is not built: no policy here reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantvla_ros.policies.blocks import Attention, Heads, Mlp, gelu_tanh

EPS = 1e-6


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a tower; the defaults are So400m/14 at 224 pixels."""

    width: int = 1152
    depth: int = 27
    hidden: int = 4304
    heads: int = 16
    patch: int = 14
    image: int = 224

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image // self.patch) ** 2


class VisionLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(c.width, eps=EPS)
        self.attn = Attention(c.width, Heads(c.heads, c.heads, c.width // c.heads), bias=True)
        self.mlp_norm = nn.LayerNorm(c.width, eps=EPS)
        self.mlp = Mlp(c.width, c.hidden, gelu_tanh)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class VisionTower(nn.Module):
    """Images to tokens."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.config = c
        self.patch = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.position = nn.Parameter(torch.zeros(c.tokens, c.width))
        self.layers = nn.ModuleList(VisionLayer(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        """(V, 3, image, image) in [-1, 1] -> (V, tokens, width)."""
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
