# SPDX-License-Identifier: Apache-2.0
"""Quantize one linear layer, or a network block by block, as a recipe says.

Owns the order of work: observe, transform, round, pack, replace. Runs no frames itself: `run`
feeds them. Holds one block's statistics at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from quantvla_ros.quant.fit import Fit, clipped_scale, fit_transform, static_scales
from quantvla_ros.quant.layout import Layout, lay_out, raise_inputs, sensitive_sites
from quantvla_ros.quant.linear import QuantizedLayer, replace_linears
from quantvla_ros.quant.observe import InputStatistics, Run, observe
from quantvla_ros.quant.pack import packed, quantize
from quantvla_ros.quant.recipes import Gptq, Nearest, Recipe, Rounding
from quantvla_ros.quant.rounding import Rounded, gptq, round_nearest
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerStep, Scheme
from quantvla_ros.quant.sites import ACTION, PolicySites

Progress = Callable[[str, int, int], None]  # layer, how many are done, how many there are


def recipe_layout(recipe: Recipe, sites: PolicySites, precision: Scheme) -> Layout:
    """Which linear gets which scheme under a recipe at a precision."""
    layout = lay_out(sites, recipe.groups, precision)
    if recipe.raise_sensitive:
        layout = raise_inputs(layout, sensitive_sites(sites))
    return layout


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
    hessian = fit.transform.gram(seen.hessian)
    if isinstance(rounding, Gptq):
        return gptq(
            weight, hessian, bits, granularity, damp=rounding.damp, act_order=rounding.act_order
        )
    assert isinstance(rounding, Nearest)
    importance = hessian.diagonal().float() if rounding.search else None
    return round_nearest(weight, bits, granularity, importance, search=rounding.search)


@torch.no_grad()
def quantize_linear(
    recipe: Recipe,
    weight: Tensor,
    bias: Tensor | None,
    seen: InputStatistics,
    scheme: Scheme,
    in_action_head: bool = False,
) -> QuantizedLayer:
    """Quantize one layer: W (out, in), its bias and what was seen to enter it."""
    scheme = layer_scheme(recipe, scheme, seen)
    fit = fit_transform(recipe, weight, seen, scheme)
    rounding = recipe.rounding
    if in_action_head and recipe.action_rounding is not None:
        rounding = recipe.action_rounding
    rounded = _round(rounding, fit.transform.weight(weight.float()), fit, seen, scheme)
    scales = None
    if isinstance(scheme.act, PerStep):
        scales = static_scales(seen, fit.transform, scheme.act_bits)
    return QuantizedLayer(
        scheme,
        packed(rounded.codes, rounded.scale, scheme.weight_bits, scheme.weight),
        None if bias is None else bias.float(),
        fit.transform,
        scales,
    )


def block_order(sites: PolicySites, layout: Layout) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield (block, linears to quantize), in the order of the activations; the rest comes last."""
    left = [site.name for site in sites.linears if not layout[site.name].is_float]
    for block in sites.blocks:
        names = [name for name in left if name.startswith(block + '.')]
        left = [name for name in left if name not in names]
        if names:
            yield block, names
    if left:
        yield '', left


def quantize_net(
    net: nn.Module,
    sites: PolicySites,
    recipe: Recipe,
    precision: Scheme,
    run: Run,
    *,
    blockwise: bool = True,
    progress: Progress | None = None,
) -> dict[str, QuantizedLayer]:
    """Quantize a network in place and return what is to be stored of each layer.

    blockwise: run the frames once for each block, so that a block is fitted to what the quantized
    blocks before it give, with one block's statistics in memory; else one run for all layers.
    Raises ValueError when a layer never ran.
    """
    layout = recipe_layout(recipe, sites, precision)
    order = list(block_order(sites, layout))
    if not blockwise:
        order = [('', [name for _, names in order for name in names])]
    total = sum(len(names) for _, names in order)
    done: dict[str, QuantizedLayer] = {}
    for _, names in order:
        seen = observe(net, names, run)
        silent = sorted(set(names) - set(seen))
        if silent:
            raise ValueError(
                f'the calibration frames never reached {", ".join(silent)}; '
                'calibrate with frames that use every part of the policy'
            )
        fresh = {}
        for name in names:
            linear = net.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            in_head = sites.linear(name).group in ACTION
            fresh[name] = quantize_linear(
                recipe, linear.weight, linear.bias, seen.pop(name), layout[name], in_head
            )
            if progress is not None:
                progress(name, len(done) + len(fresh), total)
        replace_linears(net, fresh)
        done.update(fresh)
    return done
