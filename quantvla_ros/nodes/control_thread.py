# SPDX-License-Identifier: Apache-2.0
"""A thread that ticks at a fixed rate on the steady clock and keeps account of its lateness.

Not an executor timer: an executor wakes for every message and runs one callback at a time, so a
tick there waits behind pictures and services. Refuses to catch up: a tick that was missed is
counted and left out, for two commands at once would be a jump.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

from quantvla_ros.action import NS_PER_S
from quantvla_ros.control.latency import LatencyFigures, LatencyTracker
from quantvla_ros.priority import set_thread_realtime


class ControlThread:
    """Calls tick() rate_hz times a second until stopped. An exception ends it and is kept.

    priority: of SCHED_FIFO, as ros2_control asks for; 0 for none. realtime tells whether the
    system granted it; without it everything works, with more jitter on a busy machine.
    """

    def __init__(self, tick: Callable[[], None], rate_hz: float, priority: int = 0) -> None:
        self._tick = tick
        self._priority = priority
        self.realtime = False
        self._period_ns = round(NS_PER_S / rate_hz)
        self._stop = threading.Event()
        self._lateness = LatencyTracker(window=6000, warm_up=0)
        self._thread = threading.Thread(target=self._run, name='control', daemon=True)
        self.ticks = 0
        self.missed = 0
        self.error: str | None = None

    def start(self) -> None:
        """Begin to tick."""
        self._thread.start()

    def stop(self, timeout_s: float = 2.0) -> bool:
        """End after the present tick; False when it did not end in time."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def lateness(self) -> LatencyFigures:
        """Return how late ticks began, over the last minute at 100 Hz."""
        return self._lateness.figures()

    def _run(self) -> None:
        if self._priority:
            self.realtime = set_thread_realtime(self._priority)
        due_ns = time.monotonic_ns() + self._period_ns
        while not self._stop.is_set():
            wait_ns = due_ns - time.monotonic_ns()
            if wait_ns > 0:
                time.sleep(wait_ns / NS_PER_S)
            late_ns = time.monotonic_ns() - due_ns
            self._lateness.add(max(0, late_ns) / NS_PER_S)
            try:
                self._tick()
            except Exception:  # a border: whoever watches logs it and halts the node
                self.error = traceback.format_exc()
                return
            self.ticks += 1
            due_ns += self._period_ns
            behind = (time.monotonic_ns() - due_ns) // self._period_ns
            if behind > 0:
                self.missed += behind
                due_ns += behind * self._period_ns
