# SPDX-License-Identifier: Apache-2.0
"""Gluon: product.py's product of many tokens, for Hopper, with the steps of its loop overlapped.

Triton waits for every product of integers before it begins the next one. Here the copy engine
fills a ring of tiles, and the matrix units multiply one step while they are given the next: 8-bit
weights straight from shared memory, 4-bit ones from registers, unpacked meanwhile.

The operands are product.py's, x and w descriptors. Tiles choose it by `bulk` 2; nothing else does.
Gluon belongs to Triton 3.6 and is not in every version, nor is there an interpreter of it: where
it is missing, the same tile runs in product.py.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from quantvla_ros.kernels.cuda.language import VARIABLE, jit, triton
from quantvla_ros.kernels.cuda.product import activate, sixteenfold

HERE = (triton is not None and os.environ.get(VARIABLE) != '1'
        and importlib.util.find_spec('triton.experimental.gluon') is not None)

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
def fetch(x, w, x_tiles, w_tiles, ready, slot, step, there, row_x, row_n,
          BITS: gl.constexpr, PACK: gl.constexpr, BK: gl.constexpr):
    """Have the copy engine bring a step's tiles into a slot of the ring, if it is there."""
    at, bar = step * BK, ready.index(slot)
    PARTS: gl.constexpr = 8 // BITS
    mbarrier.expect(bar, w.block_type.nbytes + PARTS * x.block_type.nbytes, there)
    tma.async_copy_global_to_shared(w, [row_n, at], bar, w_tiles.index(slot), there)
    if BITS == 4:
        HALF: gl.constexpr = PACK // 2
        column = (at // HALF) * PACK + at % HALF
        tma.async_copy_global_to_shared(x, [row_x, column], bar, x_tiles.index(2 * slot), there)
        tma.async_copy_global_to_shared(x, [row_x, column + HALF], bar,
                                        x_tiles.index(2 * slot + 1), there)
    else:
        tma.async_copy_global_to_shared(x, [row_x, at], bar, x_tiles.index(slot), there)


@own
def unpack(packed, low_tile, high_tile, WARPS: gl.constexpr):
    """16 times the low and the high nibbles of a tile of bytes, into tiles of their own."""
    BK: gl.constexpr = packed.shape[1]
    ACROSS: gl.constexpr = BK // 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 16], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    low, high = sixteenfold(packed.load(LAYOUT))
    low_tile.store(low)
    high_tile.store(high)
    hopper.fence_async_shared()


@own
def sums(x, w, row_x, row_n, steps, BITS: gl.constexpr, PACK: gl.constexpr, BM: gl.constexpr,
         BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
         MMA: gl.constexpr):
    """All steps of a tile, (BN, BM) int32."""
    PARTS: gl.constexpr = 8 // BITS
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * PARTS, BM, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    # a slot is given back a step later: until then its tiles may still be multiplied
    for slot in gl.static_range(STAGES - 1):
        fetch(x, w, x_tiles, w_tiles, ready, slot, slot, slot < steps, row_x, row_n, BITS, PACK,
              BK)
    acc = gl.zeros((BN, BM), gl.int32, layout=MMA)
    slot, phase, free = 0, 0, STAGES - 1
    if BITS == 4:
        low_tiles = gl.allocate_shared_memory(gl.int8, [2, BN, BK], w.layout)
        high_tiles = gl.allocate_shared_memory(gl.int8, [2, BN, BK], w.layout)
        mbarrier.wait(ready.index(0), 0)
        unpack(w_tiles.index(0), low_tiles.index(0), high_tiles.index(0), WARPS)
    for step in range(steps):
        more = step + STAGES - 1 < steps
        following = gl.where(slot + 1 == STAGES, 0, slot + 1)
        next_phase = gl.where(slot + 1 == STAGES, phase ^ 1, phase)
        if BITS == 4:
            acc = hopper.warpgroup_mma(low_tiles.index(step & 1),
                                       x_tiles.index(2 * slot).permute((1, 0)), acc,
                                       is_async=True)
            acc = hopper.warpgroup_mma(high_tiles.index(step & 1),
                                       x_tiles.index(2 * slot + 1).permute((1, 0)), acc,
                                       is_async=True)
            acc = hopper.warpgroup_mma_wait(2, deps=[acc])
        else:
            mbarrier.wait(ready.index(slot), phase)
            acc = hopper.warpgroup_mma(w_tiles.index(slot), x_tiles.index(slot).permute((1, 0)),
                                       acc, is_async=True)
            acc = hopper.warpgroup_mma_wait(1, deps=[acc])
        fetch(x, w, x_tiles, w_tiles, ready, free, step + STAGES - 1, more, row_x, row_n, BITS,
              PACK, BK)
        if BITS == 4:  # while the step is multiplied; behind the last one for nothing
            mbarrier.wait(ready.index(following), next_phase, step + 1 < steps)
            other = (step + 1) & 1
            unpack(w_tiles.index(following), low_tiles.index(other), high_tiles.index(other),
                   WARPS)
        free, slot, phase = slot, following, next_phase
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(slot))
    return acc


@own(do_not_specialize=['M'])
def overlapped(
    x, sx, w, sw, bias, gate, residual, out, M, N, KP, out_stride,
    BITS: gl.constexpr, PACK: gl.constexpr, PAIR: gl.constexpr, ACT: gl.constexpr,
    BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
    MMA: gl.constexpr, STORE: gl.constexpr,
):
    """One tile (BN rows of W, BM tokens); grid (tiles,). PAIR: rows are gate and up in eights.

    MMA, STORE: how threads hold a tile for the matrix units, and where they write it.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = gl.program_id(0)
    across = gl.cdiv(M, BM)
    row_x, row_n = (tile % across) * BM, (tile // across) * BN
    acc = sums(x, w, row_x, row_n, KP * BITS // (8 * BK), BITS, PACK, BM, BN, BK, STAGES,
               gl.num_warps(), MMA)
    rm = row_x + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    rn = row_n + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))
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

