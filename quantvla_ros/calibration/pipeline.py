# SPDX-License-Identifier: Apache-2.0
"""Quantize a whole policy by a recipe: layers, then matching. Shared by the command and the table.

Owns the order of the stages, and the cache of artifacts that need no frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from quantvla_ros.calibration.policy_runs import batches, chunks, losses
from quantvla_ros.observation import Observation
from quantvla_ros.policies.libero_checkpoint import read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_vla import LiberoVlaNet
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import JSON_NAME, Provenance, write_artifact
from quantvla_ros.quant.convert import (
    Known,
    Progress,
    ask,
    quantize_linear,
    quantize_net,
    recipe_layout,
)
from quantvla_ros.quant.layout import EVERYTHING
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear
from quantvla_ros.quant.matching import Factors, fit_factors, fold
from quantvla_ros.quant.observe import InputStatistics
from quantvla_ros.quant.recipes import Recipe, find_recipe
from quantvla_ros.quant.scheme import Scheme, parse_scheme
from quantvla_ros.quant.times import Times, measure_times, watch_work
from quantvla_ros.resources import cache_folder

FELT_FRAMES = 24  # frames that tell what the action feels; each costs a backward pass
MATCHING_BATCH = 4  # frames whose logits are held at once


def ask_policy(policy: LiberoVla, observations: Sequence[Observation], seed: int = 0) -> Known:
    """Learn from the float policy, once, what every recipe needs in one-pass mode."""
    sites = libero_vla_sites(policy.net)
    names = [site.name for site in sites.in_groups(EVERYTHING)]
    return ask(
        policy.net,
        names,
        lambda: _run(policy, observations, seed),
        lambda: losses(policy, _felt(observations), seed=seed),
    )


def _felt(observations: Sequence[Observation]) -> Sequence[Observation]:
    return observations[:: max(1, len(observations) // FELT_FRAMES)][:FELT_FRAMES]


def _run(policy: LiberoVla, observations: Sequence[Observation], seed: int) -> None:
    chunks(policy, observations, seed)


def time_layers(
    policy: LiberoVla, recipe: Recipe, precision: Scheme, observation: Observation
) -> Times:
    """Measure what the layers of a float policy would take in one chunk, at every width."""
    sites = libero_vla_sites(policy.net)
    names = [site.name for site in sites.linears]
    work = watch_work(policy.net, names, lambda: _run(policy, [observation], 0))
    return measure_times(sites, recipe_layout(recipe, sites, precision), work)


@dataclass(frozen=True)
class Result:
    """What was made: layers by name, and the factors of each attention, {} without matching."""

    layers: dict[str, QuantizedLayer]
    factors: dict[str, Factors]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored layers."""
        return sum(layer.nbytes for layer in self.layers.values())


def quantize_policy(
    policy: LiberoVla,
    recipe: Recipe,
    precision: Scheme,
    observations: Sequence[Observation],
    *,
    seed: int = 0,
    known: Known | None = None,
    blockwise: bool = True,
    make: Make = QuantLinear,
    progress: Progress | None = None,
    times: Times | None = None,
) -> Result:
    """Quantize a policy in place. Matching needs the float network too, and keeps a copy of it."""
    sites = libero_vla_sites(policy.net)
    teacher = copy.deepcopy(policy.net) if recipe.matching is not None else None
    layers = quantize_net(
        policy.net,
        sites,
        recipe,
        precision,
        lambda: _run(policy, observations, seed),
        losses=lambda: losses(policy, _felt(observations), seed=seed),
        known=known,
        blockwise=blockwise,
        make=make,
        progress=progress,
        times=times,
    )
    policy.tabulate(policy.net)
    if teacher is None or recipe.matching is None:
        return Result(layers, {})
    parts = batches(policy, observations, seed, MATCHING_BATCH)
    factors = fit_factors(teacher, policy.net, sites, parts, recipe.matching)
    return Result(fold(policy.net, sites, layers, factors, make), factors)


def quantize_unseen(
    net: LiberoVlaNet, recipe: Recipe, precision: Scheme
) -> dict[str, QuantizedLayer]:
    """Quantize without calibration frames. Raises ValueError where the recipe needs them."""
    if recipe.needs_frames:
        raise ValueError(f'recipe {recipe.name!r} needs calibration frames; see `quantvla frames`')
    sites = libero_vla_sites(net)
    layout = recipe_layout(recipe, sites, precision)
    layers = {}
    for site in sites.linears:
        if not layout[site.name].is_float:
            linear = net.get_submodule(site.name)
            assert isinstance(linear, nn.Linear)
            nothing = InputStatistics(site.in_features)
            layers[site.name] = quantize_linear(
                recipe, linear.weight, linear.bias, nothing, layout[site.name]
            )
    return layers


def nearest_artifact(model: Path, precision: str) -> Path:
    """Return an artifact of a checkpoint rounded to nearest, made once and kept in the cache."""
    sha256 = read_settings(model).sha256
    folder = cache_folder() / 'artifacts' / f'{sha256[:12]}-rtn-{precision}'
    if not (folder / JSON_NAME).is_file():
        recipe, scheme = find_recipe('rtn'), parse_scheme(precision)
        checkpoint, net = read_checkpoint(model)
        layers = quantize_unseen(net, recipe, scheme)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_artifact(folder, layers, Provenance(checkpoint.sha256, recipe.name, precision))
    return folder
