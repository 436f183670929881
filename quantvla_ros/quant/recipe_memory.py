# SPDX-License-Identifier: Apache-2.0
"""What a recipe makes of a model's memory, counted twice: as papers do, and as it is held.

The papers' way: linears of backbone and action layers alone, codes, float16 scales, and the
metadata that the paper's own totals imply where they are known. Held: every part of the served
model, transforms and scales as our artifacts store them. Pure arithmetic on sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantvla_ros.quant.convert import recipe_layout
from quantvla_ros.quant.layout import Layout
from quantvla_ros.quant.memory import (
    FLOAT_BYTES,
    OMEGA,
    QUANTVLA,
    SCALE_BYTES,
    TARGETS,
    Extras,
    float_bytes,
    omega_bytes,
    others_bytes,
    rotated_bytes,
)
from quantvla_ros.quant.recipes import (
    Greedy,
    Hadamard,
    Recipe,
    Search,
    Snake,
    Step,
    Svd,
    SvdHadamard,
    TwoPointer,
)
from quantvla_ros.quant.scheme import PerStep, Scheme
from quantvla_ros.quant.sites import ACTION, LinearSite, PolicySites
from quantvla_ros.quant.transforms import block_size

INDEX_BYTES = 8  # a permutation is stored as int64


@dataclass(frozen=True)
class RecipeMemory:
    """Bytes of one recipe: as papers count, and what the served model holds by part."""

    name: str
    papers: int
    held: dict[str, int]

    @property
    def total(self) -> int:
        """Everything held."""
        return sum(self.held.values())


def transform_bytes(steps: Sequence[Step], inputs: int, number_bytes: int, index: int) -> int:
    """Bytes of a layer's input transform; of a searched one, the largest it may come to."""
    total = 0
    for step in steps:
        if isinstance(step, Search):
            total += max(transform_bytes(o, inputs, number_bytes, index) for o in step.options)
        elif isinstance(step, (Snake, TwoPointer)):
            total += index * inputs
        elif isinstance(step, (Svd, SvdHadamard)):
            total += number_bytes * inputs * block_size(inputs, step.block)
        elif isinstance(step, Greedy):
            total += number_bytes * block_size(inputs, step.block) ** 2
        elif not isinstance(step, Hadamard):  # a diagonal; a Hadamard is not stored
            total += number_bytes * inputs
    return total


def _scales(recipe: Recipe, site: LinearSite) -> int:
    group = recipe.group if recipe.group and site.in_features % recipe.group == 0 else 0
    return site.out_features * (site.in_features // group if group else 1)


def _codes(site: LinearSite, scheme: Scheme) -> int:
    container = 4 if scheme.weight_bits == 3 else scheme.weight_bits
    return site.out_features * -(-site.in_features * container // 8)


def _papers_layer(
    family: str, recipe: Recipe, site: LinearSite, scheme: Scheme, steps: int
) -> int:
    if scheme.is_float:
        return float_bytes(site)
    if recipe.name == 'quantvla' and family in QUANTVLA and scheme.weight_bits == 4:
        block, permuted, _ = QUANTVLA[family]
        return rotated_bytes(site, block, permuted=permuted)
    if recipe.name == 'omega_qvla' and family in OMEGA and scheme.weight_bits == 4:
        return omega_bytes(site, OMEGA[family][0])
    bias = FLOAT_BYTES * site.out_features if site.bias else 0
    static = FLOAT_BYTES * steps if isinstance(recipe.act, PerStep) else 0
    return (_codes(site, scheme) + FLOAT_BYTES * _scales(recipe, site) + static + bias
            + transform_bytes(recipe.transform, site.in_features, FLOAT_BYTES, 4))


def _held(
    recipe: Recipe, sites: PolicySites, layout: Layout, extras: Extras, steps: int
) -> dict[str, int]:
    parts = {'codes and bias': 0, 'scales': 0, 'transforms': 0, 'linears left in float': 0}
    for site in sites.linears:
        if layout[site.name].is_float:
            parts['linears left in float'] += float_bytes(site)
            continue
        bias = SCALE_BYTES * site.out_features if site.bias else 0
        parts['codes and bias'] += _codes(site, layout[site.name]) + bias
        looped = isinstance(recipe.act, PerStep) and site.group in ACTION
        parts['scales'] += SCALE_BYTES * (_scales(recipe, site) + (steps if looped else 0))
        parts['transforms'] += transform_bytes(
            recipe.transform, site.in_features, SCALE_BYTES, INDEX_BYTES)
    return {**parts, **others_bytes(extras)}


def recipe_memory(
    family: str,
    recipe: Recipe,
    precision: Scheme,
    whole: PolicySites,
    served: PolicySites,
    extras: Extras,
    steps: int,
) -> RecipeMemory:
    """Count a recipe at a precision both ways.

    whole: sites of the published model, which papers count. served: after the exact savings.
    A recipe of mixed widths is counted at the mean width that the precision names.
    """
    layout = recipe_layout(recipe, whole, precision)
    papers = sum(_papers_layer(family, recipe, site, layout[site.name], steps)
                 for site in whole.in_groups(TARGETS))
    own = recipe_layout(recipe, served, precision)
    return RecipeMemory(recipe.name, papers, _held(recipe, served, own, extras, steps))
