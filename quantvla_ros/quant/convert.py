# SPDX-License-Identifier: Apache-2.0
"""Quantize a network block by block, as a recipe says.

Owns the order of work: observe, quantize each layer (convert_layer.py), replace. Runs no frames
itself: `run` feeds them, and `losses` those of recipes that ask what the action feels. Holds one
block's statistics at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from quantvla_ros.quant.convert_layer import layer_scheme as layer_scheme
from quantvla_ros.quant.convert_layer import quantize_linear, quantize_stacked
from quantvla_ros.quant.fit import fit_transform
from quantvla_ros.quant.jacobian import Loss, RowErrors, gradients, row_errors
from quantvla_ros.quant.layout import Layout, lay_out, override, raise_inputs, sensitive_sites
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear, replace_linears
from quantvla_ros.quant.mixed import assign_rows, at_width
from quantvla_ros.quant.observe import InputStatistics, Run, observe, same_inputs
from quantvla_ros.quant.recipes import QvlaBits, Recipe, Spend
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.sites import ACTION, PolicySites
from quantvla_ros.quant.spend import WIDTHS, Errors, spend_bytes, spend_ms
from quantvla_ros.quant.times import Times

Progress = Callable[[str, int, int], None]  # layer, how many are done, how many there are
Losses = Callable[[], Iterable[Loss]]  # random directions of the action, as jacobian.py wants them
STORED = Scheme(8, 16)  # of layers that run once at load
ROUNDED = Recipe('stored', '', '', '')  # to nearest, whatever enters


def recipe_layout(recipe: Recipe, sites: PolicySites, precision: Scheme) -> Layout:
    """Which linear gets which scheme under a recipe at a precision, before any spending."""
    layout = lay_out(sites, recipe.groups, precision)
    if recipe.raise_sensitive:
        layout = raise_inputs(layout, sensitive_sites(sites))
    return layout


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

    seen: inputs of each linear. errors: of jacobian.RowErrors.
    """

    seen: Mapping[str, InputStatistics]
    errors: Mapping[str, Mapping[int, torch.Tensor]]


def ask(net: nn.Module, names: Sequence[str], run: Run, losses: Losses) -> Known:
    """Run the frames once and ask what the action feels, for all named linears."""
    seen = {name: found.to('cpu') for name, found in observe(net, names, run).items()}
    widths = sorted({*QvlaBits().widths, *WIDTHS})
    errors = RowErrors(net, names, at_width, widths)
    for loss in losses():
        errors.add(gradients(net, names, loss))
    return Known(seen, errors.mean())


def _felt(
    net: nn.Module,
    names: Sequence[str],
    recipe: Recipe,
    losses: Losses | None,
    known: Known | None,
) -> Mapping[str, Mapping[int, torch.Tensor]]:
    """Return the errors of rows that a recipe asks for, by layer and width."""
    if not recipe.needs_gradients and recipe.spend is None:
        return {}
    if known is not None:
        return {name: known.errors[name] for name in names}
    if losses is None:
        if not recipe.needs_gradients:
            return {}
        raise ValueError(f'recipe {recipe.name!r} needs gradients of the action')
    rounding = recipe.rounding
    widths = rounding.widths if isinstance(rounding, QvlaBits) else WIDTHS
    return row_errors(net, names, losses(), at_width, widths)


def _row_bits(
    net: nn.Module, recipe: Recipe, precision: Scheme,
    errors: Mapping[str, Mapping[int, torch.Tensor]],
) -> dict[str, list[int]]:
    """Return the width of every row, for recipes of mixed width."""
    if not isinstance(recipe.rounding, QvlaBits):
        return {}
    columns = {name: int(net.get_submodule(name).in_features) for name in errors}  # type: ignore
    return assign_rows(errors, columns, recipe.rounding.widths, precision.weight_bits)


def _shared(
    net: nn.Module, sites: PolicySites, recipe: Recipe, layout: Layout,
    seen: Mapping[str, InputStatistics],
) -> Iterator[tuple[list[str], list[QuantizedLayer]]]:
    """Quantize together, through one transform, the layers that read the same input."""
    for group in same_inputs(seen):
        weights = {name: _linear(net, name).weight.cpu().float() for name in group}
        stats, found = seen[group[0]], {}
        for name in group:
            bits = layout[name].act_bits
            if bits not in found:
                alike = [weights[n] for n in group if layout[n].act_bits == bits]
                found[bits] = fit_transform(recipe, torch.cat(alike), stats, layout[name])
        for scheme in dict.fromkeys(layout[name] for name in group):
            names = [name for name in group if layout[name] == scheme]
            yield names, quantize_stacked(
                recipe, [weights[n] for n in names], [_bias(net, n) for n in names], stats,
                scheme, transform=found[scheme.act_bits].transform,
                in_action_head=sites.linear(names[0]).group in ACTION,
            )


def _single(
    net: nn.Module, sites: PolicySites, recipe: Recipe, layout: Layout,
    seen: Mapping[str, InputStatistics], rows: Mapping[str, list[int]],
) -> Iterator[tuple[list[str], list[QuantizedLayer]]]:
    """Quantize each layer by itself."""
    for name, stats in seen.items():
        yield [name], [quantize_linear(
            recipe, _linear(net, name).weight.cpu(), _bias(net, name), stats, layout[name],
            in_action_head=sites.linear(name).group in ACTION, row_bits=rows.get(name),
        )]


def _bias(net: nn.Module, name: str) -> torch.Tensor | None:
    """A tensor and no parameter, which a module that holds it would count as its own."""
    bias = _linear(net, name).bias
    return None if bias is None else bias.detach().cpu()


def _linear(net: nn.Module, name: str) -> nn.Linear:
    linear = net.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _seen(
    net: nn.Module, block: Sequence[str], run: Run, known: Known | None
) -> dict[str, InputStatistics]:
    """What enters the layers of a block. Raises ValueError where nothing does."""
    found = dict(known.seen) if known else observe(net, block, run)
    silent = sorted(set(block) - set(found))
    if silent:
        raise ValueError(
            f'the calibration frames never reached {", ".join(silent)}; '
            'calibrate with frames that use every part of the policy'
        )
    return {name: found[name].to('cpu') for name in block}


def _unseen(sites: PolicySites, names: Sequence[str]) -> dict[str, InputStatistics]:
    return {name: InputStatistics(sites.linear(name).in_features) for name in names}


def _spend(
    sites: PolicySites, layout: Layout, errors: Errors, precision: Scheme, how: Spend,
    times: Times | None,
) -> Layout:
    """Return the layout with the widths that a budget allows."""
    if not how.in_time:
        return spend_bytes(sites, layout, errors, precision, how.budget_mb)
    if times is None:
        raise ValueError('a recipe that spends time needs the times of the layers')
    return spend_ms(sites, layout, errors, precision, times.ms, how.budget_ms)


@torch.no_grad()
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
    times: Times | None = None,
) -> dict[str, QuantizedLayer]:
    """Quantize a network in place and return what is to be stored of each layer.

    blockwise: run the frames once for each block, so that a block is fitted to what the quantized
    blocks before it give, with one block's statistics in memory; else one run for all layers.
    known: what ask() found, so that nothing is run. times: for a recipe that spends time. Raises
    ValueError when a layer never ran, or when a recipe needs losses or times and has none.
    """
    layout = recipe_layout(recipe, sites, precision)
    order = list(block_order(sites, layout))
    names = [name for _, names in order for name in names]
    errors = _felt(net, names, recipe, losses, known)
    rows = _row_bits(net, recipe, precision, errors)
    once: list[str] = []
    if recipe.spend is not None and errors:
        once = [site.name for site in sites.in_groups(recipe.spend.stored)]
        layout = override(layout, dict.fromkeys(once, STORED))
        layout = _spend(sites, layout, errors, precision, recipe.spend, times)
    done: dict[str, QuantizedLayer] = {}

    def take(found: Iterator[tuple[list[str], list[QuantizedLayer]]]) -> None:
        fresh: dict[str, QuantizedLayer] = {}
        for group, layers in found:
            fresh.update(zip(group, layers, strict=True))
            if progress is not None:
                progress(group[-1], len(done) + len(fresh), len(names) + len(once))
        device = next(iter(net.parameters())).device
        replace_linears(net, fresh, make)
        net.to(device)
        done.update(fresh)

    for block in [names] if known or not blockwise else [list(block) for _, block in order]:
        seen = _seen(net, block, run, known)
        if recipe.shared:
            take(_shared(net, sites, recipe, layout, seen))
        else:
            take(_single(net, sites, recipe, layout, seen, rows))
    take(_single(net, sites, ROUNDED, layout, _unseen(sites, once), {}))
    return done
