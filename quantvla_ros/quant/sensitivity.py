# SPDX-License-Identifier: Apache-2.0
"""Spend bits where the action feels them: greedy demotion under a budget.

Owns the allocation, not the measurement: errors come in as a table from (unit, bits) to the
action error that this unit alone would cause. A unit is a linear, a row tile or an output row.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Something that gets one width: its name and how much one bit of it costs (in bits)."""

    name: str
    size: int


def demote(
    units: Sequence[Unit],
    errors: Mapping[str, Mapping[int, float]],
    widths: Sequence[int],
    budget_bits: float,
) -> dict[str, int]:
    """Lower widths, cheapest first, until the units take at most budget_bits in all.

    Every unit starts at the widest. The next demotion is the one with the least added error for
    each bit saved, (e_low - e_high) / (size * (b_high - b_low)), over all lower widths, so that a
    width with a bad ratio can be jumped over. Raises ValueError when even the narrowest widths
    exceed the budget.
    """
    ladder = sorted(widths, reverse=True)
    chosen = {unit.name: ladder[0] for unit in units}
    sizes = {unit.name: unit.size for unit in units}
    held = float(sum(unit.size * ladder[0] for unit in units))
    least = sum(unit.size for unit in units) * ladder[-1]
    if least > budget_bits:
        raise ValueError(
            f'{least} bits are needed even at width {ladder[-1]}; the budget is {budget_bits:.0f}'
        )
    steps = (_best_step(unit.name, ladder, sizes, errors, ladder[0]) for unit in units)
    heap = [step for step in steps if step]
    heapq.heapify(heap)
    while held > budget_bits and heap:
        _, name, low, high = heapq.heappop(heap)
        if chosen[name] != high:
            continue
        held -= sizes[name] * (high - low)
        chosen[name] = low
        step = _best_step(name, ladder, sizes, errors, low)
        if step:
            heapq.heappush(heap, step)
    return chosen


def _best_step(
    name: str,
    ladder: Sequence[int],
    sizes: Mapping[str, int],
    errors: Mapping[str, Mapping[int, float]],
    high: int,
) -> tuple[float, str, int, int] | None:
    """Return (added error per saved bit, name, low, high) of the best demotion from `high`."""
    steps = [
        ((errors[name][low] - errors[name][high]) / (sizes[name] * (high - low)), name, low, high)
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
