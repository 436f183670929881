# SPDX-License-Identifier: Apache-2.0
"""The kernels of fused.py as functions of torch tensors; launch.py has the proven ones."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quantvla_ros.kernels.cuda import fused as kernels
from quantvla_ros.kernels.cuda import launch_overlapped
from quantvla_ros.kernels.cuda.launch import (
    Epilogue,
    Tokens,
    Turned,
    chip_of,
    described,
    fetches,
    language,
    launched,
    nothing,
    problem_of,
    started,
    turn_constants,
    turn_operands,
    turn_strides,
)
from quantvla_ros.kernels.cuda.pack import DeviceWeight
from quantvla_ros.kernels.cuda.tiles import Tile, choose


def run_pair(
    tokens: Tokens, weight: DeviceWeight, out: Tensor, act: str, bias: Tensor | None = None,
    *, tile: Tile | None = None, pdl: bool = False, ahead: bool = False,
) -> None:
    """out (M, N) = act(gate) * up, for a weight of 2 N rows (pack.interleaved)."""
    _run(tokens, weight, out, 'pair', bias, act=act, tile=tile, pdl=pdl, ahead=ahead)


def run_turned(
    tokens: Tokens, weight: DeviceWeight, q: Tensor, turn: Turned, bias: Tensor | None = None,
    *, tile: Tile | None = None, pdl: bool = False, ahead: bool = False,
) -> None:
    """Queries into q (M, queries), keys and values into the cache."""
    _run(tokens, weight, q, 'turned', bias, turn=turn, tile=tile, pdl=pdl, ahead=ahead)


def run_raw(
    tokens: Tokens, weight: DeviceWeight, out: Tensor, tile: Tile,
    *, pdl: bool = False, ahead: bool = False,
) -> None:
    """out (splits, M, N) int32, or float32 with groups: the sums of each split."""
    _run(tokens, weight, out, 'raw', None, tile=tile, pdl=pdl, ahead=ahead)


def _run(
    tokens: Tokens, weight: DeviceWeight, out: Tensor, follows: str, bias: Tensor | None,
    *, act: str = 'none', turn: Turned | None = None, tile: Tile | None, pdl: bool, ahead: bool,
) -> None:
    language()
    rows, none, n = tokens.data.shape[0], nothing(out.device), weight.shape[0]
    if not rows:
        return
    t = tile or choose(problem_of(weight, rows, follows), chip_of(out.device))
    if follows != 'raw':
        t = replace(t, split=1)
    if launch_overlapped.can(t, turn):
        launch_overlapped.run_overlapped(tokens, weight, out, Epilogue(bias, act), t,
                                         follows=follows, turn=turn, pdl=pdl, ahead=ahead)
        return
    x, w = tokens.data, weight.data
    if t.bulk:
        x, w = described(x, t.bm, t.bk), described(w, t.bn, t.bk)
    count = -(-rows // t.bm) * -(-n // t.bn)
    started(kernels.fused, (count, t.split), ahead)(
        x, tokens.scale, w, weight.scales, bias if bias is not None else none, out,
        *turn_operands(turn, none), weight.data,
        rows, n, weight.padded[1], weight.padded[0], out.stride(-2), *turn_strides(turn),
        BITS=weight.bits, GROUP=weight.group, PACK=weight.pack, ACT=act, BIAS=bias is not None,
        BM=t.bm, BN=t.bn, BK=t.bk, SPLIT=t.split, BULK=bool(t.bulk), RAW=follows == 'raw',
        PDL=pdl, **turn_constants(turn),
        FETCH=fetches(rows, pdl, out.device), num_warps=t.warps, num_stages=t.stages,
        **launched(pdl),
    )
