# SPDX-License-Identifier: Apache-2.0
"""Spend bits where the action feels them: greedy demotion under a budget.

Owns the allocation, not the measurement: errors come in as a table from (unit, bits) to the
action error that this unit alone would cause. A unit is a linear, a row tile or an output row.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Costs = Mapping[str, Mapping[int, float]]  # unit -> width -> what it costs


@dataclass(frozen=True)
class Unit:
    """Something that gets one width: its name and how much one bit of it costs (in bits)."""

    name: str
    size: int


def bit_costs(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, dict[int, int]]:
    """Bits that each unit takes at each width."""
    return {unit.name: {width: unit.size * width for width in widths} for unit in units}


def demote(
    costs: Costs, errors: Mapping[str, Mapping[int, float]], widths: Sequence[int], budget: float
) -> dict[str, int]:
    """Lower widths, cheapest first, until the units cost at most the budget in all.

    costs, errors: of each unit at each width; a cost is in bits, milliseconds or what the budget
    is in. Every unit starts at the widest. The next demotion is the one with the least added
    error for what it saves, (e_low - e_high) / (c_high - c_low), over all lower widths that save
    anything, so that a width with a bad ratio can be jumped over. Raises ValueError when the
    cheapest widths exceed the budget.
    """
    ladders = {name: _worth(widths, by_width) for name, by_width in costs.items()}
    chosen = {name: ladder[0] for name, ladder in ladders.items()}
    held = float(sum(costs[name][width] for name, width in chosen.items()))
    least = float(sum(costs[name][ladder[-1]] for name, ladder in ladders.items()))
    if least > budget:
        raise ValueError(
            f'{least:.6g} are needed even at width {min(widths)}; the budget is {budget:.6g}'
        )
    steps = (_best_step(n, ladders[n], costs[n], errors[n], chosen[n]) for n in costs)
    heap = [step for step in steps if step]
    heapq.heapify(heap)
    while held > budget and heap:
        _, name, low, high = heapq.heappop(heap)
        held -= costs[name][high] - costs[name][low]
        chosen[name] = low
        step = _best_step(name, ladders[name], costs[name], errors[name], low)
        if step:
            heapq.heappush(heap, step)
    return chosen


def _worth(widths: Sequence[int], costs: Mapping[int, float]) -> list[int]:
    """Widths, widest first, that cost less than every wider one; the others are never worth it."""
    ladder: list[int] = []
    for width in sorted(widths, reverse=True):
        if not ladder or costs[width] < costs[ladder[-1]]:
            ladder.append(width)
    return ladder


def _best_step(
    name: str,
    ladder: Sequence[int],
    costs: Mapping[int, float],
    errors: Mapping[int, float],
    high: int,
) -> tuple[float, str, int, int] | None:
    """Return (added error for what is saved, name, low, high) of the best demotion from `high`."""
    steps = [
        ((errors[low] - errors[high]) / (costs[high] - costs[low]), name, low, high)
        for low in ladder
        if low < high
    ]
    return min(steps) if steps else None


def total_error(errors: Mapping[str, Mapping[int, float]], chosen: Mapping[str, int]) -> float:
    """Sum of the units' own errors: the first-order estimate that the allocation minimises."""
    return sum(errors[name][bits] for name, bits in chosen.items())


def mean_bits(units: Sequence[Unit], chosen: Mapping[str, int]) -> float:
    """Average width over weights (not over units)."""
    size = sum(unit.size for unit in units)
    return sum(unit.size * chosen[unit.name] for unit in units) / size


def sort_rows(bits: Sequence[int]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Order rows by width, widest first, so that a layer becomes a few uniform products.

    Returns (order, runs): order lists the original row at each new place (stable), runs are
    (first, last, bits) in the new order.
    """
    order = sorted(range(len(bits)), key=lambda row: -bits[row])
    runs: list[tuple[int, int, int]] = []
    for place, row in enumerate(order):
        if runs and runs[-1][2] == bits[row]:
            runs[-1] = (runs[-1][0], place + 1, bits[row])
        else:
            runs.append((place, place + 1, bits[row]))
    return order, runs
