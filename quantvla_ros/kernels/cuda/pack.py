# SPDX-License-Identifier: Apache-2.0
"""Canonical weights -> the order that kernels/cuda/product.py reads. Plain torch, any device.

Rows are padded to 128 and columns to whole blocks, with zeros that add nothing. 2-bit codes live
in 4-bit fields here and rows of mixed widths in 8-bit ones: their gain on a GPU is no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quantvla_ros.kernels.weights import MixedWeight, PackedWeight, Weight, unpack

ROWS = 128
EIGHT = 8  # rows between two that one thread of the matrix units holds


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A weight in the order of the kernel; see product.py for data and scales.

    shape (N, K) as stored; padded (NP, KP) as held; pack: columns of one block.
    """

    bits: int
    shape: tuple[int, int]
    padded: tuple[int, int]
    group: int
    pack: int
    data: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales))


def block_columns(bits: int, columns: int, group: int) -> int:
    """Columns of one block: two groups for 4 bits, so that a half of it shares one scale."""
    if group:
        return 2 * group if bits == 4 else group
    return 256 if columns % 256 == 0 else 128


def padded_columns(bits: int, columns: int, group: int) -> int:
    """KP: K in whole blocks, at least of 128 columns, because tokens are read in runs of 64."""
    block = max(block_columns(bits, columns, group), 128)
    return -(-columns // block) * block


def nibbles(codes: Tensor, block: int) -> Tensor:
    """int8 codes (N, KP) in -8 .. 7 -> int8 bytes (N, KP / 2): low nibbles, then high ones."""
    halves = codes.unflatten(1, (-1, 2, block // 2))
    return ((halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)).flatten(1).contiguous()


def from_nibbles(data: Tensor, block: int) -> Tensor:
    """Undo nibbles."""
    parts = data.unflatten(1, (-1, block // 2))
    low = ((parts << 4).to(torch.int8) >> 4)
    return torch.stack([low, parts >> 4], 2).flatten(1)


def to_device(weight: Weight, device: torch.device) -> DeviceWeight:
    """Bring a weight to a device. Raises ValueError for rows at 16 bits."""
    if isinstance(weight, MixedWeight):
        return _mixed(weight, device)
    if weight.bits == 16:
        raise ValueError('rows at 16 bits have no integer product; keep this layer in float')
    rows, columns = weight.shape
    bits = 4 if weight.bits in (2, 4) else 8
    codes = unpack(weight).to(device)
    return _build(bits, codes, weight.scales.to(device), weight.group, (rows, columns))


def _build(
    bits: int, codes: Tensor, scales: Tensor, group: int, shape: tuple[int, int]
) -> DeviceWeight:
    rows, columns = shape
    pack = block_columns(bits, columns, group)
    width = padded_columns(bits, columns, group)
    height = -(-rows // ROWS) * ROWS
    codes = F.pad(codes, (0, width - columns, 0, height - rows))
    count = width // group if group else 1
    scales = F.pad(scales.float(), (0, count - scales.shape[1], 0, height - rows))
    data = nibbles(codes, pack) if bits == 4 else codes.contiguous()
    return DeviceWeight(bits, shape, (height, width), group, pack, data, scales.T.contiguous())


def _mixed(weight: MixedWeight, device: torch.device) -> DeviceWeight:
    """Rows of several widths, each at its own integers, in 8-bit fields and in their order."""
    parts: tuple[PackedWeight, ...] = weight.parts
    if any(part.bits == 16 for part in parts) or len({part.group for part in parts}) > 1:
        raise ValueError('on a GPU, rows of mixed widths need integers throughout and one group '
                         'for all; keep this layer in float')
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.int8)
    scales = torch.zeros(rows, parts[0].scales.shape[1])
    held = sum(part.shape[0] for part in parts)
    codes[weight.order[:held]] = torch.cat([unpack(part) for part in parts])
    scales[weight.order[:held]] = torch.cat([part.scales for part in parts])
    return _build(8, codes.to(device), scales.to(device), parts[0].group, (rows, columns))


def in_eights(first: Tensor, second: Tensor) -> Tensor:
    """Eight of one, eight of the other, along the first axis: what fused.pairs_of takes apart."""
    if first.shape != second.shape or first.shape[0] % EIGHT:
        raise ValueError(f'rows come in eights; {first.shape[0]} and {second.shape[0]} do not')
    return torch.stack([first.unflatten(0, (-1, EIGHT)), second.unflatten(0, (-1, EIGHT))],
                       1).flatten(0, 2)


def pair_order(rows: int, turned: int, width: int) -> Tensor:
    """Order in which columns i and i + width / 2 of each head of `turned` rows are in eights."""
    order = torch.arange(rows)
    halves = order[:turned].view(-1, 2, width // 2).transpose(0, 1).flatten(1)
    return torch.cat([in_eights(halves[0], halves[1]), order[turned:]])


def paired(weight: DeviceWeight, width: int) -> DeviceWeight:
    """The rows of queries, keys and values, all of heads of one width, as put_pairs wants them."""
    order = pair_order(weight.padded[0], weight.shape[0], width).to(weight.data.device)
    return replace(weight, data=weight.data[order], scales=weight.scales[:, order].contiguous())


def interleaved(gate: DeviceWeight, up: DeviceWeight) -> DeviceWeight:
    """Rows of gate and up in eights, for a gated pair in one product."""
    if (gate.bits, gate.group, gate.pack, gate.shape) != (up.bits, up.group, up.pack, up.shape):
        raise ValueError('on a GPU both halves of a gated pair need the same bits and group')
    if gate.shape[0] % EIGHT:
        raise ValueError(f'rows come in eights; {gate.shape[0]} do not')
    return replace(gate, shape=(2 * gate.shape[0], gate.shape[1]),
                   padded=(2 * gate.padded[0], gate.padded[1]),
                   data=in_eights(gate.data, up.data),
                   scales=in_eights(gate.scales.T, up.scales.T).T.contiguous())


def pair_of_biases(gate: Tensor | None, up: Tensor | None, rows: int) -> Tensor | None:
    """Biases in the order of interleaved rows; None where neither has one."""
    some = next((bias for bias in (gate, up) if bias is not None), None)
    if some is None:
        return None
    zero = torch.zeros(rows, device=some.device)
    first, second = ((zero if bias is None else bias).float() for bias in (gate, up))
    return in_eights(first, second)


def stack_rows(weights: list[DeviceWeight]) -> DeviceWeight:
    """Join weights that read the same tokens; each part's rows must be whole blocks of 128."""
    first = weights[0]
    same = {(w.bits, w.group, w.pack, w.padded[1], w.shape[1]) for w in weights}
    if len(same) != 1 or any(w.shape[0] != w.padded[0] for w in weights[:-1]):
        raise ValueError('only weights of one width, group and K, in whole blocks, can be joined')
    rows = sum(w.shape[0] for w in weights)
    return DeviceWeight(
        first.bits, (rows, first.shape[1]), (sum(w.padded[0] for w in weights), first.padded[1]),
        first.group, first.pack, torch.cat([w.data for w in weights]),
        torch.cat([w.scales for w in weights], 1).contiguous())
