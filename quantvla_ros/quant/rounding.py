# SPDX-License-Identifier: Apache-2.0
"""How a weight matrix becomes codes: nearest, GPTQ, and the search of a clipping range.

Every function takes W (rows, k) in the frame in which it will be multiplied (after the input
transform) and returns `Rounded`. Hessians are H = X^T X / n of activations in that same frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantvla_ros.quant.pack import absmax_scale, dequantize, quantize, search_scale
from quantvla_ros.quant.scheme import Granularity, PerGroup, PerRow, qmax

GPTQ_BLOCK = 64  # columns whose error is propagated at once


@dataclass(frozen=True)
class Rounded:
    """Codes (rows, k) int8 and their scales (rows, groups) in float32."""

    codes: Tensor
    scale: Tensor
    granularity: Granularity

    def dequantized(self) -> Tensor:
        """The weight that the integers stand for; (rows, k) float32."""
        return dequantize(self.codes, self.scale, self.granularity)


def choose_scale(
    weight: Tensor, bits: int, granularity: Granularity, importance: Tensor | None, search: bool
) -> Tensor:
    """Absmax, or the clipping range with the least (weighted) squared error."""
    if search:
        return search_scale(weight, bits, granularity, importance)
    return absmax_scale(weight, bits, granularity)


def round_nearest(
    weight: Tensor,
    bits: int,
    granularity: Granularity,
    importance: Tensor | None = None,
    *,
    search: bool = False,
) -> Rounded:
    """Round every weight to its nearest code."""
    weight = weight.float()
    scale = choose_scale(weight, bits, granularity, importance, search)
    return Rounded(quantize(weight, scale, bits, granularity), scale, granularity)


def inverse_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Upper U with H^-1 = U^T U after damping by a share of the mean diagonal; float64.

    Row j of U holds, scaled by its diagonal, the down-dated inverse that GPTQ needs at column j.
    Inputs that never fire get a diagonal of 1, so that they are rounded to nearest.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    diagonal[dead] = mean
    diagonal += damp * mean
    # H = R R^T with R upper, from the last column up; then H^-1 = R^-T R^-1 and U = R^-1
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    granularity: Granularity,
    *,
    damp: float = 0.01,
    search: bool = True,
    act_order: bool = False,
    scale: Tensor | None = None,
) -> Rounded:
    """Round column by column, moving each column's error onto the columns not yet rounded.

    w_j <- round(w_j); W_:,i <- W_:,i - (w_j - q_j) / U_jj * U_ji for i > j, with U from
    inverse_cholesky. Scales are fixed before (per row) or when a group begins (per group), from
    the weights as they are then. act_order rounds the inputs with the largest H_jj first (per
    row only, since a group must stay together). scale: (rows, 1), the scales to round to.
    """
    if not isinstance(granularity, (PerRow, PerGroup)):
        raise ValueError(f'GPTQ rounds rows; {granularity} is not a granularity of rows')
    if act_order and isinstance(granularity, PerGroup):
        raise ValueError('act_order mixes the groups; use one scale for each row')
    k = weight.shape[1]
    group = granularity.size if isinstance(granularity, PerGroup) else k
    if k % group:
        raise ValueError(f'{k} inputs cannot be cut into groups of {group}')
    order = torch.arange(k)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w = weight.double()[:, order].T.contiguous()  # (k, rows): a column of W is one run of memory
    ordered = hessian[order][:, order] if act_order else hessian
    upper = inverse_cholesky(ordered, damp)
    importance = hessian.diagonal()[order].float()
    scales = torch.empty(k // group, w.shape[1], dtype=torch.float64)
    codes = torch.empty_like(w)
    limit = qmax(bits)
    for start in range(0, k, GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, k)
        errors = torch.zeros(end - start, w.shape[1], dtype=torch.float64)
        for j in range(start, end):
            if scale is not None:
                scales[0] = scale[:, 0].double()
            elif j % group == 0:
                # weights of this group as compensated so far, those of later blocks included
                span = _pending(w, errors, upper, start, j, end, j + group).T
                scales[j // group] = choose_scale(
                    span.float(), bits, PerRow(), importance[j : j + group], search
                )[:, 0].double()
            s = scales[j // group]
            codes[j] = (w[j] / s).round().clamp(-limit, limit)
            errors[j - start] = (w[j] - codes[j] * s) / upper[j, j]
            w[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
        w[end:] -= upper[start:end, end:].T @ errors
    back = torch.argsort(order)
    return Rounded(codes[back].T.contiguous().to(torch.int8), scales.T.float(), granularity)


def _pending(
    w: Tensor, errors: Tensor, upper: Tensor, start: int, first: int, end: int, last: int
) -> Tensor:
    """Columns first..last as GPTQ will see them: later blocks lack this block's errors so far."""
    last = min(last, w.shape[0])
    if last <= end:
        return w[first:last]
    late = w[end:last] - upper[start:first, end:last].T @ errors[: first - start]
    return torch.cat([w[first:end], late], 0)


def gptq_searched(
    weight: Tensor, hessian: Tensor, bits: int, clips: Sequence[float], *, damp: float = 0.01
) -> Rounded:
    """GPTQ at several clipping ratios; each row keeps the one that changes its output least.

    The error is that under the whole Hessian after the rounding, not the squared error of the
    weights before it, which clips too much once the later columns can make up for an error.
    """
    full = absmax_scale(weight.float(), bits, PerRow())
    scale = torch.cat([full * clip for clip in clips])
    many = weight.repeat(len(clips), 1)
    found = gptq(many, hessian, bits, PerRow(), damp=damp, scale=scale)
    errors = row_output_errors(many, found.dequantized(), hessian).view(len(clips), -1)
    rows = errors.argmin(0) * len(weight) + torch.arange(len(weight))
    return Rounded(found.codes[rows], found.scale[rows], PerRow())


def expected_error(
    weight: Tensor, hessian: Tensor, noise: float, bits: int, damp: float = 0.01
) -> float:
    """Squared output error to expect of GPTQ on rounded tokens, without rounding anything.

    Tokens x + n with white n of variance `noise` leave noise |W|^2. With H + noise I = L L^T from
    the last column up, GPTQ leaves s^2 / 12 sum_j L_jj^2 of a row of scale s.
    """
    w, k = weight.double(), len(hessian)
    error = noise * float(w.pow(2).sum())
    if bits < 16:
        h = hessian.double() + (damp * float(hessian.diagonal().mean()) + noise) * torch.eye(k)
        factor = torch.linalg.cholesky(h.flip(0, 1))
        scale = w.abs().amax(1) / qmax(bits)
        error += float(scale.pow(2).sum() / 12 * factor.diagonal().pow(2).sum())
    return error


def row_output_errors(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """E |x (w - w_q)|^2 of each row under the Hessian; (rows,) float64."""
    d = (weight - rounded).double()
    return ((d @ hessian.double()) * d).sum(1)


def layer_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """E |x (W - W_q)^T|^2 under the Hessian: the error the layer's outputs get from rounding."""
    return float(row_output_errors(weight, rounded, hessian).sum())
