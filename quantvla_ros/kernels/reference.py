# SPDX-License-Identifier: Apache-2.0
"""The ground truth of every kernel: plain torch, exact integer sums, no speed.

Owns the rounding rules. A token is quantized as q = clamp(round_half_even(x * inverse)), with
amax = max |x| of the token, inverse = top / amax and scale = amax / top in float32, top = 127
(7 for 4 bits, 3 for 3 bits); with a static scale s, inverse = 1 / s. A token whose amax is below
TINY counts as zero: q = 0, scale 1. A token that holds a NaN or an infinity gives NaN in all its
outputs, other tokens are not touched.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantvla_ros.kernels.weights import MixedWeight, PackedWeight, Weight, unpack

TOP = {8: 127.0, 4: 7.0, 3: 3.0}
TINY = 2.0**-100
ACTIVATIONS = {
    'none': lambda x: x,
    'silu': F.silu,
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),
}


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply blocks of the last dimension by the normalised Sylvester Hadamard matrix.

    (..., K) -> (..., K), K a multiple of block, block a power of four so that the factor is exact.
    Butterflies run from stride 1 upward: the kernels add in the same order, bit for bit.
    """
    y = x.float().unflatten(-1, (-1, block))
    stride = 1
    while stride < block:
        pairs = y.unflatten(-1, (-1, 2, stride))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        stride *= 2
    return (y * block**-0.5).flatten(-2)


def transform_tokens(x: Tensor, diagonal: Tensor | None, hadamard: int) -> Tensor:
    """What is quantized of x (..., K): (tokens, K) float32, times the diagonal, then rotated."""
    tokens = x.reshape(-1, x.shape[-1]).float()
    if diagonal is not None:
        tokens = tokens * diagonal
    return block_hadamard(tokens, hadamard) if hadamard else tokens


def quantize_activations(
    x: Tensor, bits: int = 8, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize tokens (..., K) -> int8 of the same shape, float32 scales (..., 1).

    scale: None for one dynamic scale per token, else the static one.
    """
    x = x.float()
    top = TOP[bits]
    amax = x.abs().amax(-1, keepdim=True)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    zero = amax < TINY
    if scale is None:
        tops = torch.full_like(amax, top)  # number / tensor would be reciprocal, then product
        inverse = tops / amax
        scales = torch.where(zero, torch.ones_like(amax), amax / tops)
        inverse = torch.where(zero, torch.zeros_like(amax), inverse)
    else:
        scales = torch.full_like(amax, scale)
        inverse = 1.0 / scales
    q = torch.round(x * inverse).clamp(-top, top)
    q = torch.where(finite, q, torch.zeros_like(q)).to(torch.int8)
    return q, torch.where(finite, scales, torch.full_like(scales, torch.nan))


def accumulate(q: Tensor, weight: PackedWeight) -> Tensor:
    """Return the exact integer sums, int64: q (M, K) int8 -> (M, N, groups).

    float64 products are exact here: every sum stays below 2**53.
    """
    groups = weight.scales.shape[1]
    w = unpack(weight).double().unflatten(1, (groups, -1))
    x = q.double().unflatten(1, (groups, -1))
    return torch.einsum('mgk,ngk->mng', x, w).to(torch.int64)


def _product(x: Tensor, q: Tensor, scales: Tensor, weight: PackedWeight) -> Tensor:
    """One uniform product in float64: (M, K) -> (M, N)."""
    if weight.bits == 16:
        return x.double() @ weight.data.double().T
    sums = accumulate(q, weight).double()
    return (sums * weight.scales.double()).sum(-1) * scales.double()


def _matmul(x: Tensor, weight: Weight, act_bits: int, act_scale: float | None) -> Tensor:
    q, scales = quantize_activations(x, act_bits, act_scale)
    if isinstance(weight, PackedWeight):
        return _product(x, q, scales, weight)
    stacked = torch.cat([_product(x, q, scales, part) for part in weight.parts], dim=1)
    whole = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    whole[:, weight.order[: stacked.shape[1]]] = stacked
    whole[~torch.isfinite(x).all(-1)] = torch.nan
    return whole


def normalize(
    x: Tensor, eps: float, multiply: Tensor | None = None, add: Tensor | None = None
) -> Tensor:
    """RMS norm over the last dimension, times `multiply`, plus `add` (both (K,) or None)."""
    x = x.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    y = y if multiply is None else y * multiply.float()
    return y if add is None else y + add.float()


def group_norm(
    x: Tensor, batch: int, groups: int, multiply: Tensor, add: Tensor, eps: float,
    activation: str = 'none',
) -> Tensor:
    """Group norm of a map (batch * pixels, channels), then the activation; in float64."""
    maps = x.double().reshape(batch, -1, x.shape[1]).transpose(1, 2)
    y = F.group_norm(maps, groups, multiply.double(), add.double(), eps)
    return ACTIVATIONS[activation](y).transpose(1, 2).reshape(x.shape).float()


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    act_bits: int = 8,
    act_scale: float | None = None,
    hadamard: int = 0,
    diagonal: Tensor | None = None,
    activation: str = 'none',
    up: Weight | None = None,
    up_bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + gate * (activation(x W^T + bias) * (x up^T + up_bias)); absent factors drop out.

    x (..., K) in float32, bfloat16 or float16; returns (..., N) in the dtype of x.
    weight, up  PackedWeight or MixedWeight (N, K)
    diagonal    (K,) float32: multiplies x first
    hadamard    0, or 64: block Hadamard on x before it is quantized
    gate        (N,) float32; residual (..., N) in the dtype of x
    """
    tokens = transform_tokens(x, diagonal, hadamard)
    y = _matmul(tokens, weight, act_bits, act_scale)
    y = y if bias is None else y + bias.double()
    y = ACTIVATIONS[activation](y)
    if up is not None:
        other = _matmul(tokens, up, act_bits, act_scale)
        y = y * (other if up_bias is None else other + up_bias.double())
    y = y if gate is None else y * gate.double()
    y = y.reshape(*x.shape[:-1], -1)
    y = y if residual is None else y + residual.double()
    return y.to(x.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Grouped-query attention in float32: q (batch, M, heads, dim), k and v (batch, S, kv, dim).

    cos, sin: (positions, dim / 2) rotate queries and keys at positions 0.. (halves convention).
    """

    def rotate(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        c, s = cos[: x.shape[1], None], sin[: x.shape[1], None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    repeat = q.shape[2] // k.shape[2]
    q, k = rotate(q.float()), rotate(k.float())
    k, v = (t.float().repeat_interleave(repeat, 2).transpose(1, 2) for t in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, scale=scale)
    return out.transpose(1, 2)


__all__ = ['MixedWeight', 'PackedWeight', 'accumulate', 'attention', 'block_hadamard',
           'group_norm', 'linear', 'normalize', 'quantize_activations']
