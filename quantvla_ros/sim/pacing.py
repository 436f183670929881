# SPDX-License-Identifier: Apache-2.0
"""Keeps a loop at the pace of a steady clock and measures how well. Owns no thread."""

from __future__ import annotations

from collections.abc import Callable

from quantvla_ros.action import NS_PER_S


class Pacer:
    """Tells when the next period is due and how fast simulated time runs against the clock.

    A lag longer than max_lag_s is given up and counted, so that a pause (a reset, a suspended
    machine) is not followed by a burst.
    """

    def __init__(
        self, period_s: float, steady_ns: Callable[[], int], max_lag_s: float = 0.1,
        window_s: float = 2.0,
    ) -> None:
        self._period_ns = round(period_s * NS_PER_S)
        self._steady_ns = steady_ns
        self._max_lag_ns = round(max_lag_s * NS_PER_S)
        self._window_ns = round(window_s * NS_PER_S)
        self.given_up_ns = 0
        self.restart()

    def restart(self) -> None:
        """Forget the past: the next period is due one period from now."""
        self._due_ns = self._steady_ns() + self._period_ns
        self._window_start_ns = self._steady_ns()
        self._periods = 0
        self._factor: float | None = None

    def wait_s(self) -> float:
        """Return how long to wait until the next period is due; 0 when it is overdue."""
        return max(0, self._due_ns - self._steady_ns()) / NS_PER_S

    def done(self) -> None:
        """Count one period as done."""
        now = self._steady_ns()
        self._due_ns += self._period_ns
        if now - self._due_ns > self._max_lag_ns:
            self.given_up_ns += now - self._due_ns
            self._due_ns = now
        self._periods += 1
        elapsed = now - self._window_start_ns
        if elapsed >= self._window_ns:
            self._factor = self._periods * self._period_ns / elapsed
            self._window_start_ns, self._periods = now, 0

    def real_time_factor(self) -> float | None:
        """Return simulated over wall time of the last full window; 1 is real time."""
        return self._factor
