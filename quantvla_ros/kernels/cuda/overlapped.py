# SPDX-License-Identifier: Apache-2.0
"""Gluon: product.py's product for Hopper, with the steps of its loop overlapped.

Triton waits for every product of integers before it begins the next one. Here the copy engine
fills a ring of tiles, and the matrix units multiply one step while they are given the next. The
ring is filled with weights before the kernel ahead has ended: no graph ever writes them.

8-bit weights are multiplied straight from shared memory. 4-bit ones are unpacked into registers,
which must not be written while they are multiplied: other programs on the processor fill that gap.
(Unpacked beside the ring instead, a step ahead, they asked too much of shared memory.)

The operands are product.py's, x and w descriptors. Tiles choose it by `bulk`; nothing else does.
Gluon changes from one Triton to the next, and nothing interprets it: with another version than 3.6
the same tile runs in product.py or fused.py.
"""

from __future__ import annotations

import os
from typing import Any

from quantvla_ros.kernels.cuda.language import VARIABLE, jit, triton
from quantvla_ros.kernels.cuda.product import activate, sixteenfold

HERE = (triton is not None and os.environ.get(VARIABLE) != '1'
        and triton.__version__.startswith('3.6.'))

if HERE:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    own: Any = gluon.jit
else:
    own = jit
    gl = hopper = mbarrier = tma = gdc_launch_dependents = gdc_wait = None


@own
def fetch_weights(x, w, w_tiles, ready, slot, step, there, row_n, BITS: gl.constexpr,
                  BK: gl.constexpr):
    """Have a step's weights brought into a slot of the ring, which waits for its tokens too."""
    bar = ready.index(slot)
    mbarrier.expect(bar, w.block_type.nbytes + x.block_type.nbytes * 8 // BITS, there)
    tma.async_copy_global_to_shared(w, [row_n, step * BK], bar, w_tiles.index(slot), there)


@own
def fetch_tokens(x, x_tiles, ready, slot, step, there, row_x, BITS: gl.constexpr,
                 PACK: gl.constexpr, BK: gl.constexpr):
    """Have a step's tokens brought into a slot of the ring: for 4 bits those of both nibbles."""
    bar, at = ready.index(slot), step * BK
    if BITS == 4:
        HALF: gl.constexpr = PACK // 2
        column = (at // HALF) * PACK + at % HALF
        tma.async_copy_global_to_shared(x, [row_x, column], bar, x_tiles.index(2 * slot), there)
        tma.async_copy_global_to_shared(x, [row_x, column + HALF], bar,
                                        x_tiles.index(2 * slot + 1), there)
    else:
        tma.async_copy_global_to_shared(x, [row_x, at], bar, x_tiles.index(slot), there)


@own
def begun(a, x_tile, acc):
    """Begin to add a W tile times a tile of tokens (BM, BK)."""
    return hopper.warpgroup_mma(a, x_tile.permute((1, 0)), acc, is_async=True)


@own
def sums(x, w, row_x, row_n, first, count, BITS: gl.constexpr, PACK: gl.constexpr,
         BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
         PDL: gl.constexpr, MMA: gl.constexpr):
    """Steps first .. first + count of a tile, (BN, BM) int32."""
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * 8 // BITS, BM, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    # a slot is given back a step later: until then its tiles may still be multiplied
    for slot in gl.static_range(STAGES - 1):
        fetch_weights(x, w, w_tiles, ready, slot, first + slot, slot < count, row_n, BITS, BK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for slot in gl.static_range(STAGES - 1):
        fetch_tokens(x, x_tiles, ready, slot, first + slot, slot < count, row_x, BITS, PACK, BK)
    acc = gl.zeros((BN, BM), gl.int32, layout=MMA)
    slot, phase, free = 0, 0, STAGES - 1
    for step in range(count):
        mbarrier.wait(ready.index(slot), phase)
        if BITS == 4:
            low, high = sixteenfold(w_tiles.index(slot).load(gl.DotOperandLayout(0, MMA, 4)))
            acc = begun(low, x_tiles.index(2 * slot), acc)
            acc = begun(high, x_tiles.index(2 * slot + 1), acc)
        else:
            acc = begun(w_tiles.index(slot), x_tiles.index(slot), acc)
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
        new, there = step + STAGES - 1, step + STAGES - 1 < count
        fetch_weights(x, w, w_tiles, ready, free, first + new, there, row_n, BITS, BK)
        fetch_tokens(x, x_tiles, ready, free, first + new, there, row_x, BITS, PACK, BK)
        if BITS == 4:  # registers that are multiplied must not be written
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        free = slot
        phase = gl.where(slot + 1 == STAGES, phase ^ 1, phase)
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
    return acc


@own(do_not_specialize=['M'])
def overlapped(
    x, sx, w, sw, bias, gate, residual, out, M, N, KP, out_stride,
    BITS: gl.constexpr, PACK: gl.constexpr, PAIR: gl.constexpr, RAW: gl.constexpr,
    ACT: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, PDL: gl.constexpr, MMA: gl.constexpr, STORE: gl.constexpr,
):
    """One tile (BN rows of W, BM tokens) of one split; grid (tiles, SPLIT), SPLIT > 1 with RAW.

    PAIR: rows are gate and up in eights. RAW: sums go to out (SPLIT, M, N).
    MMA, STORE: how threads hold a tile for the matrix units, and where they write it.
    """
    tile, split = gl.program_id(0), gl.program_id(1)
    across = gl.cdiv(M, BM)
    row_x, row_n = (tile % across) * BM, (tile // across) * BN
    steps = KP * BITS // (8 * BK)
    each = gl.cdiv(steps, SPLIT)
    acc = sums(x, w, row_x, row_n, split * each, gl.minimum(each, steps - split * each),
               BITS, PACK, BM, BN, BK, STAGES, PDL, MMA)
    rm = row_x + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    rn = row_n + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))
    if RAW:
        if BITS == 4:
            acc = acc >> 4  # 16 times too large; a shift loses nothing
        place = out + (split * M + rm)[None, :] * N + rn[:, None]
        gl.store(place, acc, mask=(rn < N)[:, None] & (rm < M)[None, :])
    else:
        token_scale = gl.load(sx + rm, mask=rm < M, other=0.0)
        if BITS == 4:
            token_scale = token_scale * 0.0625
        y = acc.to(gl.float32) * gl.load(sw + rn)[:, None] * token_scale[None, :]
        if BIAS:
            y += gl.load(bias + rn, mask=rn < N, other=0.0)[:, None]
        ROWS: gl.constexpr = BN // 2 if PAIR else BN
        if PAIR:
            eights = gl.permute(gl.reshape(y, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
            first, second = gl.split(eights)
            y = gl.reshape(activate(first, ACT) * second, (ROWS, BM))
        else:
            y = activate(y, ACT)
            if GATE:
                y = y * gl.load(gate + rn, mask=rn < N, other=0.0)[:, None]
        ro = row_n * ROWS // BN + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
        rm = row_x + gl.arange(0, BM, layout=gl.SliceLayout(0, STORE))
        inside = (ro < N * ROWS // BN)[:, None] & (rm < M)[None, :]
        place = out + rm[None, :] * out_stride + ro[:, None]
        if RESIDUAL:
            y = gl.convert_layout(y, STORE)
            y += gl.load(residual + rm[None, :] * N + ro[:, None], mask=inside, other=0.0).to(
                gl.float32)
            gl.store(place, y.to(out.dtype.element_ty), mask=inside)
        else:
            gl.store(place, gl.convert_layout(y.to(out.dtype.element_ty), STORE), mask=inside)
