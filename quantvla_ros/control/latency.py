# SPDX-License-Identifier: Apache-2.0
"""A sliding window of latencies with percentiles and overruns. Knows no clock and no topic."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LatencyFigures:
    """What the window holds, in seconds; zeros while it is empty."""

    count: int
    p50_s: float
    p95_s: float
    p99_s: float
    worst_s: float
    overruns: int


class LatencyTracker:
    """Latencies of one thing done again and again.

    warm_up: so many first values are left out of everything: a cold start tells nothing about
    the steady state, and a maximum that remembers it misleads for ever after.
    budget_s: a longer latency is an overrun; overruns are counted over the whole life, 0 is none.
    One thread adds, any thread reads.
    """

    def __init__(self, *, window: int = 200, warm_up: int = 3, budget_s: float = 0.0) -> None:
        if window < 1 or warm_up < 0 or budget_s < 0:
            raise ValueError(
                f'window {window}, warm_up {warm_up}, budget_s {budget_s}: expected at least 1, '
                '0 and 0'
            )
        self._values: deque[float] = deque(maxlen=window)
        self._values_lock = threading.Lock()  # guards the deque against a reader's copy
        self._to_skip = warm_up
        self._budget_s = budget_s
        self._overruns = 0
        self._count = 0

    def add(self, seconds: float) -> None:
        """Note one latency."""
        if self._to_skip > 0:
            self._to_skip -= 1
            return
        with self._values_lock:
            self._values.append(seconds)
            self._count += 1
            if self._budget_s and seconds > self._budget_s:
                self._overruns += 1

    def figures(self) -> LatencyFigures:
        """Return count and overruns since the start, percentiles of the window."""
        with self._values_lock:
            values, count, overruns = list(self._values), self._count, self._overruns
        if not values:
            return LatencyFigures(count, 0.0, 0.0, 0.0, 0.0, overruns)
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        return LatencyFigures(
            count, float(p50), float(p95), float(p99), max(values), overruns
        )
