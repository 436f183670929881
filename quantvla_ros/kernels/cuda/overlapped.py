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
def opened(x, w, row_n, first, count, BITS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
           BK: gl.constexpr, STAGES: gl.constexpr):
    """A ring that is being filled with weights: its tokens, weights, and what tells of both."""
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES * 8 // BITS, BM, BK], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BN, BK], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(ready.index(slot), count=1)
    # a slot is given back a step later: until then its tiles may still be multiplied
    for slot in gl.static_range(STAGES - 1):
        fetch_weights(x, w, w_tiles, ready, slot, first + slot, slot < count, row_n, BITS, BK)
    return x_tiles, w_tiles, ready


@own
def sums(x, w, x_tiles, w_tiles, ready, row_x, row_n, first, count, BITS: gl.constexpr,
         PACK: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
         STAGES: gl.constexpr, MMA: gl.constexpr):
    """Steps first .. first + count of a tile, (BN, BM) int32, through an opened ring."""
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
    return hopper.warpgroup_mma_wait(0, deps=[acc])


@own
def halves(y, ROWS: gl.constexpr, BM: gl.constexpr):
    """Eights of rows in turns as two tiles, (ROWS, BM) each; no thread gives anything away."""
    eights = gl.permute(gl.reshape(y, (ROWS // 8, 2, 8, BM)), (0, 2, 3, 1))
    first, second = gl.split(eights)
    return gl.reshape(first, (ROWS, BM)), gl.reshape(second, (ROWS, BM))


@own
def angles(cosine, sine, rs, position, pair, M, TURN: gl.constexpr):
    """Cosines and sines of some tokens and pairs of rows."""
    place = position[None, :] * TURN + pair[:, None]
    known = (rs < M)[None, :]
    return (gl.load(cosine + place, mask=known, other=1.0),
            gl.load(sine + place, mask=known, other=0.0))


@own
def put_heads(first, second, out, stride, at, column, rs, M, TURN: gl.constexpr):
    """Store pairs of rows: of each the first at a column of out's rows `at`, and TURN behind."""
    place = out + at[None, :] * stride + column[:, None]
    known = (rs < M)[None, :]
    gl.store(place, first.to(out.dtype.element_ty), mask=known)
    gl.store(place + TURN, second.to(out.dtype.element_ty), mask=known)


@own
def put_turned(y, c, s, cosine, sine, out, k_out, v_out, rs, position, pair, column, row_n, M,
               out_stride, k_stride, v_stride, SMALL: gl.constexpr, ROWS: gl.constexpr,
               BM: gl.constexpr, TURN: gl.constexpr, QUERIES: gl.constexpr,
               VALUES: gl.constexpr, STORE: gl.constexpr):
    """Turn the pairs of a tile that lies in one head, and store it where it belongs."""
    first, second = halves(y, ROWS, BM)
    a, b = gl.convert_layout(first, STORE), gl.convert_layout(second, STORE)
    if row_n < VALUES:
        if SMALL:
            turned, other = a * c - b * s, b * c + a * s
        else:
            c_late, s_late = angles(cosine, sine, rs, position, pair, M, TURN)
            turned, other = a * c_late - b * s_late, b * c_late + a * s_late
        if row_n < QUERIES:
            put_heads(turned, other, out, out_stride, rs, column, rs, M, TURN)
        else:
            put_heads(turned, other, k_out, k_stride, position, column - QUERIES, rs, M, TURN)
    else:
        put_heads(a, b, v_out, v_stride, position, column - VALUES, rs, M, TURN)


@own
def put_rows(y, gate, residual, out, rn, ro, rs, M, N, out_stride, PAIR: gl.constexpr,
             ACT: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr, ROWS: gl.constexpr,
             BM: gl.constexpr, STORE: gl.constexpr):
    """Store act(gate) * up, or gate * act(y) + residual. ro: rows of out, N of them."""
    if PAIR:
        first, second = halves(y, ROWS, BM)
        y = activate(first, ACT) * second
    else:
        y = activate(y, ACT)
        if GATE:
            y = y * gl.load(gate + rn, mask=rn < N, other=0.0)[:, None]
    inside = (ro < N)[:, None] & (rs < M)[None, :]
    if RESIDUAL:
        y = gl.convert_layout(y, STORE)
        y += gl.load(residual + rs[None, :] * N + ro[:, None], mask=inside, other=0.0).to(
            gl.float32)
    stored = gl.convert_layout(y.to(out.dtype.element_ty), STORE)
    gl.store(out + rs[None, :] * out_stride + ro[:, None], stored, mask=inside)


@own(do_not_specialize=['M'])
def overlapped(
    x, sx, w, sw, bias, gate, residual, out, cosine, sine, length, k_out, v_out,
    M, N, KP, out_stride, k_stride, v_stride,
    BITS: gl.constexpr, PACK: gl.constexpr, PAIR: gl.constexpr, RAW: gl.constexpr,
    ACT: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESIDUAL: gl.constexpr,
    TURN: gl.constexpr, QUERIES: gl.constexpr, VALUES: gl.constexpr, LENGTH: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, PDL: gl.constexpr, MMA: gl.constexpr, STORE: gl.constexpr,
):
    """One tile (BN rows of W, BM tokens) of one split; grid (tiles, SPLIT), SPLIT > 1 with RAW.

    PAIR: rows are gate and up in eights. RAW: sums go to out (SPLIT, M, N). TURN: as in
    fused.fused, but every tile lies in one head.
    MMA, STORE: how threads hold a tile for the matrix units, and where they write it.
    """
    tile, split = gl.program_id(0), gl.program_id(1)
    across = gl.cdiv(M, BM)
    number = tile // across
    row_x, row_n = (tile % across) * BM, number * BN
    steps = KP * BITS // (8 * BK)
    each = gl.cdiv(steps, SPLIT)
    first, count = split * each, gl.minimum(each, steps - split * each)
    ROWS: gl.constexpr = BN // 2 if PAIR or TURN else BN
    SMALL: gl.constexpr = BM * BN <= 4096  # of larger tiles too much would be held in registers
    rm = row_x + gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))
    rn = row_n + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))
    rs = row_x + gl.arange(0, BM, layout=gl.SliceLayout(0, STORE))
    ro = number * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
    x_tiles, w_tiles, ready = opened(x, w, row_n, first, count, BITS, BM, BN, BK, STAGES)
    if SMALL and not RAW:
        scale = gl.load(sw + rn)
    if TURN:
        TILES: gl.constexpr = 2 * TURN // BN  # of a head; products, so that 16 bytes are stored
        pair = number % TILES * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
        column = number // TILES * (2 * TURN) + pair
        position = rs + gl.load(length) if LENGTH else rs
        c, s = 0.0, 0.0  # of larger tiles: loaded where they are used
        if SMALL:
            c, s = angles(cosine, sine, rs, position, pair, M, TURN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if SMALL and not RAW:
        token_scale = gl.load(sx + rm, mask=rm < M, other=0.0)
    acc = sums(x, w, x_tiles, w_tiles, ready, row_x, row_n, first, count, BITS, PACK, BM, BN, BK,
               STAGES, MMA)
    if RAW:
        if BITS == 4:
            acc = acc >> 4  # 16 times too large; a shift loses nothing
        place = out + (split * M + rm)[None, :] * N + rn[:, None]
        gl.store(place, acc, mask=(rn < N)[:, None] & (rm < M)[None, :])
    else:
        if not SMALL:
            scale = gl.load(sw + rn)
            token_scale = gl.load(sx + rm, mask=rm < M, other=0.0)
        y = acc.to(gl.float32) * scale[:, None]
        y = y * (token_scale * 0.0625 if BITS == 4 else token_scale)[None, :]
        if BIAS:
            y += gl.load(bias + rn, mask=rn < N, other=0.0)[:, None]
        if TURN:
            put_turned(y, c, s, cosine, sine, out, k_out, v_out, rs, position, pair, column, row_n,
                       M, out_stride, k_stride, v_stride, SMALL, ROWS, BM, TURN, QUERIES, VALUES,
                       STORE)
        else:
            put_rows(y, gate, residual, out, rn, ro, rs, M, N * ROWS // BN, out_stride, PAIR, ACT,
                     GATE, RESIDUAL, ROWS, BM, STORE)
    # the barriers' memory is not used for anything else, so the others need no end
    mbarrier.invalidate(ready.index(0))
