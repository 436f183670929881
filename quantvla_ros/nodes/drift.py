# SPDX-License-Identifier: Apache-2.0
"""Has the scene left what the policy was calibrated on? Running statistics against stored ranges.

Every few chunks one is looked into: how large the inputs of its layers and the spread of its
attention logits are. Owns when to look, what counts as outside and when it is time to warn.
Stops nothing: a drifted scene is a reason to recalibrate, and the guard judges the commands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MEMORY = 0.3  # weight of the newest look in the running means
MIN_LOOKS = 3  # before anything is claimed


@dataclass(frozen=True)
class DriftSettings:
    """every: chunks from look to look, 0 for none. share: of the layers outside that warns.

    margin: how far beyond the calibrated range, as a share of it, still counts as inside.
    excess: a single layer that stays outside by this factor warns as well.
    """

    every: int = 40
    share: float = 0.05
    margin: float = 0.1
    excess: float = 1.2


@dataclass(frozen=True)
class Range:
    """The smallest and the largest that calibration has seen."""

    low: float
    high: float

    def excess(self, value: float, margin: float, *, partial: bool) -> float:
        """Return how many times a value is outside, below 1 for inside.

        partial: the value may be too small, so that only the upper end can tell.
        """
        over = value / max(self.high * (1 + margin), 1e-12)
        under = 0.0 if partial else self.low * (1 - margin) / max(value, 1e-12)
        return max(over, under)


class Drift:
    """What the looks have found. Written by the inference thread; status() may be read by any."""

    def __init__(self, settings: DriftSettings, ranges: Mapping[str, Range]) -> None:
        self._settings, self._ranges = settings, ranges
        self._chunks = self._looks = 0
        self._share = 0.0
        self._excess: dict[str, float] = {}
        self._status = self._told()

    def due(self) -> bool:
        """Count a chunk; True when it is one to look into."""
        self._chunks += 1
        every = self._settings.every
        return bool(every and self._ranges) and self._chunks % every == 0

    @contextlib.contextmanager
    def looking(self, policy: Any) -> Iterator[None]:
        """Look into the chunk that is made inside, when one is due and the policy can be seen."""
        watch = getattr(policy, 'watching', None)
        if watch is None or not self.due():
            yield
            return
        with watch(self._looks) as seen:
            yield
        self.note({**seen.inputs, **seen.spreads}, seen.partial)

    def note(self, found: Mapping[str, float], partial: frozenset[str] = frozenset()) -> None:
        """Take in one look: name -> value."""
        margin, outside, count = self._settings.margin, 0, 0
        for name, value in found.items():
            if name not in self._ranges:
                continue
            excess = self._ranges[name].excess(value, margin, partial=name in partial)
            before = self._excess.get(name, excess)
            self._excess[name] = before + MEMORY * (excess - before)
            outside += excess > 1
            count += 1
        share = outside / max(1, count)
        self._looks += 1
        weight = max(MEMORY, 1 / self._looks)
        self._share += weight * (share - self._share)
        self._status = self._told()

    @property
    def warning(self) -> str:
        """Say that the scene has left the calibrated range and where it is worst, or ''."""
        return str(self._status['warning'])

    def status(self) -> dict[str, Any]:
        """Return what ~/status tells of drift."""
        return self._status

    def _told(self) -> dict[str, Any]:
        worst = max(self._excess, key=lambda name: self._excess[name], default='')
        excess = self._excess.get(worst, 0.0)
        warning = ''
        outside = self._share > self._settings.share or excess > self._settings.excess
        if self._looks >= MIN_LOOKS and outside:
            warning = (
                f'recalibrate: {100 * self._share:.0f} % of the layers are outside the calibrated '
                f'range, worst {worst} by {excess:.2f} times'
            )
        return {
            'ranges': len(self._ranges), 'looks': self._looks, 'share': round(self._share, 4),
            'worst_layer': worst, 'worst_excess': round(excess, 4), 'warning': warning,
        }


def ranges_of(policy: Any) -> dict[str, Range]:
    """Return the calibrated ranges that a policy carries; none where it was never calibrated."""
    calibration = getattr(policy, 'calibration', None)
    if calibration is None:
        return {}
    return {
        name: Range(float(values[0]), float(values[2]))
        for name, values in {**calibration.activations, **calibration.logits}.items()
    }
