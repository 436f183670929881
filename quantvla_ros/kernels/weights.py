# SPDX-License-Identifier: Apache-2.0
"""The value that holds a low-bit weight: PackedWeight, and MixedWeight made of several.

Owns the canonical layout, the only one that is written to disk, and the way there and back.
Refuses what no kernel could serve. Chooses no scale and rounds nothing: that is quantization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUT = 'rows-v1'
# bits -> (lowest, highest integer); 8 bits leave out -128, which has no positive partner
RANGES = {2: (-2, 1), 4: (-8, 7), 8: (-127, 127)}
GROUPS = (0, 32, 64, 128)
MAX_COLUMNS = 1 << 16  # K: 127 * 255 * K must stay below 2**31


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight W of shape (N, K), every row at the same width: W[n, k] = q[n, k] * scale.

    bits    2, 4, 8 or 16
    shape   (N, K)
    group   columns that share a scale: 0 for the whole row, else 32, 64 or 128 (K divides by it)
    data    uint8 (N, ceil(K * bits / 8)) for 2 and 4 bits: q - lowest, lowest columns in the
            lowest bits of a byte, so byte j of a 4-bit row holds column 2j in its low nibble and
            column 2j + 1 in its high one; int8 (N, K) for 8 bits; bfloat16 (N, K) for 16 bits
    scales  float32 (N, 1) or (N, K / group); (N, 0) for 16 bits, which are not scaled
    layout  name of this order of bytes
    """

    bits: int
    shape: tuple[int, int]
    group: int
    data: Tensor
    scales: Tensor
    layout: str = LAYOUT

    def __post_init__(self) -> None:
        problem = _problem_with(self)
        if problem:
            raise ValueError(f'PackedWeight {self.shape} at {self.bits} bits: {problem}')

    @property
    def nbytes(self) -> int:
        """Bytes of the integers and their scales."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales))


@dataclass(frozen=True, eq=False)
class MixedWeight:
    """Rows of different widths, sorted by width so that each part is one uniform product.

    parts  from the widest to the narrowest, all with the same K; rows of 0 bits (pruned) have
           no part: they stand last in `order` and give zero (plus the bias)
    order  int64 (N,): row i of the stacked parts is row order[i] of the layer
    """

    parts: tuple[PackedWeight, ...]
    order: Tensor

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError('MixedWeight: expected at least one part')
        if len({part.shape[1] for part in self.parts}) != 1:
            shapes = [part.shape for part in self.parts]
            raise ValueError(f'MixedWeight: parts have shapes {shapes}; expected one K for all')
        count = self.order.numel()
        if not torch.equal(self.order.sort().values, torch.arange(count)):
            raise ValueError('MixedWeight: order is not a permutation of the rows')
        if sum(part.shape[0] for part in self.parts) > count:
            raise ValueError(f'MixedWeight: the parts have more rows than order, {count}')

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.order.numel(), self.parts[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and of the order (4 per row)."""
        return sum(part.nbytes for part in self.parts) + 4 * self.order.numel()


Weight = PackedWeight | MixedWeight


def _problem_with(weight: PackedWeight) -> str:
    rows, columns = weight.shape
    data, scales = weight.data, weight.scales
    if weight.layout != LAYOUT:
        return f'layout is {weight.layout!r}; this version reads {LAYOUT!r}'
    if weight.bits not in (2, 4, 8, 16):
        return 'expected 2, 4, 8 or 16 bits'
    if rows < 1 or not 1 <= columns <= MAX_COLUMNS:
        return f'expected at least one row and 1 to {MAX_COLUMNS} columns (32-bit sums)'
    if weight.group not in GROUPS:
        return f'group is {weight.group}; expected one of {GROUPS}'
    if weight.group and columns % weight.group:
        return f'K = {columns} is not a multiple of the group, {weight.group}'
    width = columns if weight.bits >= 8 else -(-columns * weight.bits // 8)
    dtype = {8: torch.int8, 16: torch.bfloat16}.get(weight.bits, torch.uint8)
    if tuple(data.shape) != (rows, width) or data.dtype != dtype:
        return f'data is {data.dtype} {tuple(data.shape)}; expected {dtype} {(rows, width)}'
    count = 0 if weight.bits == 16 else columns // weight.group if weight.group else 1
    if tuple(scales.shape) != (rows, count) or scales.dtype != torch.float32:
        seen = f'{scales.dtype} {tuple(scales.shape)}'
        return f'scales are {seen}; expected torch.float32 {(rows, count)}'
    if not bool(torch.isfinite(scales).all()):
        return 'a scale is not finite'
    if weight.bits == 8 and bool((data == -128).any()):
        return 'data holds -128; int8 weights are symmetric, -127 to 127'
    return ''


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """Pack integers (..., K) of RANGES[bits] as PackedWeight.data does; 8 bits only convert.

    Raises ValueError for an integer that does not fit.
    """
    low, high = RANGES[bits]
    if q.numel() and not (low <= int(q.min()) and int(q.max()) <= high):
        raise ValueError(
            f'integers run from {int(q.min())} to {int(q.max())}; {bits} bits hold {low} to {high}'
        )
    if bits == 8:
        return q.to(torch.int8).contiguous()
    fields = 8 // bits
    unsigned = (q - low).to(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -q.shape[-1] % fields))
    parts = unsigned.unflatten(-1, (-1, fields)).unbind(-1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * index)
    return packed


def unpack_integers(data: Tensor, bits: int, columns: int) -> Tensor:
    """Return the int8 integers (..., columns) that pack_integers packed."""
    if bits == 8:
        return data
    fields = torch.stack([data >> (bits * i) for i in range(8 // bits)], dim=-1)
    unsigned = (fields & (2**bits - 1)).flatten(-2)[..., :columns]
    return unsigned.to(torch.int8) + RANGES[bits][0]


def pack(q: Tensor, scales: Tensor, bits: int, group: int = 0) -> PackedWeight:
    """Make a PackedWeight from integers (N, K) and scales (N,), (N, 1) or (N, K / group)."""
    scales = scales.float().reshape(q.shape[0], -1).contiguous()
    shape = (int(q.shape[0]), int(q.shape[1]))
    return PackedWeight(bits, shape, group, pack_integers(q, bits), scales)


def keep(weight: Tensor) -> PackedWeight:
    """Keep rows (N, K) at 16 bits (bfloat16), for a part of a MixedWeight or a whole layer."""
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    data = weight.to(torch.bfloat16).contiguous()
    return PackedWeight(16, shape, 0, data, torch.empty(shape[0], 0))


def unpack(weight: PackedWeight) -> Tensor:
    """Return the integers (N, K) as int8, or the bfloat16 rows of 16 bits."""
    return weight.data if weight.bits == 16 else unpack_integers(
        weight.data, weight.bits, weight.shape[1]
    )


def dequantize(weight: Weight) -> Tensor:
    """Return W (N, K) in float32."""
    if isinstance(weight, MixedWeight):
        whole = torch.zeros(weight.shape)
        stacked = torch.cat([dequantize(part) for part in weight.parts])
        whole[weight.order[: len(stacked)]] = stacked
        return whole
    values = unpack(weight).float()
    if weight.bits == 16:
        return values
    grouped = values.unflatten(1, (weight.scales.shape[1], -1))
    return (grouped * weight.scales[:, :, None]).flatten(1)


def mix(parts: Sequence[tuple[PackedWeight, Tensor]], rows: int) -> MixedWeight:
    """Make a MixedWeight from (part, the rows that it holds); all other rows are pruned."""
    ordered = sorted(parts, key=lambda part: -part[0].bits)
    held = torch.cat([index.to(torch.int64) for _, index in ordered])
    pruned = torch.ones(rows, dtype=torch.bool)
    pruned[held] = False
    order = torch.cat([held, pruned.nonzero().flatten()])
    return MixedWeight(tuple(part for part, _ in ordered), order)


def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Stack the rows of layers that read the same input (query, key, value) into one weight."""
    first = weights[0]
    if len({(w.bits, w.group, w.shape[1]) for w in weights}) != 1:
        raise ValueError('stack: expected weights of the same bits, group and K')
    rows = sum(w.shape[0] for w in weights)
    data = torch.cat([w.data for w in weights])
    scales = torch.cat([w.scales for w in weights])
    return PackedWeight(first.bits, (rows, first.shape[1]), first.group, data, scales)
