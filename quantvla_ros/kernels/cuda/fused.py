# SPDX-License-Identifier: Apache-2.0
"""Triton: products that end in more than product.py's do. Chosen by tiles.json's `ways`.

    pair   gate and up stand in one weight, in eights of rows: one stream of tiles instead of two
    turn   queries, keys and values get their positions and go where attention reads them
    raw    the sums of a split product are stored as they are; the next norm adds them up

The operands are product.py's. What belongs to the weights is asked for before the kernel ahead
has ended: nothing in a graph that begins launches early may write scales, biases or gates.
"""

from __future__ import annotations

from quantvla_ros.kernels.cuda.language import jit, tl
from quantvla_ros.kernels.cuda.product import activate, fetch_ahead, sums


@jit
def pairs_of(y, BN: tl.constexpr, BM: tl.constexpr):
    """Eights of rows in turns, (BN, BM), as two halves, (BN / 2, BM) each.

    A thread of the matrix units holds row i and row i + 8 of each 16: nothing is exchanged.
    """
    eights = tl.reshape(y, (BN // 16, 2, 8, BM))
    first, second = tl.split(tl.permute(eights, (0, 2, 3, 1)))
    return tl.reshape(first, (BN // 2, BM)), tl.reshape(second, (BN // 2, BM))


@jit
def scaled_rows(
    acc, token_scale, row_scale, row_bias,
    BITS: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):
    """product.scaled of scales and biases that are loaded: (BM,), and (BN,) each."""
    y = acc.to(tl.float32)
    if BITS == 4:
        token_scale = token_scale * 0.0625
    if not GROUP:
        y = y * row_scale[:, None]
    y = y * token_scale[None, :]
    if BIAS:
        y += row_bias[:, None]
    return y


@jit
def angles(cosine, sine, rm, position, row_n, M, BN: tl.constexpr, TURN: tl.constexpr,
           VALUES: tl.constexpr):
    """Cosines and sines of the tile's pairs of rows, (BN / 2, BM); values are not turned."""
    pair = row_n // 2 + tl.arange(0, BN // 2)
    known = (2 * pair < VALUES)[:, None] & (rm < M)[None, :]
    place = position[None, :] * TURN + (pair % TURN)[:, None]
    return (tl.load(cosine + place, mask=known, other=1.0),
            tl.load(sine + place, mask=known, other=0.0))


@jit
def put_pairs(
    y, c, s, out, k_out, v_out, rm, position, row_n, M, N, out_stride, k_stride, v_stride,
    BN: tl.constexpr, BM: tl.constexpr, TURN: tl.constexpr, QUERIES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Turn pairs of rows, and store queries, keys and values where each belongs.

    Pair i of a head is its columns i and i + TURN (pack.paired), TURN: half a head.
    """
    a, b = pairs_of(y, BN, BM)
    first, second = a * c - b * s, b * c + a * s
    row = row_n + 2 * tl.arange(0, BN // 2)
    column = row // (2 * TURN) * (2 * TURN) + row % (2 * TURN) // 2
    inside = (rm < M)[None, :]
    if row_n < QUERIES:
        place = out + rm[None, :] * out_stride + column[:, None]
        mask = inside & (row < QUERIES)[:, None]
        tl.store(place, first.to(out.dtype.element_ty), mask=mask)
        tl.store(place + TURN, second.to(out.dtype.element_ty), mask=mask)
    if (row_n + BN > QUERIES) & (row_n < VALUES):
        place = k_out + position[None, :] * k_stride + (column - QUERIES)[:, None]
        mask = inside & ((row >= QUERIES) & (row < VALUES))[:, None]
        tl.store(place, first.to(k_out.dtype.element_ty), mask=mask)
        tl.store(place + TURN, second.to(k_out.dtype.element_ty), mask=mask)
    if row_n + BN > VALUES:
        place = v_out + position[None, :] * v_stride + (column - VALUES)[:, None]
        mask = inside & ((row >= VALUES) & (row < N))[:, None]
        tl.store(place, first.to(v_out.dtype.element_ty), mask=mask)
        tl.store(place + TURN, second.to(v_out.dtype.element_ty), mask=mask)


@jit
def leave(
    acc, out, split, rm, rn, M, N, BITS: tl.constexpr, GROUP: tl.constexpr,
):
    """Store this split's sums as they are: out (splits, M, N)."""
    if BITS == 4:  # 16 times too large; a shift of integers loses nothing
        acc = acc * 0.0625 if GROUP else acc >> 4
    place = out + (split * M + rm)[None, :] * N + rn[:, None]
    tl.store(place, acc, mask=(rn < N)[:, None] & (rm < M)[None, :])


@jit(do_not_specialize=['M'])
def fused(
    x, sx, w, sw, bias, out, cosine, sine, length, k_out, v_out, rows_of_w,
    M, N, KP, NP, out_stride, k_stride, v_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, BULK: tl.constexpr, RAW: tl.constexpr, TURN: tl.constexpr,
    QUERIES: tl.constexpr, VALUES: tl.constexpr, LENGTH: tl.constexpr, PDL: tl.constexpr,
    FETCH: tl.constexpr,
):
    """One tile (BN rows of W, BM tokens) of one split; grid (tiles, SPLIT), SPLIT > 1 with RAW.

    RAW: sums go to out (SPLIT, M, N). TURN: rows are queries, keys from QUERIES on, and values
    from VALUES on; see put_pairs. Neither: a pair is a row of gate and one of up.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(M, BM)
    row_x, row_n = (tile % across) * BM, (tile // across) * BN
    rm = row_x + tl.arange(0, BM)
    rn = row_n + tl.arange(0, BN)
    scale, row_bias, token_scale, position, c, s = 0.0, 0.0, 0.0, rm, 0.0, 0.0
    SMALL: tl.constexpr = BM * BN <= 4096  # of larger tiles too much would be held in registers
    if not RAW:
        if not GROUP:
            scale = tl.load(sw + rn, mask=rn < N, other=0.0)
        if BIAS:
            row_bias = tl.load(bias + rn, mask=rn < N, other=0.0)
    if LENGTH:
        position = rm + tl.load(length)
    if TURN and SMALL:
        c, s = angles(cosine, sine, rm, position, row_n, M, BN, TURN, VALUES)
    rx = tl.where(rm < M, rm, 0)  # instead of a mask: what it gives is never stored
    steps = KP // BK
    if BITS == 4:
        steps = KP // (2 * BK)
    each = tl.cdiv(steps, SPLIT)
    first = split * each
    last = tl.minimum(first + each, steps)
    if FETCH:
        fetch_ahead(rows_of_w, rn, first * BK, last * BK, steps * BK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if not RAW:
        token_scale = tl.load(sx + rm, mask=rm < M, other=0.0)
    acc, _ = sums(x, w, sw, w, sw, rx, rn, row_x, row_n, first, last, KP, NP,
                  BITS, GROUP, PACK, False, BM, BN, BK, BULK)
    if RAW:
        leave(acc, out, split, rm, rn, M, N, BITS, GROUP)
    else:
        y = scaled_rows(acc, token_scale, scale, row_bias, BITS, GROUP, BIAS)
        if TURN:
            if not SMALL:
                c, s = angles(cosine, sine, rm, position, row_n, M, BN, TURN, VALUES)
            put_pairs(y, c, s, out, k_out, v_out, rm, position, row_n, M, N, out_stride,
                      k_stride, v_stride, BN, BM, TURN, QUERIES, VALUES)
        else:
            gate, up = pairs_of(y, BN, BM)
            ro = row_n // 2 + tl.arange(0, BN // 2)
            place = out + rm[None, :] * out_stride + ro[:, None]
            tl.store(place, (activate(gate, ACT) * up).to(out.dtype.element_ty),
                     mask=(ro < N // 2)[:, None] & (rm < M)[None, :])
