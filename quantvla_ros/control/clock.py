# SPDX-License-Identifier: Apache-2.0
"""The two clocks of the control core, injected so that tests move time by hand.

now_ns is the clock of header stamps (ROS time); steady_ns never jumps and serves timeouts.
The two are never mixed in one sum.
"""

from __future__ import annotations

from typing import Protocol

from quantvla_ros.action import NS_PER_S


class Clock(Protocol):
    """A source of both times."""

    def now_ns(self) -> int:
        """Return the time that header stamps are compared with."""

    def steady_ns(self) -> int:
        """Return a time that only moves forward."""


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self, now_ns: int = NS_PER_S, steady_ns: int = 0) -> None:
        self._now_ns = now_ns
        self._steady_ns = steady_ns

    def now_ns(self) -> int:
        """Return the hand-set header time."""
        return self._now_ns

    def steady_ns(self) -> int:
        """Return the hand-set steady time."""
        return self._steady_ns

    def advance(self, seconds: float) -> None:
        """Move both times forward."""
        self._now_ns += round(seconds * NS_PER_S)
        self._steady_ns += round(seconds * NS_PER_S)

    def jump(self, seconds: float) -> None:
        """Move only the header time, as a clock correction does."""
        self._now_ns += round(seconds * NS_PER_S)
