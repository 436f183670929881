# SPDX-License-Identifier: Apache-2.0
"""Float linear layers whose weights stay in their file: one is in memory at a time.

A calibration compares a quantized network with its float teacher on a machine that may not hold
the teacher. The file is mapped, so what is read often stays in the system's page cache, which
gives way to whoever needs the memory. Slower than a loaded layer; serves no robot.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn


class StreamedLinear(nn.Module):
    """y = x W^T + b in float32; W (out, in) and b (out,) are read anew for each call."""

    def __init__(self, file: safe_open, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self._file, self._name, self._bias = file, name, linear.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self._file.get_tensor(f'{self._name}.weight').float()
        bias = self._file.get_tensor(f'{self._name}.bias').float() if self._bias else None
        return F.linear(x, weight, bias)


def stream_linears(net: nn.Module, names: Iterable[str], path: Path) -> None:
    """Leave the named linears of a network, which may be on the meta device, in their file."""
    file = safe_open(path, framework='pt')
    for name in names:
        linear = net.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, StreamedLinear(file, name, linear))
