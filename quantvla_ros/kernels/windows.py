# SPDX-License-Identifier: Apache-2.0
"""Windows of a map as the tokens of a linear layer: what makes a convolution a product.

A map is (batch * height * width, channels), pixel after pixel, channels innermost. The window of
an output pixel is its token: row by row, channels innermost, zeros beyond the edge. Knows no
weight and no rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Window:
    """Square windows of `size` pixels, `stride` apart, over maps of height x width."""

    size: int
    stride: int
    pad: int
    height: int
    width: int
    batch: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1 or not 0 <= self.pad < self.size or self.batch < 1:
            raise ValueError(f'{self}: sizes below one, or a padding that is a window or more')
        if min(self.out_height, self.out_width) < 1:
            raise ValueError(f'{self}: no window fits into the map')

    def _across(self, length: int) -> int:
        return (length + 2 * self.pad - self.size) // self.stride + 1

    @property
    def out_height(self) -> int:
        """Rows of the map of outputs."""
        return self._across(self.height)

    @property
    def out_width(self) -> int:
        """Columns of the map of outputs."""
        return self._across(self.width)

    @property
    def tokens(self) -> int:
        """Windows of all maps of the batch."""
        return self.batch * self.out_height * self.out_width

    def of(self, x: Tensor) -> Tensor:
        """(batch * height * width, C) -> (tokens, size * size * C)."""
        channels = x.shape[1]
        maps = x.reshape(self.batch, self.height, self.width, channels)
        maps = F.pad(maps, (0, 0, self.pad, self.pad, self.pad, self.pad))
        cut = maps.unfold(1, self.size, self.stride).unfold(2, self.size, self.stride)
        return cut.permute(0, 1, 2, 4, 5, 3).reshape(self.tokens, self.size**2 * channels)


def window_rows(weight: Tensor) -> Tensor:
    """A convolution's weight (out, in, k, k) as the rows of a linear one, (out, k * k * in)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


class WindowLinear(nn.Module):
    """A linear layer in the place of a convolution: (B, C, H, W) -> (B, out, H', W').

    linear: any module that maps tokens (tokens, k * k * C) to (tokens, out). Raises ValueError for
    a convolution that is not square and plain.
    """

    def __init__(self, conv: nn.Conv2d, linear: nn.Module) -> None:
        super().__init__()
        sizes = (conv.kernel_size, conv.stride, conv.padding)
        square = all(isinstance(s, tuple) and s[0] == s[1] for s in sizes)
        if not square or conv.groups != 1 or conv.dilation != (1, 1) or (
                conv.padding_mode != 'zeros'):
            raise ValueError(f'{conv} is no square convolution of one group with zero padding')
        self.size, self.stride, self.pad = (int(cast(tuple[int, int], s)[0]) for s in sizes)
        self.linear = linear

    def window(self, height: int, width: int, batch: int) -> Window:
        """The windows over maps of this size."""
        return Window(self.size, self.stride, self.pad, height, width, batch)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution, but for what the linear layer rounds."""
        batch, channels, height, width = x.shape
        window = self.window(height, width, batch)
        y = self.linear(window.of(x.permute(0, 2, 3, 1).reshape(-1, channels)))
        y = y.reshape(batch, window.out_height, window.out_width, -1)
        return y.permute(0, 3, 1, 2)
