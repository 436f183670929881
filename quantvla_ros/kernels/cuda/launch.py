# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions of torch tensors: shapes in, launches out. Chooses tiles, owns nothing.

Works on any device that Triton runs on; under its interpreter also on the CPU. A caller brings
every output and the workspace, so that a captured graph touches planned memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.kernels.cuda import product as product_kernels
from quantvla_ros.kernels.cuda import tokens as token_kernels
from quantvla_ros.kernels.cuda.language import MISSING, triton
from quantvla_ros.kernels.cuda.pack import DeviceWeight
from quantvla_ros.kernels.cuda.tiles import FEW, OVERLAPPED, Chip, Problem, Tile, choose, ways
from quantvla_ros.kernels.reference import TOP, block_hadamard


@lru_cache(maxsize=8)
def chip_of(device: torch.device) -> Chip:
    """Compute capability and size of a device; a CPU stands for a small chip, interpreted."""
    if device.type != 'cuda':
        return Chip('interpreted', 4)
    properties = torch.cuda.get_device_properties(device)
    return Chip(f'sm_{properties.major}{properties.minor}', properties.multi_processor_count)


@lru_cache(maxsize=8)
def signs(device: torch.device) -> Tensor:
    """The 64 x 64 Hadamard matrix of +-1, int8."""
    return (block_hadamard(torch.eye(64), 64) * 8).to(torch.int8).to(device)


@lru_cache(maxsize=8)
def nothing(device: torch.device) -> Tensor:
    """Stands where a kernel takes an operand that it does not read."""
    return torch.zeros(64, device=device)


def language() -> object:
    """Return Triton. Raises ValueError that says how to get it."""
    if MISSING:
        raise ValueError(MISSING)
    return triton


class Workspace:
    """Partial sums of split products and the counters of their tiles; of one stream alone.

    Grows until `freeze`, then never again: a captured graph holds its addresses.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.frozen = False
        self.partial = torch.empty(0, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)

    def reserve(self, numbers: int, tiles: int) -> None:
        """Hold at least so many partial sums and counters."""
        if numbers <= self.partial.numel() and tiles <= self.count.numel():
            return
        if self.frozen:
            raise RuntimeError('a product needs more workspace than was planned')
        if numbers > self.partial.numel():
            self.partial = torch.empty(numbers, dtype=torch.int32, device=self.device)
        if tiles > self.count.numel():
            self.count = torch.zeros(tiles, dtype=torch.int32, device=self.device)

    def freeze(self) -> None:
        """Refuse to grow from now on."""
        self.frozen = True


@dataclass(frozen=True, eq=False)
class Take:
    """How a product wants its tokens. act_bits 16: as floats; kp: columns of a row as stored."""

    act_bits: int
    kp: int
    rotate: bool = False
    static: Tensor | None = None  # float32 (1,)
    diagonal: Tensor | None = None  # float32 (K,), multiplies before the rotation

    @property
    def top(self) -> int:
        """Largest integer, 0 for floats."""
        return 0 if self.act_bits == 16 else int(TOP[self.act_bits])


@dataclass(frozen=True, eq=False)
class Tokens:
    """What a product reads: floats (M, K), or int8 (M, KP) and float32 scales (M,)."""

    data: Tensor
    scale: Tensor | None = None

    def first(self, rows: int) -> Tokens:
        """The first rows."""
        return Tokens(self.data[:rows], None if self.scale is None else self.scale[:rows])


@dataclass(frozen=True, eq=False)
class Norm:
    """kind 'none', 'rms' or 'layer'; then times multiply, plus add: float32 (K,) or None."""

    kind: str = 'none'
    eps: float = 0.0
    multiply: Tensor | None = None
    add: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Branch:
    """What is to be added to a token before its norm: gate * (y + bias).

    y is (M, K), or (splits, M, K): raw sums of a split product, which token (M,) and row (K,)
    scales multiply.
    """

    y: Tensor
    bias: Tensor | None = None
    gate: Tensor | None = None
    token_scale: Tensor | None = None
    row_scale: Tensor | None = None


PLAIN = Norm()


def blocks_of(columns: int) -> int:
    """Power of two that covers a token in runs of 64; 16 at least, for the matrix units."""
    return max(16, 1 << (-(-columns // 64) - 1).bit_length())


def warps_of(columns: int, rows: int) -> int:
    """Warps that share a token; twice as many where few tokens leave most of the chip idle."""
    warps = 4 if columns <= 2048 else 8 if columns <= 8192 else 16
    return min(16, 2 * warps) if rows <= FEW else warps


def cast_of(dtype: torch.dtype) -> object:
    """Type in which a token is rotated: that of the model."""
    tl = language().language  # type: ignore[attr-defined]
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


def make_tokens(
    x: Tensor,
    columns: int,
    take: Take,
    out: Tokens,
    *,
    norm: Norm = PLAIN,
    branch: Branch | None = None,
    act: str = 'none',
    pair: bool = False,
    pdl: bool = False,
    ahead: bool = False,
) -> None:
    """Turn x (M, columns), or (M, 2 columns) for a pair, into tokens; x takes the branch in."""
    language()
    none = nothing(x.device)
    b = branch or Branch(none)
    started(token_kernels.tokens, (x.shape[0],), ahead)(
        x, b.y, b.bias if b.bias is not None else none, b.gate if b.gate is not None else none,
        x, norm.multiply if norm.multiply is not None else none,
        norm.add if norm.add is not None else none,
        take.diagonal if take.diagonal is not None else none, signs(x.device), out.data,
        out.scale if out.scale is not None else none,
        take.static if take.static is not None else none,
        b.token_scale if b.token_scale is not None else none,
        b.row_scale if b.row_scale is not None else none,
        x.shape[0], x.stride(0), columns, out.data.stride(0), norm.eps,
        PARTS=b.y.shape[0] if b.token_scale is not None else 0,
        ROWS=b.row_scale is not None, BLOCKS=blocks_of(out.data.stride(0)), PAIR=pair,
        ACT=act, BRANCH=branch is not None,
        BRANCH_BIAS=b.bias is not None, GATE=b.gate is not None, NORM=norm.kind,
        MULTIPLY=norm.multiply is not None, ADD=norm.add is not None, TOP=take.top,
        DIAGONAL=take.diagonal is not None, ROTATE=take.rotate,
        STATIC=take.static is not None, CAST=cast_of(x.dtype), PDL=pdl,
        num_warps=warps_of(columns, x.shape[0]), enable_fp_fusion=False, **launched(pdl),
    )


def launched(pdl: bool) -> dict[str, bool]:
    """Option of a launch that may begin before the kernel ahead of it has ended."""
    return {'launch_pdl': True} if pdl else {}


def fetches(rows: int, pdl: bool, device: torch.device) -> bool:
    """Whether a product asks for its weights before the kernel ahead has ended."""
    return pdl and rows <= FEW and 'fetch' in ways(chip_of(device))


def started(kernel: Any, grid: tuple[int, ...], ahead: bool) -> Any:
    """How to call a kernel: to run, or ahead of that only to be compiled."""
    return partial(kernel.warmup, grid=grid) if ahead else kernel[grid]


@dataclass(frozen=True, eq=False)
class Epilogue:
    """What follows a product; see product.py. gate and biases float32 (N,)."""

    bias: Tensor | None = None
    act: str = 'none'
    up: DeviceWeight | None = None
    up_bias: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None


NO_EPILOGUE = Epilogue()


@dataclass(frozen=True, eq=False)
class Turned:
    """A product of queries, keys and values, rows in pairs (pack.paired): positions and cache.

    cosine, sine float32 (positions, half); k_out, v_out (capacity, groups * width): rows from
    length[0] on, or from 0. queries, values: where the rows of keys and of values begin.
    """

    cosine: Tensor
    sine: Tensor
    k_out: Tensor
    v_out: Tensor
    queries: int
    values: int
    length: Tensor | None = None


def turn_operands(turn: Turned | None, none: Tensor) -> tuple[Tensor, ...]:
    """What fused.py and overlapped.py are given of it, or as many that nobody reads."""
    if turn is None:
        return (none,) * 5
    length = none if turn.length is None else turn.length
    return turn.cosine, turn.sine, length, turn.k_out, turn.v_out


def turn_strides(turn: Turned | None) -> tuple[int, int]:
    """From one row of the cache of keys, and of values, to the next."""
    return (0, 0) if turn is None else (turn.k_out.stride(-2), turn.v_out.stride(-2))


def turn_constants(turn: Turned | None) -> dict[str, Any]:
    """The constants of such a call."""
    if turn is None:
        return {'TURN': 0, 'QUERIES': 0, 'VALUES': 0, 'LENGTH': False}
    return {'TURN': turn.cosine.shape[-1], 'QUERIES': turn.queries, 'VALUES': turn.values,
            'LENGTH': turn.length is not None}


def problem_of(weight: DeviceWeight, rows: int, follows: str = '') -> Problem:
    """What decides on the tile of a product. follows: see Problem."""
    return Problem(weight.bits, rows, weight.shape[0], weight.padded[1], weight.group,
                   weight.pack, follows)


def described(data: Tensor, rows: int, columns: int) -> Any:
    """A matrix as the copy engine reads it, in blocks of rows and columns."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(data, list(data.shape), list(data.stride()), [rows, columns])


def run_product(
    tokens: Tokens,
    weight: DeviceWeight,
    out: Tensor,
    workspace: Workspace,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    tile: Tile | None = None,
    pdl: bool = False,
    ahead: bool = False,
) -> None:
    """out (M, N), rows may lie apart, = epilogue(tokens W^T). ahead: compile, and run nothing."""
    language()
    rows, e, none = tokens.data.shape[0], epilogue, nothing(out.device)
    if not rows:
        return
    n = weight.shape[0]
    follows = 'gated' if e.up is not None else ''
    t = tile or choose(problem_of(weight, rows, follows), chip_of(out.device))
    if t.bulk == OVERLAPPED:
        from quantvla_ros.kernels.cuda import launch_overlapped

        if launch_overlapped.can(t):
            launch_overlapped.run_overlapped(tokens, weight, out, e, t, pdl=pdl, ahead=ahead)
            return
    count = -(-rows // t.bm) * -(-n // t.bn)
    if t.split > 1:
        workspace.reserve(count * t.split * t.bm * t.bn * (2 if e.up else 1), count)
    sums = workspace.partial
    up = e.up or weight
    x, w, u = tokens.data, weight.data, up.data
    if t.bulk:
        x = described(x, t.bm, t.bk)
        w, u = described(w, t.bn, t.bk), described(u, t.bn, t.bk)
    started(product_kernels.product, (count, t.split), ahead)(
        x, tokens.scale, w, weight.scales,
        e.bias if e.bias is not None else none, u, up.scales,
        e.up_bias if e.up_bias is not None else none, e.gate if e.gate is not None else none,
        e.residual if e.residual is not None else none, out,
        sums.view(torch.float32) if weight.group else sums, workspace.count, weight.data,
        rows, n, weight.padded[1], weight.padded[0], out.stride(0),
        BITS=weight.bits, GROUP=weight.group, PACK=weight.pack, UP=e.up is not None, ACT=e.act,
        BIAS=e.bias is not None, UP_BIAS=e.up_bias is not None, GATE=e.gate is not None,
        RESIDUAL=e.residual is not None, BM=t.bm, BN=t.bn, BK=t.bk, SPLIT=t.split,
        BULK=bool(t.bulk), PDL=pdl, FETCH=fetches(rows, pdl, out.device),
        num_warps=t.warps, num_stages=t.stages, **launched(pdl),
    )


def run_euler(
    x: Tensor, velocity: Tensor, target: Tensor, weight: Tensor, out: Tensor,
    *, time_left: float, step: float, pull: float, pdl: bool = False,
) -> None:
    """One step of Euler's method with guidance, in place on x float32 (rows, width)."""
    language()
    token_kernels.euler[(-(-x.numel() // 1024),)](
        x, velocity, target, weight, out, x.numel(), x.shape[-1], time_left, step, pull,
        BLOCK=1024, PDL=pdl, num_warps=4, **launched(pdl),
    )
