# SPDX-License-Identifier: Apache-2.0
"""The policy node with a tap on its commands, as a process of `quantvla bench swap`.

Notes each command where it leaves for the wire, in memory that is taken beforehand, so that the
tap neither waits nor grows. Started as `python -m quantvla_ros.bench.swap_node FILE --ros-args`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from quantvla_ros.nodes.lifecycle import run
from quantvla_ros.nodes.policy_node import PolicyNode
from quantvla_ros.nodes.serving import Serving

ROWS = 120_000  # commands: twenty minutes at 100 Hz


class Tap:
    """Notes (steady ns when it left, steady ns it was limited by, starts so far, positions)."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self._publish = serving.commands.publish
        self.times = np.ones((ROWS, 3), np.int64)
        self.positions = np.ones((ROWS, len(serving.contract.action.joints)))
        self.count = 0

    def publish(self, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Publish, and note what was published."""
        self._publish(positions, velocities)
        if self.count < ROWS:
            guard = self.serving.guard
            starts = guard.counts['starts']
            self.times[self.count] = time.monotonic_ns(), guard.commanded_ns, starts
            self.positions[self.count] = positions
            self.count += 1

    def write(self, path: Path) -> None:
        """Write everything, with the limits that held."""
        limiter = self.serving.limiter
        np.savez(path, times=self.times[:self.count], positions=self.positions[:self.count],
                 lower=limiter.lower, upper=limiter.upper, velocity=limiter.velocity,
                 acceleration=limiter.acceleration)


class TappedNode(PolicyNode):
    """A policy node whose commands are noted."""

    out = Path()
    tap: Tap | None = None

    def load(self) -> None:
        """Load, then put the tap between the control thread and the publisher."""
        super().load()
        assert self.serving is not None
        self.tap = Tap(self.serving)
        self.serving.send = self.tap.publish

    def unload(self) -> None:
        """Write what was noted, then give everything back."""
        tap, self.tap = self.tap, None
        if tap is not None:
            tap.write(self.out)
        super().unload()


if __name__ == '__main__':
    TappedNode.out = Path(sys.argv.pop(1))
    sys.exit(run(TappedNode))
