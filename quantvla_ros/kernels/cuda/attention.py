# SPDX-License-Identifier: Apache-2.0
"""Triton: few queries over a long cached run of keys, split along the keys; and its positions.

Heads that share keys stand side by side as further rows of one tile, so that keys are read once
for all of them. Each split leaves its own average, its maximum and its weight; `join` puts
them together and, in the same pass, rotates and quantizes the token for the next product.
How many keys there are is read from device memory: one captured graph serves prompts of any
length up to the capacity it was planned for.
"""

from __future__ import annotations

from quantvla_ros.kernels.cuda.language import jit, tl
from quantvla_ros.kernels.cuda.tokens import emit, turning


@jit
def line_of(base, row, stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows of keys or values, (rows, DP), zero behind column D."""
    lane = tl.arange(0, DP)[None, :]
    place = base + row[:, None] * stride + lane
    return tl.load(place) if D == DP else tl.load(place, mask=lane < D, other=0.0)


@jit(do_not_specialize=['rows', 'extra'])
def attend(
    q, k, v, out, sums, largest, length, factor,
    rows, extra, q_stride, k_stride, v_stride, out_stride, k_batch, v_batch, tokens,
    SHARE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    SPLIT: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr, HEADS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):
    """One tile of rows of one key-value head over one split; grid (tiles, SPLIT, batch * groups).

    q (batch * tokens, q_stride): head g * SHARE + h at columns (g * SHARE + h) * D
    k, v (batch, S, stride): head g at columns g * D; S = length[0] (where LENGTH) + extra
    out, where SPLIT is 1: (batch * tokens, out_stride) like q; else
        out (SPLIT, batch * tokens, HEADS * D), and in float32
        sums and largest (SPLIT, batch * tokens, HEADS)
    factor: log2(e) / sqrt(D), so that the exponential is one of base two
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile, split, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = HEADS // SHARE
    batch, group = which // groups, which % groups
    row = tile * BQ + tl.arange(0, BQ)
    token, head = row // SHARE, group * SHARE + row % SHARE
    lane = tl.arange(0, DP)
    known = (row < rows)[:, None] & (lane < D)[None, :]
    place = (batch * tokens + token)[:, None]
    queries = tl.load(q + place * q_stride + head[:, None] * D + lane[None, :],
                      mask=known, other=0.0)
    keys = extra
    if LENGTH:
        keys = extra + tl.load(length)
    each = tl.cdiv(tl.cdiv(keys, SPLIT), BS) * BS
    first = split * each
    last = tl.minimum(first + each, keys)
    if CAUSAL:
        last = tl.minimum(last, (tile * BQ + BQ - 1) // SHARE + 1)
    peak = tl.full((BQ,), -1e30, tl.float32)
    weight = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, DP), tl.float32)
    run = tl.arange(0, BS)
    for start in range(first, last, BS):
        at = start + run
        keep = (at < keys)[None, :]
        if CAUSAL:
            keep = keep & (at[None, :] <= token[:, None])
        read = tl.minimum(at, keys - 1)  # instead of a mask: what it gives weighs nothing
        tile_k = line_of(k + batch * k_batch + group * D, read, k_stride, D, DP).T
        logits = tl.dot(queries, tile_k, input_precision=PRECISION) * factor
        logits = tl.where(keep, logits, -1e30)
        higher = tl.maximum(peak, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        if CAUSAL:  # else the first tile holds a key that every row sees
            p = tl.where(keep, p, 0.0)
        fade = tl.exp2(peak - higher)
        weight = weight * fade + tl.sum(p, 1)
        tile_v = line_of(v + batch * v_batch + group * D, read, v_stride, D, DP)
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc * fade[:, None], input_precision=PRECISION)
        peak = higher
    # a split may begin behind the last key: it has seen nothing, and weighs nothing
    acc = acc * tl.where(weight > 0.0, 1.0 / weight, 0.0)[:, None]
    if SPLIT == 1:
        target = out + place * out_stride + head[:, None] * D + lane[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=known)
    else:
        all_rows = (tl.num_programs(2) // groups) * tokens
        line = split * all_rows + batch * tokens + token
        target = out + (line * HEADS + head)[:, None] * D + lane[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=known)
        tl.store(sums + line * HEADS + head, weight, mask=row < rows)
        tl.store(largest + line * HEADS + head, peak, mask=row < rows)


@jit
def join(
    parts, sums, largest, diagonal, hadamard, out, scale, static, rows, K, KP,
    BLOCKS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    TOP: tl.constexpr, DIAGONAL: tl.constexpr, ROTATE: tl.constexpr, STATIC: tl.constexpr,
    CAST: tl.constexpr, PDL: tl.constexpr,
):
    """Put the splits of one token together, all heads; grid (rows,). K = HEADS * D."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = column < K
    own, signs = turning(diagonal, hadamard, column, K, DIAGONAL, ROTATE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if D % 64 == 0:  # a block of 64 columns lies within a head: a number for each block will do
        head = tl.minimum(tl.arange(0, BLOCKS)[:, None] * 64 // D, HEADS - 1)
    else:
        head = tl.where(inside, column // D, 0)
    peak = tl.load(largest + row * HEADS + head)
    # unrolled: what the parts hold is asked for at once, not part after part
    for split in tl.static_range(1, SPLIT):
        peak = tl.maximum(peak, tl.load(largest + (split * rows + row) * HEADS + head))
    total = tl.zeros((BLOCKS, 64), tl.float32)
    weight = tl.zeros_like(peak)
    for split in tl.static_range(SPLIT):
        line = (split * rows + row) * HEADS
        share = tl.exp2(tl.load(largest + line + head) - peak) * tl.load(sums + line + head)
        weight += share
        part = tl.load(parts + line * D + column, mask=inside, other=0.0)
        total += share * part.to(tl.float32)
    emit(total * (1.0 / weight), own, signs, out, scale, static, row, K, KP,
         BLOCKS, TOP, DIAGONAL, ROTATE, STATIC, CAST, ACROSS=True)


@jit
def turn(
    qkv, q_norm, k_norm, cosine, sine, q_out, k_out, v_out, length,
    qkv_stride, k_stride, v_stride, eps,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, LENGTH: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):
    """Norm and rotate queries and keys of one token, and put keys and values into the cache.

    Grid (tokens, 2): queries, then keys and values. qkv (tokens, qkv_stride): queries, keys,
    values. Token t stands at position and in cache row t, behind length[0] where LENGTH.
    cosine, sine float32 (positions, HALF); pairs are (i, i + HALF).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, second = tl.program_id(0), tl.program_id(1)
    position = token
    if LENGTH:
        position = token + tl.load(length)
    lane = tl.arange(0, HP)[None, :]
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    D: tl.constexpr = 2 * HALF
    count = tl.where(second == 0, HEADS, GROUPS)
    start = tl.where(second == 0, 0, HEADS * D)
    inside = (head < count) & (lane < HALF)
    source = qkv + token * qkv_stride + start + head * D + lane
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        square = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D
        spread = tl.div_rn(1.0, tl.sqrt_rn(square + eps))[:, None]
        narrow = lane < HALF
        ga = tl.load(q_norm + lane, mask=narrow & (second == 0), other=0.0)
        gb = tl.load(q_norm + HALF + lane, mask=narrow & (second == 0), other=0.0)
        ga += tl.load(k_norm + lane, mask=narrow & (second == 1), other=0.0)
        gb += tl.load(k_norm + HALF + lane, mask=narrow & (second == 1), other=0.0)
        a, b = a * spread * ga, b * spread * gb
    c = tl.load(cosine + position * HALF + lane, mask=lane < HALF, other=0.0)
    s = tl.load(sine + position * HALF + lane, mask=lane < HALF, other=0.0)
    first, last = a * c - b * s, b * c + a * s
    if second == 0:
        place = q_out + token * (HEADS * D) + head * D + lane
        tl.store(place, first.to(q_out.dtype.element_ty), mask=inside)
        tl.store(place + HALF, last.to(q_out.dtype.element_ty), mask=inside)
    else:
        place = k_out + position * k_stride + head * D + lane
        tl.store(place, first.to(k_out.dtype.element_ty), mask=inside)
        tl.store(place + HALF, last.to(k_out.dtype.element_ty), mask=inside)
        values = source + GROUPS * D
        place = v_out + position * v_stride + head * D + lane
        for half in tl.static_range(2):
            value = tl.load(values + half * HALF, mask=inside, other=0.0)
            tl.store(place + half * HALF, value.to(v_out.dtype.element_ty), mask=inside)
