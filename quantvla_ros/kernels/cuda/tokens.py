# SPDX-License-Identifier: Apache-2.0
"""Triton: what happens to a token between two products, in one pass over it.

A program holds one token as (blocks of 64, 64): it adds the branch that a float product left
behind, activates, norms, modulates, rotates by the block-64 Hadamard matrix and quantizes, or
writes floats. The rotation is a product with +-1, exact in every type, on the matrix units.

Rounding is that of kernels/reference.py: a token that holds a NaN or an infinity gets the scale
NaN, one that is all but zero the scale 1. The callers compile without fused multiply-add, which
would round x * inverse differently.
"""

from __future__ import annotations

from quantvla_ros.kernels.cuda.language import jit, tl
from quantvla_ros.kernels.cuda.product import activate


@jit
def known(place, column, inside, other, THERE: tl.constexpr):
    """Numbers of columns as floats, or one number where there are none."""
    found = other
    if THERE:
        found = tl.load(place + column, mask=inside, other=0.0).to(tl.float32)
    return found


@jit
def turning(
    diagonal, hadamard, column, K, DIAGONAL: tl.constexpr, ROTATE: tl.constexpr,
):
    """The diagonal of a token, like column, and the signs that rotate it, (64, 64)."""
    own, signs = known(diagonal, column, column < K, 1.0, DIAGONAL), 1.0
    if ROTATE:
        signs = tl.load(hadamard + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :])
    return own, signs


@jit
def emit(
    x, diagonal, signs, out, scale, static, row, K, KP,
    BLOCKS: tl.constexpr, TOP: tl.constexpr, DIAGONAL: tl.constexpr, ROTATE: tl.constexpr,
    STATIC: tl.constexpr, CAST: tl.constexpr, ACROSS: tl.constexpr = False,
):
    """Store a token x (BLOCKS, 64), zero behind K: floats where TOP is 0, else int8 and scale.

    diagonal, signs: what `turning` loaded. ACROSS: rotate the token as the right operand. As the
    left one every warp of a row would hold all of it, and what it was made from.
    """
    block, lane = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 64)[None, :]
    column = block * 64 + lane
    if DIAGONAL:
        x = x * diagonal
    if ROTATE:
        if ACROSS:
            x = tl.dot(signs.to(CAST), x.to(CAST).T, input_precision='ieee').T * 0.125
        else:
            x = tl.dot(x.to(CAST), signs.to(CAST), input_precision='ieee') * 0.125
    if TOP == 0:
        tl.store(out + row * KP + column, x.to(out.dtype.element_ty), mask=column < K)
    else:
        # as integers, infinities and NaN lie above all numbers: one maximum tells both
        top = tl.max(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1), 0)
        wild = top >= 0x7F800000
        largest = top.to(tl.float32, bitcast=True)
        if STATIC:
            step = tl.load(static)
            inverse = tl.div_rn(1.0, step)
        else:
            none = largest < 7.888609052210118e-31  # 2^-100
            step = tl.where(none, 1.0, tl.div_rn(largest, TOP * 1.0))
            inverse = tl.where(none, 0.0, tl.div_rn(TOP * 1.0, tl.where(none, 1.0, largest)))
        y = tl.where(wild, 0.0, x * inverse)
        if STATIC:  # a dynamic scale lets nothing beyond TOP
            y = tl.minimum(tl.maximum(y, -TOP * 1.0), TOP * 1.0)
        # 1.5 * 2^23 more rounds to the nearest even integer, and leaves it in the lowest bits
        code = (y + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(out + row * KP + column, code, mask=column < KP)
        tl.store(scale + row, tl.where(wild, float('nan'), step))


@jit
def summed(
    branch, token_scale, rows, row, M, K, column, inside,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):
    """A token of a product whose splits left their sums (PARTS, M, K). rows: scales, loaded."""
    b = tl.load(branch + row * K + column, mask=inside, other=0)
    for part in tl.static_range(1, PARTS):
        b += tl.load(branch + (part * M + row) * K + column, mask=inside, other=0)
    b = b.to(tl.float32) * tl.load(token_scale + row)
    if ROWS:
        b = b * rows
    return b


@jit(do_not_specialize=['eps', 'M'])  # noqa: C901  branches of constants
def tokens(
    x, branch, branch_bias, gate, total, multiply, add, diagonal, hadamard, out, scale, static,
    token_scale, row_scale, M, x_stride, K, KP, eps,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PAIR: tl.constexpr,
    ACT: tl.constexpr, BRANCH: tl.constexpr,
    BRANCH_BIAS: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MULTIPLY: tl.constexpr,
    ADD: tl.constexpr, TOP: tl.constexpr, DIAGONAL: tl.constexpr, ROTATE: tl.constexpr,
    STATIC: tl.constexpr, CAST: tl.constexpr, PDL: tl.constexpr,
):
    """One token; grid (M,). x (M, x_stride): K columns, or 2 K where PAIR (gate, then up).

    PARTS   branch is (PARTS, M, K): raw sums, times the token's and, with ROWS, the row's scale
    total   where x + gate * (branch + branch_bias) is written, in place of x
    NORM    'none', 'rms' or 'layer'; then times multiply, plus add, both float32 (K,)

    What belongs to the model is asked for before the kernel ahead has ended.
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCKS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = column < K
    EARLY: tl.constexpr = BLOCKS <= 64  # of wider tokens too much would be held in registers
    rows = known(row_scale, column, inside, 1.0, ROWS)
    bias = known(branch_bias, column, inside, 0.0, BRANCH_BIAS)
    factor = known(gate, column, inside, 1.0, GATE)
    if EARLY:
        gain = known(multiply, column, inside, 1.0, MULTIPLY)
        offset = known(add, column, inside, 0.0, ADD)
        own, signs = turning(diagonal, hadamard, column, K, DIAGONAL, ROTATE)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, ACT)
    if PAIR:
        up = tl.load(x + row * x_stride + K + column, mask=inside, other=0.0)
        y = y * up.to(tl.float32)
    if BRANCH:
        if PARTS:
            b = summed(branch, token_scale, rows, row, M, K, column, inside, PARTS, ROWS)
        else:
            b = tl.load(branch + row * K + column, mask=inside, other=0.0).to(tl.float32)
        if BRANCH_BIAS:
            b += bias
        if GATE:
            b = b * factor
        y = (y + b).to(total.dtype.element_ty)
        tl.store(total + row * K + column, y, mask=inside)
        y = y.to(tl.float32)
    if NORM == 'layer':
        mean = tl.sum(tl.sum(y, 1), 0) / K
        y = tl.where(inside, y - mean, 0.0)
    if NORM != 'none':
        square = tl.sum(tl.sum(y * y, 1), 0) / K
        y = y * tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    if not EARLY:
        gain = known(multiply, column, inside, 1.0, MULTIPLY)
        offset = known(add, column, inside, 0.0, ADD)
    if MULTIPLY:
        y = y * gain
    if ADD:
        y = y + offset
    if not EARLY:
        own, signs = turning(diagonal, hadamard, column, K, DIAGONAL, ROTATE)
    emit(y, own, signs, out, scale, static, row, K, KP,
         BLOCKS, TOP, DIAGONAL, ROTATE, STATIC, CAST)


@jit
def euler(
    x, velocity, target, weight, out, size, width, time_left, step, pull,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):
    """x += step * (v + pull * weight[row] * (target - (x + time_left * v))); out = x, narrower.

    policies/flow.py says why. x, target float32 (rows, width); weight float32 (rows,).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    now = tl.load(x + place, mask=inside, other=0.0)
    v = tl.load(velocity + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + place // width, mask=inside, other=0.0)
    goal = tl.load(target + place, mask=inside, other=0.0)
    v = v + pull * w * (goal - (now + time_left * v))
    now = now + step * v
    tl.store(x + place, now, mask=inside)
    tl.store(out + place, now.to(out.dtype.element_ty), mask=inside)
