# SPDX-License-Identifier: Apache-2.0
"""Triton: 4-bit codes -> 8-bit ones, for products of many tokens.

Where arithmetic and not memory decides, a product spends its time on unpacking. What is widened
once, beside the products of the layer before, costs it nothing.
"""

from __future__ import annotations

from torch import Tensor

from quantvla_ros.kernels.cuda.language import jit, tl
from quantvla_ros.kernels.cuda.launch import language
from quantvla_ros.kernels.cuda.pack import DeviceWeight, block_columns

RUNS = 64  # halves of a block that one program widens


@jit
def widen(w, out, count, HALF: tl.constexpr, RUNS: tl.constexpr):
    """w: bytes of nibbles; out: twice as many codes. count: halves of blocks in w."""
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    inside = run < count
    packed = tl.load(w + run * HALF + lane, mask=inside, other=0)
    place = out + run * (2 * HALF) + lane
    tl.store(place, (packed << 4).to(tl.int8) >> 4, mask=inside)
    tl.store(place + HALF, packed >> 4, mask=inside)


def wide_view(weight: DeviceWeight, data: Tensor) -> DeviceWeight:
    """The weight as it will be in `data`, int8 of rows times columns as padded."""
    pack = block_columns(8, weight.padded[1], weight.group)
    return DeviceWeight(8, weight.shape, weight.padded, weight.group, pack,
                        data.view(weight.padded), weight.scales)


def run_widen(weight: DeviceWeight, wide: DeviceWeight) -> None:
    """Write the codes of a 4-bit weight into the wide one."""
    language()
    half = weight.pack // 2
    count = weight.data.numel() // half
    widen[(-(-count // RUNS),)](weight.data, wide.data, count, HALF=half, RUNS=RUNS, num_warps=4)


def room(weight: DeviceWeight) -> int:
    """Bytes of the wide weight."""
    return weight.padded[0] * weight.padded[1]
