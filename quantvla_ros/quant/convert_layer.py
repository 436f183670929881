# SPDX-License-Identifier: Apache-2.0
"""Quantize one linear layer as a recipe says: transform, rounding, scales, packing.

Works on a weight and on what was seen to enter it; knows no network and runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantvla_ros.kernels.weights import PackedWeight
from quantvla_ros.quant.fit import (
    Fit,
    clipped_scale,
    fit_transform,
    static_scales,
    token_noise,
)
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.mixed import pack_rows
from quantvla_ros.quant.observe import InputStatistics
from quantvla_ros.quant.pack import packed, quantize
from quantvla_ros.quant.recipes import Gptq, Nearest, Recipe, Rounding
from quantvla_ros.quant.rounding import (
    Rounded,
    gptq,
    gptq_searched,
    round_nearest,
)
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerStep, Scheme
from quantvla_ros.quant.transforms import InputTransform, own_copy


def layer_scheme(recipe: Recipe, scheme: Scheme, seen: InputStatistics) -> Scheme:
    """Fill in the granularities: groups that divide, one scale per step only inside the loop."""
    group = recipe.group if recipe.group and seen.k % recipe.group == 0 else 0
    act = recipe.act
    if scheme.act_bits >= 16 or (isinstance(act, PerStep) and not seen.steps):
        act = PerRow()
    weight = PerGroup(group) if group else PerRow()
    return Scheme(scheme.weight_bits, scheme.act_bits, weight, act)


def _round(
    rounding: Rounding, weight: Tensor, fit: Fit, seen: InputStatistics, scheme: Scheme
) -> Rounded:
    bits, granularity = scheme.weight_bits, scheme.weight
    if fit.clip is not None:
        scale = clipped_scale(weight, bits, granularity, fit.clip)
        return Rounded(quantize(weight, scale, bits, granularity), scale, granularity)
    if isinstance(rounding, Gptq):
        return _gptq(rounding, weight, fit, seen, scheme)
    assert isinstance(rounding, Nearest)
    hessian = fit.transform.gram(seen.hessian)
    importance = hessian.diagonal().float() if rounding.search else None
    return round_nearest(weight, bits, granularity, importance, search=rounding.search)


def _gptq(
    how: Gptq, weight: Tensor, fit: Fit, seen: InputStatistics, scheme: Scheme
) -> Rounded:
    bits, granularity = scheme.weight_bits, scheme.weight
    hessian = fit.transform.gram(seen.hessian)
    noise = token_noise(fit.transform, seen, scheme) if how.noisy else 0.0
    if noise > 0:
        hessian = hessian + noise * torch.eye(len(hessian))
    if how.clips and isinstance(granularity, PerRow):
        return gptq_searched(weight, hessian, bits, how.clips, damp=how.damp)
    return gptq(weight, hessian, bits, granularity, damp=how.damp, act_order=how.act_order,
                search=how.search)


@torch.no_grad()
def quantize_linear(
    recipe: Recipe,
    weight: Tensor,
    bias: Tensor | None,
    seen: InputStatistics,
    scheme: Scheme,
    *,
    in_action_head: bool = False,
    row_bits: Sequence[int] | None = None,
    transform: InputTransform | None = None,
) -> QuantizedLayer:
    """Quantize one layer: W (out, in), its bias and what was seen to enter it.

    row_bits: the width of each output row, for recipes of mixed width. transform: one that was
    fitted for several layers together, instead of the recipe's own for this one.
    """
    scheme = layer_scheme(recipe, scheme, seen)
    if row_bits is not None:
        kept = None if bias is None else bias.float()
        return QuantizedLayer(scheme, pack_rows(weight, row_bits), kept)
    fit = Fit(transform) if transform else fit_transform(recipe, weight, seen, scheme)
    rounding = recipe.rounding
    if in_action_head and recipe.action_rounding is not None:
        rounding = recipe.action_rounding
    turned = fit.transform.weight(weight.float())
    rounded = _round(rounding, turned, fit, seen, scheme)
    scales = None
    if not isinstance(scheme.act, PerRow):
        scales = static_scales(seen, fit.transform, scheme.act, scheme.act_bits)
    return QuantizedLayer(
        scheme,
        packed(rounded.codes, rounded.scale, scheme.weight_bits, scheme.weight),
        None if bias is None else bias.float(),
        fit.transform,
        scales,
    )


def quantize_stacked(
    recipe: Recipe,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    seen: InputStatistics,
    scheme: Scheme,
    *,
    transform: InputTransform,
    in_action_head: bool = False,
) -> list[QuantizedLayer]:
    """Quantize layers that read the same input through one transform; the same as one by one.

    Rows do not know of each other, so that the stacked rows cost one factored Hessian.
    """
    whole = quantize_linear(recipe, torch.cat(list(weights)), None, seen, scheme,
                            in_action_head=in_action_head, transform=transform)
    assert isinstance(whole.weight, PackedWeight)
    layers, first = [], 0
    for weight, bias in zip(weights, biases, strict=True):
        rows = slice(first, first + len(weight))
        first = rows.stop
        part = replace(
            whole.weight, shape=(weight.shape[0], weight.shape[1]),
            data=whole.weight.data[rows].clone(),
            scales=whole.weight.scales[rows].clone(),
        )
        kept = None if bias is None else bias.float()
        layers.append(replace(whole, weight=part, bias=kept, transform=own_copy(transform)))
    return layers
