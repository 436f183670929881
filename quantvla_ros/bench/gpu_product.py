# SPDX-License-Identifier: Apache-2.0
"""One product of a shape as a plan would launch it: checked against float64, and timed.

What follows a product, operands, what it should give: for `gpu_tune` and `gpu_check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantvla_ros.bench import gpu_gemm
from quantvla_ros.bench.gpu_time import Bench, Run, copies, microseconds, relative
from quantvla_ros.kernels.cuda import launch, launch_fused, tiles
from quantvla_ros.kernels.cuda.launch import Epilogue, Tokens, Turned, Workspace
from quantvla_ros.kernels.cuda.pack import DeviceWeight, padded_columns, pair_order

HEAD = 256
KNOWN = 3  # tokens that were turned before
PART_US = 0.15  # what the norm behind a raw product spends on each split, about


@dataclass(frozen=True)
class Shape:
    """A product to tune: tokens, rows, columns, kind ('w8a8'), and what follows."""

    m: int
    n: int
    k: int
    kind: str
    follows: str
    early: bool = False  # launched before the one ahead has ended, as in a denoising loop

    @property
    def gated(self) -> bool:
        """Whether there are two weights."""
        return self.follows == 'gated'

    @property
    def bits(self) -> int:
        """Width of a weight."""
        return gpu_gemm.OURS[self.kind][0]

    @property
    def group(self) -> int:
        """Columns that share a scale, 0 for a row."""
        return gpu_gemm.OURS[self.kind][1]


def epilogue_of(up: DeviceWeight | None) -> Epilogue:
    """As in a gated MLP, or nothing."""
    return Epilogue() if up is None else Epilogue(act='gelu_tanh', up=up)


def angles(positions: int, device: torch.device) -> Tensor:
    """Some angle for every position and pair of a head's columns."""
    pair = torch.arange(1, HEAD // 2 + 1, device=device)
    return torch.arange(positions, device=device)[:, None] * (pair / HEAD)


def turned(y: Tensor) -> Tensor:
    """Queries, keys and values (M, N), all but the last head turned by their positions."""
    heads = y.unflatten(1, (-1, 2, HEAD // 2))
    angle = angles(KNOWN + len(y), y.device)[KNOWN:, None].double()
    (a, b), c, s = heads[:, :-1].unbind(2), angle.cos(), angle.sin()
    both = torch.stack([a * c - b * s, b * c + a * s], 2)
    return torch.cat([both, heads[:, -1:]], 1).flatten(1)


class Call:
    """One product of a shape as a plan would launch it, with its outputs."""

    def __init__(self, shape: Shape, tile: tiles.Tile, dtype: torch.dtype, device: torch.device,
                 *, ahead: bool = False) -> None:
        self.shape, self.tile, self.ahead = shape, tile, ahead
        n = {'pair': shape.n // 2, 'turned': shape.n - 2 * HEAD}.get(shape.follows, shape.n)
        self.out = torch.empty(shape.m, n, dtype=dtype, device=device)
        if shape.follows == 'raw':
            kind = torch.float32 if shape.group else torch.int32
            self.out = torch.empty(tile.split, shape.m, n, dtype=kind, device=device)
        self.workspace = Workspace(device)
        k, v = (torch.empty(KNOWN + shape.m, HEAD, dtype=dtype, device=device) for _ in range(2))
        angle = angles(KNOWN + shape.m, device)
        self.turn = Turned(angle.cos(), angle.sin(), k, v, shape.n - 2 * HEAD, shape.n - HEAD,
                           torch.full((1,), KNOWN, dtype=torch.int32, device=device))

    def run(self, tokens: Tokens, weight: DeviceWeight, up: DeviceWeight | None) -> None:
        """Launch, or only compile."""
        follows = self.shape.follows
        if follows == 'pair':
            launch_fused.run_pair(tokens, weight, self.out, 'gelu_tanh', tile=self.tile,
                                  pdl=self.shape.early, ahead=self.ahead)
        elif follows == 'turned':
            launch_fused.run_turned(tokens, weight, self.out, self.turn, tile=self.tile,
                                    pdl=self.shape.early, ahead=self.ahead)
        elif follows == 'raw':
            launch_fused.run_raw(tokens, weight, self.out, self.tile, pdl=self.shape.early,
                                 ahead=self.ahead)
        else:
            launch.run_product(tokens, weight, self.out, self.workspace, epilogue_of(up),
                               tile=self.tile, pdl=self.shape.early, ahead=self.ahead)

    def poison(self) -> None:
        """Fill what is to be written with what no product gives."""
        self.out.fill_(torch.nan if self.out.is_floating_point() else -(1 << 30))
        self.turn.k_out.fill_(torch.nan)
        self.turn.v_out.fill_(torch.nan)

    def seen(self, tokens: Tokens, weight: DeviceWeight) -> Tensor:
        """What came out, as Products.wanted has it."""
        if self.shape.follows == 'turned':
            return torch.cat([self.out, self.turn.k_out[KNOWN:], self.turn.v_out[KNOWN:]], 1)
        if self.shape.follows != 'raw':
            return self.out
        assert tokens.scale is not None
        y = self.out.double().sum(0) * tokens.scale.double()[:, None]
        return y if self.shape.group else y * weight.scales[0, :self.shape.n].double()


class Products:
    """The products of one shape: count operands that rotate, and exact sums to compare with."""

    def __init__(self, shape: Shape, bench: Bench, count: int = 0) -> None:
        self.shape, self.bench = shape, bench

        def weight() -> DeviceWeight:
            return gpu_gemm.random_weight(shape.bits, shape.group, shape.n, shape.k, bench)

        first = weight()
        kp = padded_columns(shape.bits, shape.k, shape.group)
        self.tokens = gpu_gemm.random_tokens(shape.m, shape.k, kp, bench)
        count = count or copies(first.nbytes * (2 if shape.gated else 1), bench)
        self.pairs = [(w, weight() if shape.gated else None)
                      for w in [first, *(weight() for _ in range(count - 1))]]

    @property
    def problem(self) -> tiles.Problem:
        """What a tile is stored for."""
        return launch.problem_of(self.pairs[0][0], self.shape.m, self.shape.follows)

    def wanted(self) -> Tensor:
        """What the first pair gives, in float64."""
        weight, second = self.pairs[0]
        y = gpu_gemm.exact(self.tokens, weight)
        if self.shape.follows == 'turned':
            order = pair_order(self.shape.n, self.shape.n, HEAD)
            return turned(y[:, order.argsort().to(y.device)])
        if self.shape.follows == 'pair':
            gate, up = (part.flatten(1) for part in y.unflatten(1, (-1, 2, 8)).unbind(2))
            return torch.nn.functional.gelu(gate, approximate='tanh') * up
        if second is None:
            return y
        return (torch.nn.functional.gelu(y, approximate='tanh')
                * gpu_gemm.exact(self.tokens, second))

    def error(self, call: Call, wanted: Tensor) -> float:
        """How far a call is from what it should give, on an output that was poisoned."""
        call.poison()
        call.run(self.tokens, *self.pairs[0])
        return relative(call.seen(self.tokens, self.pairs[0][0]), wanted)

    def time(self, tile: tiles.Tile, wanted: Tensor) -> float:
        """Microseconds of a tile. Raises RuntimeError where its result is wrong."""
        call = Call(self.shape, tile, self.bench.dtype, self.bench.device)
        error = self.error(call, wanted)
        if error > gpu_gemm.BOUND:
            raise RuntimeError(f'{self.shape} {tile}: off by {error:.1e}')
        runs: list[Run] = [partial(call.run, self.tokens, *pair) for pair in self.pairs]
        parts = tile.split if self.shape.follows == 'raw' else 0
        return microseconds(runs, self.bench) + PART_US * parts
