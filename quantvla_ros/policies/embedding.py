# SPDX-License-Identifier: Apache-2.0
"""A table of words that stays on disk: a prompt reads a few rows of hundreds of thousands.

Exact, and no memory: neither of the process nor of an accelerator. Stands in the place of
nn.Embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Rows = Callable[[Sequence[int]], Tensor]  # numbers of rows -> (rows, width), as stored


class DiskEmbedding(nn.Module):
    """Reads the rows of a prompt each time; what is hot lies in the system's cache."""

    def __init__(self, rows: Rows, dtype: torch.dtype) -> None:
        super().__init__()
        self._rows, self._dtype = rows, dtype

    def forward(self, words: Tensor) -> Tensor:
        """(T,) int64 -> (T, width), exactly as the table holds them."""
        return self._rows(words.tolist()).to(words.device, self._dtype)
