# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for a card without touching it: processes that compile ahead use this.

What they leave in Triton's cache on disk is found by a process that launches the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from quantvla_ros.kernels.cuda.pack import DeviceWeight, block_columns, padded_columns


class Card:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        del device
        return 0

    def get_current_target(self) -> Any:
        """What is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        """Where the operands are."""
        return torch.device('cpu')


def pretend(capability: int) -> None:
    """Compile for such a card from now on; this process can launch nothing any more."""
    from triton.runtime import driver

    driver._active = Card(capability)


def hollow_weight(bits: int, group: int, rows: int, columns: int) -> DeviceWeight:
    """A weight of the right shape with nothing in it."""
    width, height = padded_columns(bits, columns, group), -(-rows // 128) * 128
    return DeviceWeight(
        bits, (rows, columns), (height, width), group, block_columns(bits, columns, group),
        torch.empty(height, width * bits // 8, dtype=torch.int8),
        torch.empty(width // group if group else 1, height))
