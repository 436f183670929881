# SPDX-License-Identifier: Apache-2.0
"""Smaller homes for a table of words, of which a prompt reads a few rows.

On the host: exact, no memory of the accelerator. In int8 with a scale per word: a quarter of
float32, off by at most half a step of its word's scale. Both stand in the place of nn.Embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HostEmbedding(nn.Module):
    """The table stays in host memory; the rows of a prompt travel to where the words are."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self._rows = table.weight.detach().to('cpu')  # no buffer: .to(device) must not move it

    def forward(self, words: Tensor) -> Tensor:
        """(T,) int64 -> (T, width), exactly as the table holds them."""
        return self._rows[words.to('cpu')].to(words.device)


class Int8Embedding(nn.Module):
    """codes int8 (words, width), scales float32 (words, 1), row = codes * scale."""

    codes: Tensor
    scales: Tensor

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        weight = table.weight.detach()
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer('codes', torch.round(weight.float() / scales).to(torch.int8))
        self.register_buffer('scales', scales)
        self.dtype = weight.dtype

    def forward(self, words: Tensor) -> Tensor:
        """(T,) int64 -> (T, width)."""
        return (self.codes[words].float() * self.scales[words]).to(self.dtype)
