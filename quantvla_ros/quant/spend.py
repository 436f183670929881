# SPDX-License-Identifier: Apache-2.0
"""Spend a budget of bytes or of milliseconds on the widths of weights, where the action feels it.

Layers that read the same input are one unit, so that kernels still run them as one product.
Owns no measurement: errors of rows come in (quant/jacobian.py), the greedy choice is
sensitivity.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from quantvla_ros.quant.layout import EVERYTHING, Layout, lay_out, layout_bytes, override
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.sensitivity import Unit, demote
from quantvla_ros.quant.sites import PolicySites

WIDTHS = (2, 3, 4, 8)  # that errors are asked for
CONTAINERS = {2: 2, 3: 4, 4: 4, 8: 8}  # the width in which codes of a width are stored
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
    units, table = _units(sites, errors)
    weights = sum(unit.size for unit in units)
    diagonals = CHANNEL_BYTES * sum(sites.linear(name).in_features for name in errors)
    held = layout_bytes(sites, layout) + diagonals - weights * CONTAINERS[base] // 8
    room = 8 * (budget - held)
    if not budget_mb:  # equal widths are always allowed, where nothing was saved for diagonals
        room = max(room, float(weights * CONTAINERS[base]))
    widths = _widths(base, fits=weights * CONTAINERS[base] <= room)
    costs = {unit.name: {w: unit.size * CONTAINERS[w] for w in widths} for unit in units}
    return _with_widths(sites, layout, errors, demote(costs, table, widths, room))


def spend_ms(
    sites: PolicySites, layout: Layout, errors: Errors, precision: Scheme,
    ms: Mapping[str, Mapping[int, float]], budget_ms: float = 0.0,
) -> Layout:
    """Return the layout with the widths of weights that fit a time and hurt the action least.

    ms: of each unit at each container width (quant/times.py). By default the time of equal
    widths. Bytes are not bounded: where wide weights are as fast as narrow ones, they are taken.
    Raises ValueError where the times are of other layers, or nothing fits.
    """
    base = precision.weight_bits
    _, table = _units(sites, errors)
    if set(table) != set(ms):
        raise ValueError('the times are of a network with other layers; measure them again')
    equal = sum(ms[unit][CONTAINERS[base]] for unit in table)
    budget = budget_ms or equal
    widths = _widths(base, fits=equal <= budget)
    costs = {unit: {w: ms[unit][CONTAINERS[w]] for w in widths} for unit in table}
    return _with_widths(sites, layout, errors, demote(costs, table, widths, budget))


def spent_ms(
    sites: PolicySites, layout: Layout, ms: Mapping[str, Mapping[int, float]]
) -> float:
    """Time that the units of a layout take."""
    units = units_of(sites, [n for n, scheme in layout.items() if scheme.act_bits < 16])
    return sum(ms[unit][CONTAINERS[layout[names[0]].weight_bits]] for unit, names in units.items())


def _widths(base: int, *, fits: bool) -> list[int]:
    """Widths to choose from: none below the precision's own where that fits."""
    if base == 8:
        return [8] if fits else [2, 4, 8]
    return [base, 8] if fits else [2, base, 8]


def _with_widths(
    sites: PolicySites, layout: Layout, errors: Errors, chosen: Mapping[str, int]
) -> Layout:
    schemes = {}
    for unit, names in units_of(sites, errors).items():
        schemes.update({n: layout[n].with_bits(weight_bits=chosen[unit]) for n in names})
    return override(layout, schemes)


def units_of(sites: PolicySites, names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by unit: those of one parent that read the same input."""
    found: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition('.')
        role = ROLES.get(child, child)
        found.setdefault(f'{parent}.{role}/{sites.linear(name).in_features}', []).append(name)
    return found


def _units(
    sites: PolicySites, errors: Errors
) -> tuple[list[Unit], dict[str, dict[int, float]]]:
    """Units with their number of weights, and the error of each at every width."""
    units, table = [], {}
    for unit, names in units_of(sites, errors).items():
        size = sum(sites.linear(n).out_features * sites.linear(n).in_features for n in names)
        units.append(Unit(unit, size))
        widths = errors[names[0]]
        table[unit] = {b: sum(float(errors[n][b].sum()) for n in names) for b in widths}
    return units, table
