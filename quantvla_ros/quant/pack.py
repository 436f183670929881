# SPDX-License-Identifier: Apache-2.0
"""Choose a scale, quantize and dequantize. Pure functions on matrices (rows, k).

Codes are symmetric: q = clamp(round(x / s), -qmax, qmax), x ~ q * s, rounding half to even. A
group of zeros has scale 1, so that every scale is finite and positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantvla_ros.kernels.weights import PackedWeight, pack_integers
from quantvla_ros.quant.scheme import Granularity, PerGroup, PerRow, PerTensor, qmax

SEARCH_GRID = 24  # clipping candidates of an error search, from SEARCH_FLOOR to 1 of absmax
SEARCH_FLOOR = 0.4


def grouped(x: Tensor, granularity: Granularity) -> Tensor:
    """View (rows, k) as (rows', groups, size) so that a scale serves the last axis."""
    rows, k = x.shape
    if isinstance(granularity, PerTensor):
        return x.reshape(1, 1, rows * k)
    if isinstance(granularity, PerRow):
        return x.reshape(rows, 1, k)
    if isinstance(granularity, PerGroup):
        if k % granularity.size:
            raise ValueError(
                f'{k} inputs cannot be cut into groups of {granularity.size}; '
                'take a group that divides them, or one scale for each row'
            )
        return x.reshape(rows, k // granularity.size, granularity.size)
    raise ValueError(f'{granularity} has no groups of weights')


def safe_scale(scale: Tensor) -> Tensor:
    """Replace the scale of an all-zero group by 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def absmax_scale(x: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """Scale that maps the largest magnitude of each group to qmax; (rows', groups)."""
    return safe_scale(grouped(x, granularity).abs().amax(-1) / qmax(bits))


def percentile_scale(
    x: Tensor, bits: int, granularity: Granularity, percentile: float = 99.9
) -> Tensor:
    """Scale that clips what lies above a percentile of the magnitudes of each group."""
    groups = grouped(x, granularity).abs()
    rank = min(groups.shape[-1], max(1, round(percentile / 100 * groups.shape[-1])))
    return safe_scale(groups.kthvalue(rank, -1).values / qmax(bits))


def search_scale(
    x: Tensor, bits: int, granularity: Granularity, importance: Tensor | None = None
) -> Tensor:
    """Scale with the least squared error over a grid of clipping ratios, absmax among them.

    importance: (k,) weight of each input's error, such as the mean square of its activation.
    """
    groups = grouped(x, granularity)
    weight = 1.0 if importance is None else grouped(importance.expand_as(x), granularity)
    full = safe_scale(groups.abs().amax(-1) / qmax(bits))
    best, best_error = full, torch.full_like(full, float('inf'))
    for step in range(SEARCH_GRID + 1):
        scale = full * (1 - (1 - SEARCH_FLOOR) * step / SEARCH_GRID)
        codes = torch.clamp((groups / scale[..., None]).round(), -qmax(bits), qmax(bits))
        error = (weight * (codes * scale[..., None] - groups) ** 2).sum(-1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.minimum(error, best_error)
    return best


def quantize(x: Tensor, scale: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """Return the int8 codes of (rows, k); 4-bit and narrower codes still take one byte each."""
    codes = (grouped(x, granularity) / scale[..., None]).round()
    return codes.clamp(-qmax(bits), qmax(bits)).reshape(x.shape).to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """Return codes * scale in the scale's dtype; shape (rows, k)."""
    groups = grouped(codes, granularity).to(scale.dtype) * scale[..., None]
    return groups.reshape(codes.shape)


def fake_quantize(x: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """Round to the grid of absmax scales and back: what an integer layer would see of x."""
    if bits >= 16:
        return x
    flat = x.reshape(-1, x.shape[-1])
    scale = absmax_scale(flat, bits, granularity)
    return dequantize(quantize(flat, scale, bits, granularity), scale, granularity).reshape(
        x.shape
    )


def packed(codes: Tensor, scale: Tensor, bits: int, granularity: Granularity) -> PackedWeight:
    """Bring codes and scales into the one form that the kernels read.

    3-bit codes are stored as 4-bit ones. A scale for the whole tensor is repeated for each row.
    """
    rows, k = codes.shape
    container = 4 if bits == 3 else bits
    scales = scale.float().expand(rows, -1).contiguous()
    group = granularity.size if isinstance(granularity, PerGroup) else 0
    data = pack_integers(codes, container)
    return PackedWeight(container, (rows, k), group, data, scales)
