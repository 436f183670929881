# SPDX-License-Identifier: Apache-2.0
"""Attention's kernels as functions of torch tensors; launch.py has the other kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.kernels.cuda import attention as attention_kernels
from quantvla_ros.kernels.cuda.launch import (
    Take,
    Tokens,
    blocks_of,
    cast_of,
    language,
    launched,
    nothing,
    signs,
    started,
    warps_of,
)
from quantvla_ros.kernels.cuda.tiles import Chip, stored

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Split:
    """How an attention is cut: bq rows and bs keys of a tile, splits of the keys."""

    bq: int
    bs: int
    parts: int
    warps: int
    stages: int


def choose_split(rows: int, keys: int, heads: int, width: int, chip: Chip) -> Split:
    """Rows of one key-value head, keys, key-value heads (all batches), head width."""
    known = _stored(rows, keys, heads, width, chip)
    if known is not None:
        return known
    wide = width > 128
    if rows > 1024:  # a prefix: enough tiles without splitting
        # before Hopper the sums stand in registers twice as long, and 128 rows would spill
        return Split(128 if chip.hopper else 64, 32 if wide else 64, 1, 8, 2)
    bq = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = -(-rows // bq) * heads
    parts = 1  # the join reads every part of every token, so that more soon cost what they save
    while parts < 8 and tiles * parts <= chip.processors and keys // (parts * 2) >= 32:
        parts *= 2
    return Split(bq, 32 if wide else 64, parts, 4 if not wide else 8, 2)


def _stored(rows: int, keys: int, heads: int, width: int, chip: Chip) -> Split | None:
    """What was measured for such an attention, within an octave of rows and keys."""
    def distance(entry: Mapping[str, Any]) -> float:
        return abs(math.log2(entry['rows'] / rows)) + abs(math.log2(entry['keys'] / keys))

    entries = [entry for entry in stored().get(chip.name, {}).get('attention', [])
               if (entry['heads'], entry['width']) == (heads, width)]
    best = min(entries, key=distance, default=None)
    return None if best is None or distance(best) > 1.0 else Split(*best['split'])


@dataclass(frozen=True, eq=False)
class Keys:
    """A run of keys and values: (batch, S, stride) each, head g at columns g * width.

    length: int32 (1,) on the device, or None; `extra` keys stand behind it.
    """

    k: Tensor
    v: Tensor
    groups: int
    width: int
    extra: int
    length: Tensor | None = None
    most: int = 0  # keys there can be, for the choice of splits


@dataclass(frozen=True, eq=False)
class Parts:
    """Scratch of a split attention: averages of values; weights and maxima in float32."""

    values: Tensor
    sums: Tensor
    largest: Tensor

    @classmethod
    def make(cls, splits: int, rows: int, heads: int, width: int, device: torch.device,
             dtype: torch.dtype = torch.float32) -> Parts:
        """Hold `splits` parts of (rows, heads * width)."""
        values = torch.empty(splits, rows, heads * width, dtype=dtype, device=device)
        return cls(values, *(torch.empty(splits, rows, heads, device=device) for _ in range(2)))


def run_attend(
    q: Tensor,
    keys: Keys,
    heads: int,
    out: Tensor | Parts,
    split: Split,
    *,
    batch: int = 1,
    causal: bool = False,
    pdl: bool = False,
    ahead: bool = False,
) -> None:
    """q (batch * tokens, heads * width), rows may lie apart, over keys -> out like q, or parts.

    ahead: compile, and run nothing.
    """
    language()
    tokens = q.shape[0] // batch
    share, width = heads // keys.groups, keys.width
    parts = out if isinstance(out, Parts) else None
    target = out.values if isinstance(out, Parts) else out
    none = nothing(q.device)
    full = q.dtype is torch.float32
    grid = (-(-tokens * share // split.bq), split.parts, batch * keys.groups)
    started(attention_kernels.attend, grid, ahead)(
        q, keys.k, keys.v, target, parts.sums if parts else none,
        parts.largest if parts else none, keys.length if keys.length is not None else none,
        LOG2E / math.sqrt(width), tokens * share, keys.extra, q.stride(0), keys.k.stride(-2),
        keys.v.stride(-2), target.stride(0) if parts is None else 0,
        keys.k.stride(0) if keys.k.ndim == 3 else 0, keys.v.stride(0) if keys.v.ndim == 3 else 0,
        tokens, SHARE=share, D=width, DP=max(16, 1 << (width - 1).bit_length()), BQ=split.bq,
        BS=split.bs, SPLIT=split.parts, LENGTH=keys.length is not None, CAUSAL=causal,
        HEADS=heads, PRECISION='ieee' if full else 'tf32', PDL=pdl,
        num_warps=split.warps, num_stages=split.stages, **launched(pdl),
    )


def run_join(
    parts: Parts, split: int, width: int, take: Take, out: Tokens, dtype: torch.dtype,
    *, pdl: bool = False, ahead: bool = False,
) -> None:
    """Join `split` parts into the tokens of the product that follows."""
    language()
    rows, heads = parts.sums.shape[1:]
    none = nothing(parts.values.device)
    started(attention_kernels.join, (rows,), ahead)(
        parts.values, parts.sums, parts.largest,
        take.diagonal if take.diagonal is not None else none, signs(parts.values.device),
        out.data,
        out.scale if out.scale is not None else none,
        take.static if take.static is not None else none, rows, heads * width,
        out.data.stride(0), BLOCKS=blocks_of(out.data.stride(0)), D=width, HEADS=heads,
        SPLIT=split, TOP=take.top, DIAGONAL=take.diagonal is not None, ROTATE=take.rotate,
        STATIC=take.static is not None,
        CAST=cast_of(dtype), PDL=pdl, num_warps=min(16, 2 * warps_of(heads * width, rows)),
        enable_fp_fusion=False, **launched(pdl),
    )


@dataclass(frozen=True, eq=False)
class Turn:
    """Positions and head norms of an attention. q_norm, k_norm float32 (width,) or None."""

    heads: int
    groups: int
    width: int
    cosine: Tensor
    sine: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0


def run_turn(
    qkv: Tensor, turn: Turn, q_out: Tensor, k_out: Tensor, v_out: Tensor,
    length: Tensor | None = None, *, pdl: bool = False,
) -> None:
    """qkv (tokens, heads and twice groups of width) -> q_out, and rows of k_out and v_out."""
    language()
    none = nothing(qkv.device)
    half = turn.width // 2
    attention_kernels.turn[(qkv.shape[0], 2)](
        qkv, turn.q_norm if turn.q_norm is not None else none,
        turn.k_norm if turn.k_norm is not None else none, turn.cosine, turn.sine, q_out, k_out,
        v_out, length if length is not None else none, qkv.stride(0), k_out.stride(-2),
        v_out.stride(-2), turn.eps, HEADS=turn.heads, GROUPS=turn.groups, HALF=half,
        HP=1 << (half - 1).bit_length(),
        HEAD_BLOCK=1 << (max(turn.heads, turn.groups) - 1).bit_length(),
        LENGTH=length is not None, NORM=turn.q_norm is not None, PDL=pdl,
        num_warps=4, **launched(pdl),
    )
