# SPDX-License-Identifier: Apache-2.0
"""Triton: integer product of tokens and a weight, with everything that follows it fused.

out[m, n] = residual[m, n] + gate[n] * act(y[m, n] + bias[n]) [* (u[m, n] + up_bias[n])]
  y[m, n] = sx[m] * sum_g sw[g, n] * sum_(k in g) q[m, k] w[n, k],  u: of a second weight

Tokens are few and weights many, so a tile holds W as the left operand: acc (BN, BM) = W_tile X^T.
Int4 is never sign-extended: (byte << 4) and (byte & 0xF0), read as int8, are 16 w of the low and
of the high nibble; the 16 goes into the scale. Split-K programs leave partial sums in `partial`;
the last to arrive adds them in a fixed order, so that results do not depend on who was last.

Layout of the operands (kernels/cuda/pack.py makes it; NP: rows padded to 128, KP: padded columns):
    x      int8 (M, KP), zero behind K        sx  float32 (M,)
    w      int8 (NP, KP), or (NP, KP / 2) for 4 bits: byte j of a block of PACK columns holds
           column j in its low nibble and column PACK / 2 + j in its high one
    sw     float32 (groups, NP); a group is a row, or one half of a block for 4 bits
With BULK, x, w and up are descriptors of these: Hopper's copy engine then fetches whole tiles.
"""

from __future__ import annotations

from quantvla_ros.kernels.cuda.language import MACHINE, constant, jit, tl

# $0 = 1 / (1 + 2^$1); by itself the compiler guards against denormals, in twice the time
SHARE = constant('{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; '
                 'rcp.approx.ftz.f32 $0, t; }')
# $0, $1 = low and high nibbles of four bytes $2, times 16; the compiler would part the bytes
NIBBLES = constant('{ .reg .b32 t; shl.b32 t, $2, 4; and.b32 $1, $2, 0xF0F0F0F0; '
                   'and.b32 $0, t, 0xF0F0F0F0; }')


# asks for 128 bytes at $1 to come closer, into the second-level cache; $0 is of no use
CLOSER = constant('{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }')


@jit
def fetch_ahead(w, rn, start, end, row_bytes):
    """Ask for bytes start .. end of rows of W: nothing in a graph ever writes them."""
    if MACHINE:
        line = tl.arange(0, 2)[None, :] * 128
        for at in range(start, end, 256):
            place = w + rn[:, None] * row_bytes + tl.minimum(at + line, end - 1)
            tl.inline_asm_elementwise(CLOSER, '=r,l', [place.to(tl.int64, bitcast=True)],
                                      dtype=tl.int32, is_pure=False, pack=1)


@jit
def damped(x, power):
    """x / (1 + 2^power)."""
    if MACHINE:
        x = x * tl.inline_asm_elementwise(SHARE, '=f,f', [power], dtype=tl.float32,
                                          is_pure=True, pack=1)
    else:
        x = x / (1.0 + tl.exp2(power))
    return x


@jit
def activate(x, ACT: tl.constexpr):
    """SiLU or GELU by its tanh formula, which is x * sigmoid(2 u); exponentials to base two."""
    if ACT == 'silu':
        x = damped(x, -1.4426950408889634 * x)
    if ACT == 'gelu_tanh':
        x = damped(x, x * (-2.302208198144325 - 0.10294324 * (x * x)))
    return x


@jit
def sixteenfold(packed):
    """16 times the low and 16 times the high nibbles of bytes, as int8."""
    if MACHINE:
        low, high = tl.inline_asm_elementwise(
            NIBBLES, '=r,=r,r', [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low, high = (packed << 4).to(tl.int8), packed & -16
    return low, high


@jit
def tokens_of(x, rx, first_row, column, KP, BK: tl.constexpr, BULK: tl.constexpr):
    """BK columns of the tile's tokens, as (BK, BM)."""
    if BULK:
        tile = x.load([first_row, column]).T
    else:
        rk = tl.arange(0, BK)
        tile = tl.load(x + rx[None, :] * KP + (column + rk)[:, None])
    return tile


@jit
def weights_of(w, rn, first_row, at, row_bytes, BK: tl.constexpr, BULK: tl.constexpr):
    """BK bytes of the tile's rows of W, as (BN, BK)."""
    if BULK:
        tile = w.load([first_row, at])
    else:
        rk = tl.arange(0, BK)
        tile = tl.load(w + rn[:, None] * row_bytes + (at + rk)[None, :])
    return tile


@jit
def multiplied(
    acc, w, sw, rn, row_n, at, low_x, high_x, KP, NP,
    BITS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BK: tl.constexpr,
    BULK: tl.constexpr,
):
    """acc plus one step of W_tile X^T; high_x is of no use for 8 bits."""
    HALF: tl.constexpr = PACK // 2
    if BITS == 4:
        packed = weights_of(w, rn, row_n, at, KP // 2, BK, BULK)
        low, high = sixteenfold(packed)
        if GROUP:
            scales = sw + (at // HALF) * 2 * NP + rn
            part = tl.dot(low, low_x, out_dtype=tl.int32).to(tl.float32)
            acc += part * tl.load(scales)[:, None]
            part = tl.dot(high, high_x, out_dtype=tl.int32).to(tl.float32)
            acc += part * tl.load(scales + NP)[:, None]
        else:
            acc = tl.dot(low, low_x, acc, out_dtype=tl.int32)
            acc = tl.dot(high, high_x, acc, out_dtype=tl.int32)
    else:
        weights = weights_of(w, rn, row_n, at, KP, BK, BULK)
        if GROUP:
            part = tl.dot(weights, low_x, out_dtype=tl.int32).to(tl.float32)
            acc += part * tl.load(sw + (at // GROUP) * NP + rn)[:, None]
        else:
            acc = tl.dot(weights, low_x, acc, out_dtype=tl.int32)
    return acc


@jit
def sums(
    x, w, sw, up, up_sw, rx, rn, row_x, row_n, first, last, KP, NP,
    BITS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, UP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BULK: tl.constexpr,
):
    """Steps first .. last of both products, (BN, BM) each: int32, or float32 with groups."""
    kind: tl.constexpr = tl.float32 if GROUP else tl.int32
    acc = tl.zeros((BN, BM), kind)
    other = tl.zeros((BN, BM), kind)
    HALF: tl.constexpr = PACK // 2
    for step in range(first, last):
        at = step * BK
        if BITS == 4:
            # the hint is what makes loads of 16 bytes, and so a pipeline, possible
            column = tl.multiple_of((at // HALF) * PACK + at % HALF, BK)
            low_x = tokens_of(x, rx, row_x, column, KP, BK, BULK)
            high_x = tokens_of(x, rx, row_x, column + HALF, KP, BK, BULK)
        else:
            low_x = tokens_of(x, rx, row_x, at, KP, BK, BULK)
            high_x = low_x
        acc = multiplied(acc, w, sw, rn, row_n, at, low_x, high_x, KP, NP,
                         BITS, GROUP, PACK, BK, BULK)
        if UP:
            other = multiplied(other, up, up_sw, rn, row_n, at, low_x, high_x, KP, NP,
                               BITS, GROUP, PACK, BK, BULK)
    return acc, other


@jit
def scaled(
    acc, sx, sw, bias, rn, N,
    BITS: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):
    """Sums -> floats: scales of tokens (BM,) and rows, then the bias."""
    y = acc.to(tl.float32)
    if BITS == 4:
        sx = sx * 0.0625
    if not GROUP:
        y = y * tl.load(sw + rn)[:, None]
    y = y * sx[None, :]
    if BIAS:
        y += tl.load(bias + rn, mask=rn < N, other=0.0)[:, None]
    return y


@jit
def finish(
    acc, other, sx, sw, bias, up_sw, up_bias, gate, residual, out, rm, rn, M, N, out_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, UP: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, UP_BIAS: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr,
):
    """Everything behind the sums, and the store."""
    token_scale = tl.load(sx + rm, mask=rm < M, other=0.0)
    y = activate(scaled(acc, token_scale, sw, bias, rn, N, BITS, GROUP, BIAS), ACT)
    if UP:
        y = y * scaled(other, token_scale, up_sw, up_bias, rn, N, BITS, GROUP, UP_BIAS)
    if GATE:
        y = y * tl.load(gate + rn, mask=rn < N, other=0.0).to(tl.float32)[:, None]
    inside = (rn < N)[:, None] & (rm < M)[None, :]
    if RESIDUAL:
        place = residual + rm[None, :] * N + rn[:, None]
        y += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = out + rm[None, :] * out_stride + rn[:, None]
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=['M'])
def product(
    x, sx, w, sw, bias, up, up_sw, up_bias, gate, residual, out, partial, count, rows_of_w,
    M, N, KP, NP, out_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, UP: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, UP_BIAS: tl.constexpr, GATE: tl.constexpr,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, BULK: tl.constexpr, PDL: tl.constexpr, FETCH: tl.constexpr,
):
    """One tile (BN rows of W, BM tokens) of one split; grid (tiles, SPLIT). See the module.

    FETCH: weights are asked for before the kernel ahead has ended; rows_of_w: w as it lies.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(M, BM)
    row_x, row_n = (tile % across) * BM, (tile // across) * BN
    rm = row_x + tl.arange(0, BM)
    rn = row_n + tl.arange(0, BN)
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
    acc, other = sums(x, w, sw, up, up_sw, rx, rn, row_x, row_n, first, last, KP, NP,
                      BITS, GROUP, PACK, UP, BM, BN, BK, BULK)
    if SPLIT == 1:
        finish(acc, other, sx, sw, bias, up_sw, up_bias, gate, residual, out, rm, rn, M, N,
               out_stride, BITS, GROUP, UP, ACT, BIAS, UP_BIAS, GATE, RESIDUAL)
    else:
        SIZE: tl.constexpr = BN * BM
        EACH: tl.constexpr = SIZE * 2 if UP else SIZE
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        own = partial + tile * (SPLIT * EACH)
        tl.store(own + split * EACH + place, acc)
        if UP:
            tl.store(own + split * EACH + SIZE + place, other)
        tl.debug_barrier()  # all threads have stored before one of them announces it
        arrived = tl.atomic_add(count + tile, 1, sem='acq_rel')
        if arrived == SPLIT - 1:
            tl.debug_barrier()
            tl.store(count + tile, 0)  # ready for the next call
            acc = tl.zeros((BN, BM), acc.dtype)
            other = tl.zeros((BN, BM), acc.dtype)
            for part in range(SPLIT):
                acc += tl.load(own + part * EACH + place, cache_modifier='.cg')
                if UP:
                    other += tl.load(own + part * EACH + SIZE + place, cache_modifier='.cg')
            finish(acc, other, sx, sw, bias, up_sw, up_bias, gate, residual, out, rm, rn, M, N,
                   out_stride, BITS, GROUP, UP, ACT, BIAS, UP_BIAS, GATE, RESIDUAL)
