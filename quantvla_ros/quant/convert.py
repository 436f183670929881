# SPDX-License-Identifier: Apache-2.0
"""Quantize one linear layer, or a network block by block, as a recipe says.

Owns the order of work: observe, transform, round, pack, replace. Runs no frames itself: `run`
feeds them, and `losses` those of recipes that ask what the action feels. Holds one block's
statistics at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantvla_ros.quant.fit import Fit, clipped_scale, fit_transform, static_scales
from quantvla_ros.quant.jacobian import (
    Loss,
    RowErrors,
    TokenGrams,
    gradients,
    row_errors,
    token_weights,
)
from quantvla_ros.quant.layout import Layout, lay_out, raise_inputs, sensitive_sites
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear, replace_linears
from quantvla_ros.quant.mixed import assign_rows, at_width, pack_rows
from quantvla_ros.quant.observe import InputStatistics, Run, observe
from quantvla_ros.quant.pack import packed, quantize
from quantvla_ros.quant.recipes import Gptq, Nearest, QvlaBits, Recipe, Rounding
from quantvla_ros.quant.rounding import Rounded, gptq, round_nearest
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerStep, Scheme, qmax
from quantvla_ros.quant.simulate import round_tokens
from quantvla_ros.quant.sites import ACTION, PolicySites

Progress = Callable[[str, int, int], None]  # layer, how many are done, how many there are
Losses = Callable[[], Iterable[Loss]]  # random directions of the action, as jacobian.py wants them
REFIT = (0.8, 1.25)  # a row's factor outside says that its sample was too small


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
    if isinstance(rounding, Gptq):
        hessian = fit.transform.gram(seen.guided if rounding.guided else seen.hessian)
        if rounding.noisy:
            hessian = hessian + token_noise(fit, seen, scheme) * torch.eye(len(hessian))
        rounded = gptq(
            weight, hessian, bits, granularity,
            damp=rounding.damp, act_order=rounding.act_order, search=rounding.search,
        )
        return _refit(rounded, weight, fit, seen, scheme) if rounding.refit else rounded
    assert isinstance(rounding, Nearest)
    hessian = fit.transform.gram(seen.hessian)
    importance = hessian.diagonal().float() if rounding.search else None
    return round_nearest(weight, bits, granularity, importance, search=rounding.search)


def token_noise(fit: Fit, seen: InputStatistics, scheme: Scheme) -> float:
    """Variance that rounding adds to each channel of a token: the mean of scale^2 / 12."""
    if scheme.act_bits >= 16 or not seen.tokens:
        return 0.0
    peaks = fit.transform.activations(seen.sample()).abs().amax(1).double()
    return float((peaks / qmax(scheme.act_bits)).pow(2).mean() / 12)


def _mean_error(
    rounded: Rounded, weight: Tensor, fit: Fit, seen: InputStatistics, scheme: Scheme
) -> Tensor:
    """Mean of y - y_q on the sample, (out,): what a bias can take away."""
    z = fit.transform.activations(seen.sample())
    zq = round_tokens(z, scheme.act_bits) if scheme.act_bits < 16 else z
    return (z @ weight.T - zq @ rounded.dequantized().T).mean(0)


def _refit(
    rounded: Rounded, weight: Tensor, fit: Fit, seen: InputStatistics, scheme: Scheme
) -> Rounded:
    """Scale each row by <y, y_q> / <y_q, y_q> on the sample: least squares, at no cost later."""
    z = fit.transform.activations(seen.sample())
    zq = round_tokens(z, scheme.act_bits) if scheme.act_bits < 16 else z
    y, yq = (z @ weight.T).double(), (zq @ rounded.dequantized().T).double()
    power = (yq * yq).sum(0)
    factor = torch.where(power > 0, (y * yq).sum(0) / power.clamp_min(1e-30), 1.0)
    factor = factor.clamp(*REFIT).float()
    return replace(rounded, scale=rounded.scale * factor[:, None])


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
) -> QuantizedLayer:
    """Quantize one layer: W (out, in), its bias and what was seen to enter it.

    row_bits: the width of each output row, for recipes of mixed width.
    """
    scheme = layer_scheme(recipe, scheme, seen)
    if row_bits is not None:
        kept = None if bias is None else bias.float()
        return QuantizedLayer(scheme, pack_rows(weight, row_bits), kept)
    fit = fit_transform(recipe, weight, seen, scheme)
    rounding = recipe.rounding
    if in_action_head and recipe.action_rounding is not None:
        rounding = recipe.action_rounding
    turned = fit.transform.weight(weight.float())
    rounded = _round(rounding, turned, fit, seen, scheme)
    if isinstance(rounding, Gptq) and rounding.centre:
        shift = _mean_error(rounded, turned, fit, seen, scheme)
        bias = shift if bias is None else bias + shift
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


@dataclass(frozen=True)
class Known:
    """What the float network tells once for many recipes, in one pass over the frames.

    seen: inputs of each linear. guides, errors: of jacobian.TokenGrams and RowErrors.
    """

    seen: Mapping[str, InputStatistics]
    guides: Mapping[str, Tensor]
    errors: Mapping[str, Mapping[int, Tensor]]


def ask(net: nn.Module, names: Sequence[str], run: Run, losses: Losses) -> Known:
    """Run the frames once and ask what the action feels, for all named linears."""
    seen = {name: found.to('cpu') for name, found in observe(net, names, run).items()}
    errors, grams = RowErrors(net, names, at_width, QvlaBits().widths), TokenGrams()
    for loss in losses():
        found = gradients(net, names, loss)
        errors.add(found)
        grams.add(found)
    return Known(seen, grams.sums, errors.mean())


def _felt(
    net: nn.Module,
    names: Sequence[str],
    recipe: Recipe,
    precision: Scheme,
    losses: Losses | None,
    known: Known | None,
) -> tuple[dict[str, list[int]], Mapping[str, Tensor]]:
    """Return the widths of rows and the guides that a recipe asks for, by layer."""
    if not recipe.needs_gradients:
        return {}, {}
    if losses is None and known is None:
        raise ValueError(f'recipe {recipe.name!r} needs gradients of the action')
    directions = losses() if losses is not None and known is None else ()
    if not isinstance(recipe.rounding, QvlaBits):
        return {}, known.guides if known else token_weights(net, names, directions)
    widths = recipe.rounding.widths
    errors = known.errors if known else row_errors(net, names, directions, at_width, widths)
    columns = {name: int(net.get_submodule(name).in_features) for name in names}  # type: ignore
    own = {name: errors[name] for name in names}
    return assign_rows(own, columns, widths, precision.weight_bits), {}


def quantize_net(
    net: nn.Module,
    sites: PolicySites,
    recipe: Recipe,
    precision: Scheme,
    run: Run,
    *,
    losses: Losses | None = None,
    known: Known | None = None,
    blockwise: bool = True,
    make: Make = QuantLinear,
    progress: Progress | None = None,
) -> dict[str, QuantizedLayer]:
    """Quantize a network in place and return what is to be stored of each layer.

    blockwise: run the frames once for each block, so that a block is fitted to what the quantized
    blocks before it give, with one block's statistics in memory; else one run for all layers.
    known: what ask() found, so that nothing is run. Raises ValueError when a layer never ran, or
    when a recipe needs losses and has none.
    """
    layout = recipe_layout(recipe, sites, precision)
    order = list(block_order(sites, layout))
    names = [name for _, names in order for name in names]
    rows, guides = _felt(net, names, recipe, precision, losses, known)
    done: dict[str, QuantizedLayer] = {}
    for _, block in order if blockwise and known is None else [('', names)]:
        seen = dict(known.seen) if known else observe(net, block, run)
        silent = sorted(set(block) - set(seen))
        if silent:
            raise ValueError(
                f'the calibration frames never reached {", ".join(silent)}; '
                'calibrate with frames that use every part of the policy'
            )
        fresh = {}
        for name in block:
            linear = net.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            stats = seen.pop(name).to('cpu')
            stats.guide = guides.get(name)
            fresh[name] = quantize_linear(
                recipe,
                linear.weight.cpu(),
                None if linear.bias is None else linear.bias.cpu(),
                stats,
                layout[name],
                in_action_head=sites.linear(name).group in ACTION,
                row_bits=rows.get(name),
            )
            if progress is not None:
                progress(name, len(done) + len(fresh), len(names))
        device = next(iter(net.parameters())).device
        replace_linears(net, fresh, make)
        net.to(device)
        done.update(fresh)
    return done
