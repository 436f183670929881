# SPDX-License-Identifier: Apache-2.0
"""Spend a budget of bytes on the widths of weights, where the action feels it most.

Layers that read the same input are one unit, so that kernels still run them as one product.
Owns no measurement: errors of rows come in (quant/jacobian.py), the greedy choice is
sensitivity.py's.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from quantvla_ros.quant.layout import EVERYTHING, Layout, lay_out, layout_bytes, override
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.sensitivity import Unit, demote
from quantvla_ros.quant.sites import PolicySites

WIDTHS = (2, 3, 4, 8)  # that errors are asked for
CHANNEL_BYTES = 2  # of a smoothing diagonal, for each input of a layer
ROLES = {'q_proj': 'qkv', 'k_proj': 'qkv', 'v_proj': 'qkv', 'gate_proj': 'in', 'up_proj': 'in'}

Errors = Mapping[str, Mapping[int, Tensor]]  # layer -> width -> (out,)


def uniform_bytes(sites: PolicySites, precision: Scheme) -> int:
    """Bytes of all linears when every one is rounded to the same width: the default budget."""
    return layout_bytes(sites, lay_out(sites, EVERYTHING, precision))


def spend_bytes(
    sites: PolicySites, layout: Layout, errors: Errors, precision: Scheme, budget_mb: float = 0.0
) -> Layout:
    """Return the layout with the widths of weights that fit the budget and hurt the action least.

    Room is left for a diagonal of every layer. Widths are 8 and the precision's own, and 2 where
    a budget that was asked for lies below equal widths. Raises ValueError where even that does
    not fit.
    """
    budget = budget_mb * 1e6 if budget_mb else float(uniform_bytes(sites, precision))
    base = precision.weight_bits
    container = 4 if base == 3 else base
    units, table = _units(sites, errors)
    weights = sum(unit.size for unit in units)
    diagonals = CHANNEL_BYTES * sum(sites.linear(name).in_features for name in errors)
    held = layout_bytes(sites, layout) + diagonals - weights * container // 8
    room = 8 * (budget - held)
    if not budget_mb:  # equal widths are always allowed, where nothing was saved for diagonals
        room = max(room, float(weights * container))
    widths = {8, base} if weights * container <= room else {8, base, 2}
    if base == 8:
        widths = {8} if weights * 8 <= room else {8, 4, 2}
    by_container = {4 if width == 3 else width: width for width in widths}
    costs = {n: {c: e[w] for c, w in by_container.items()} for n, e in table.items()}
    chosen = demote(units, costs, sorted(by_container), room)
    schemes = {}
    for unit, names in _names(sites, errors).items():
        width = by_container[chosen[unit]]
        schemes.update({name: layout[name].with_bits(weight_bits=width) for name in names})
    return override(layout, schemes)


def _names(sites: PolicySites, errors: Errors) -> dict[str, list[str]]:
    """Layers by unit: those of one parent that read the same input."""
    found: dict[str, list[str]] = {}
    for name in errors:
        parent, _, child = name.rpartition('.')
        role = ROLES.get(child, child)
        found.setdefault(f'{parent}.{role}/{sites.linear(name).in_features}', []).append(name)
    return found


def _units(
    sites: PolicySites, errors: Errors
) -> tuple[list[Unit], dict[str, dict[int, float]]]:
    """Units with their number of weights, and the error of each at every width."""
    units, table = [], {}
    for unit, names in _names(sites, errors).items():
        size = sum(sites.linear(n).out_features * sites.linear(n).in_features for n in names)
        units.append(Unit(unit, size))
        widths = errors[names[0]]
        table[unit] = {b: sum(float(errors[n][b].sum()) for n in names) for b in widths}
    return units, table
