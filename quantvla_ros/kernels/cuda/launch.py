# SPDX-License-Identifier: Apache-2.0
"""The kernels as functions of torch tensors: shapes in, launches out. Chooses tiles, owns nothing.

Works on any device that Triton runs on; under its interpreter also on the CPU. A caller brings
every output and the workspace, so that a captured graph touches planned memory alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from quantvla_ros.kernels.cuda import attention as attention_kernels
from quantvla_ros.kernels.cuda import product as product_kernels
from quantvla_ros.kernels.cuda import tokens as token_kernels
from quantvla_ros.kernels.cuda.language import MISSING, triton
from quantvla_ros.kernels.cuda.pack import DeviceWeight
from quantvla_ros.kernels.cuda.tiles import Chip, Problem, Tile, choose
from quantvla_ros.kernels.reference import TOP, block_hadamard

LOG2E = 1.4426950408889634


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
    """What is to be added to a token before its norm: gate * (y + bias)."""

    y: Tensor
    bias: Tensor | None = None
    gate: Tensor | None = None


PLAIN = Norm()


def blocks_of(columns: int) -> int:
    """Power of two that covers a token in runs of 64; 16 at least, for the matrix units."""
    return max(16, 1 << (-(-columns // 64) - 1).bit_length())


def warps_of(columns: int) -> int:
    """Warps that share a token."""
    return 4 if columns <= 2048 else 8 if columns <= 8192 else 16


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
) -> None:
    """Turn x (M, columns), or (M, 2 columns) for a pair, into tokens; x takes the branch in."""
    language()
    none = nothing(x.device)
    b = branch or Branch(none)
    token_kernels.tokens[(x.shape[0],)](
        x, b.y, b.bias if b.bias is not None else none, b.gate if b.gate is not None else none,
        x, norm.multiply if norm.multiply is not None else none,
        norm.add if norm.add is not None else none,
        take.diagonal if take.diagonal is not None else none, signs(x.device), out.data,
        out.scale if out.scale is not None else none,
        take.static if take.static is not None else none,
        x.stride(0), columns, out.data.stride(0), norm.eps,
        BLOCKS=blocks_of(out.data.stride(0)), PAIR=pair, ACT=act, BRANCH=branch is not None,
        BRANCH_BIAS=b.bias is not None, GATE=b.gate is not None, NORM=norm.kind,
        MULTIPLY=norm.multiply is not None, ADD=norm.add is not None, TOP=take.top,
        DIAGONAL=take.diagonal is not None, ROTATE=take.rotate,
        STATIC=take.static is not None, CAST=cast_of(x.dtype), PDL=pdl,
        num_warps=warps_of(columns), enable_fp_fusion=False, **launched(pdl),
    )


def launched(pdl: bool) -> dict[str, bool]:
    """Option of a launch that may begin before the kernel ahead of it has ended."""
    return {'launch_pdl': True} if pdl else {}


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


def problem_of(weight: DeviceWeight, rows: int, gated: bool) -> Problem:
    """What decides on the tile of a product."""
    return Problem(weight.bits, rows, weight.shape[0], weight.padded[1], weight.group,
                   weight.pack, gated)


def run_product(
    tokens: Tokens,
    weight: DeviceWeight,
    out: Tensor,
    workspace: Workspace,
    epilogue: Epilogue = NO_EPILOGUE,
    *,
    tile: Tile | None = None,
    pdl: bool = False,
) -> None:
    """out (M, N), rows may lie apart, = epilogue(tokens W^T)."""
    language()
    rows, e, none = tokens.data.shape[0], epilogue, nothing(out.device)
    if not rows:
        return
    n = weight.shape[0]
    t = tile or choose(problem_of(weight, rows, e.up is not None), chip_of(out.device))
    count = -(-rows // t.bm) * -(-n // t.bn)
    if t.split > 1:
        workspace.reserve(count * t.split * t.bm * t.bn * (2 if e.up else 1), count)
    partial = workspace.partial
    up = e.up or weight
    product_kernels.product[(count, t.split)](
        tokens.data, tokens.scale, weight.data, weight.scales,
        e.bias if e.bias is not None else none, up.data, up.scales,
        e.up_bias if e.up_bias is not None else none, e.gate if e.gate is not None else none,
        e.residual if e.residual is not None else none, out,
        partial.view(torch.float32) if weight.group else partial, workspace.count,
        rows, n, weight.padded[1], weight.padded[0], out.stride(0),
        BITS=weight.bits, GROUP=weight.group, PACK=weight.pack, UP=e.up is not None, ACT=e.act,
        BIAS=e.bias is not None, UP_BIAS=e.up_bias is not None, GATE=e.gate is not None,
        RESIDUAL=e.residual is not None, BM=t.bm, BN=t.bn, BK=t.bk, SPLIT=t.split, PDL=pdl,
        num_warps=t.warps, num_stages=t.stages, **launched(pdl),
    )


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
    wide = width > 128
    if rows > 1024:  # a prefix: enough tiles without splitting
        # before Hopper the sums stand in registers twice as long, and 128 rows would spill
        return Split(128 if chip.hopper else 64, 32 if wide else 64, 1, 8, 2)
    bq = 16 if rows <= 16 else 32 if rows <= 32 else 64
    tiles = -(-rows // bq) * heads
    parts = 1
    while tiles * parts * 2 <= 2 * chip.processors and keys // (parts * 2) >= 32:
        parts *= 2
    return Split(bq, 32 if wide else 64, parts, 4 if not wide else 8, 2)


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
    """Float32 scratch of a split attention: sums of values, weights, maxima."""

    values: Tensor
    sums: Tensor
    largest: Tensor

    @classmethod
    def make(cls, splits: int, rows: int, heads: int, width: int, device: torch.device) -> Parts:
        """Hold `splits` parts of (rows, heads * width)."""
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(empty(splits, rows, heads * width), empty(splits, rows, heads),
                   empty(splits, rows, heads))


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
) -> None:
    """q (batch * tokens, heads * width), rows may lie apart, over keys -> out like q, or parts."""
    language()
    tokens = q.shape[0] // batch
    share, width = heads // keys.groups, keys.width
    parts = out if isinstance(out, Parts) else None
    target = out.values if isinstance(out, Parts) else out
    none = nothing(q.device)
    full = q.dtype is torch.float32
    attention_kernels.attend[(-(-tokens * share // split.bq), split.parts, batch * keys.groups)](
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
    *, pdl: bool = False,
) -> None:
    """Join `split` parts into the tokens of the product that follows."""
    language()
    rows, heads = parts.sums.shape[1:]
    none = nothing(parts.values.device)
    attention_kernels.join[(rows,)](
        parts.values, parts.sums, parts.largest,
        take.diagonal if take.diagonal is not None else none, signs(parts.values.device),
        out.data,
        out.scale if out.scale is not None else none,
        take.static if take.static is not None else none, rows, heads * width,
        out.data.stride(0), BLOCKS=blocks_of(out.data.stride(0)), D=width, HEADS=heads,
        SPLIT=split, TOP=take.top, DIAGONAL=take.diagonal is not None, ROTATE=take.rotate,
        STATIC=take.static is not None,
        CAST=cast_of(dtype), PDL=pdl, num_warps=warps_of(heads * width),
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
