# SPDX-License-Identifier: Apache-2.0
"""The product of overlapped.py as a function of torch tensors; launch.py chooses it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from quantvla_ros.kernels.cuda import overlapped as kernels
from quantvla_ros.kernels.cuda.launch import (
    Epilogue,
    Tokens,
    Turned,
    launched,
    nothing,
    started,
    turn_constants,
    turn_operands,
    turn_strides,
)
from quantvla_ros.kernels.cuda.pack import DeviceWeight
from quantvla_ros.kernels.cuda.tiles import OVERLAPPED, Tile


def can(tile: Tile, turn: Turned | None = None) -> bool:
    """Whether a tile asks for this kernel, lies in one head, and this Triton can compile it."""
    whole = turn is None or 2 * turn.cosine.shape[-1] % tile.bn == 0
    return tile.bulk == OVERLAPPED and kernels.HERE and whole


@lru_cache(maxsize=64)
def shared(rows: int, columns: int) -> Any:
    """How a tile of bytes lies in shared memory."""
    return kernels.gl.NVMMASharedLayout.get_default_for([rows, columns], kernels.gl.int8)


@lru_cache(maxsize=64)
def distributed(bm: int, bn: int, warps: int, halves: bool) -> tuple[Any, Any]:
    """How threads hold a tile of sums, and how they store it: 16 bytes each, along rows of W."""
    gl, rows = kernels.gl, bn // 2 if halves else bn
    along = min(32, rows // 8)
    return (gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, min(bm, 128), 32]),
            gl.BlockedLayout([8, 1], [along, 32 // along], [1, warps], [0, 1]))


def run_overlapped(
    tokens: Tokens, weight: DeviceWeight, out: Tensor, epilogue: Epilogue, tile: Tile,
    *, follows: str = '', turn: Turned | None = None, pdl: bool = False, ahead: bool = False,
) -> None:
    """out (M, N) = epilogue(tokens W^T). follows, turn: as in launch_fused, or ''."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    e, none, t = epilogue, nothing(out.device), tile
    rows, n = tokens.data.shape[0], weight.shape[0]
    x, w = (TensorDescriptor(data, list(data.shape), list(data.stride()), [block, t.bk],
                             shared(block, t.bk))
            for data, block in ((tokens.data, t.bm), (weight.data, t.bn)))
    pair, grid = follows == 'pair', (-(-rows // t.bm) * -(-n // t.bn), t.split)
    mma, store = distributed(t.bm, t.bn, t.warps, pair or turn is not None)
    started(kernels.overlapped, grid, ahead)(
        x, tokens.scale, w, weight.scales, e.bias if e.bias is not None else none,
        e.gate if e.gate is not None else none,
        e.residual if e.residual is not None else none, out,
        *turn_operands(turn, none), rows, n, weight.padded[1], out.stride(-2),
        *turn_strides(turn), BITS=weight.bits, PACK=weight.pack, PAIR=pair,
        RAW=follows == 'raw', ACT=e.act, **turn_constants(turn),
        BIAS=e.bias is not None, GATE=e.gate is not None, RESIDUAL=e.residual is not None,
        BM=t.bm, BN=t.bn, BK=t.bk, STAGES=t.stages, SPLIT=t.split, PDL=pdl, MMA=mma, STORE=store,
        num_warps=t.warps, **launched(pdl),
    )
