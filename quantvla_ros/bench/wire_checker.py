# SPDX-License-Identifier: Apache-2.0
"""Judge a published command stream from outside, with arithmetic of its own.

Sees only what a controller would see: positions and the times at which they came. Shares no code
with the limiter or the guard, so that a mistake there cannot hide here. No tolerance is granted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

KINDS = (
    'finite', 'width', 'position', 'velocity', 'acceleration', 'scaled_velocity', 'first_pose',
    'silence_in_motion',
)


class WireChecker:
    """Counts violations by kind, and remembers how close the stream came to each limit.

    lower, upper, velocity, acceleration: (joints,) in SI. Velocity is the first difference of
    positions over the steps between their times, acceleration the second difference over the
    distance of the step's midpoints; a stream starts from rest at its first command.
    """

    def __init__(
        self,
        lower: Sequence[float],
        upper: Sequence[float],
        velocity: Sequence[float],
        acceleration: Sequence[float],
    ) -> None:
        self.lower, self.upper = np.array(lower, float), np.array(upper, float)
        self.velocity, self.acceleration = np.array(velocity), np.array(acceleration)
        self.violations: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.commands = 0
        self.streams = 0
        self.nearest = {'position': 0.0, 'velocity': 0.0, 'acceleration': 0.0}
        self._last: np.ndarray | None = None  # None: no stream runs
        self._last_ns = 0
        self._speed = np.zeros_like(self.lower)
        self._step_s = 0.0
        self._allowed = self.velocity.copy()

    @property
    def total(self) -> int:
        """All violations together."""
        return sum(self.violations.values())

    def silence(self) -> None:
        """Note that publishing ended: a stream may only end at rest."""
        if self._last is not None and np.any(self._speed != 0.0):
            self.violations['silence_in_motion'] += 1
        self._last = None

    def command(
        self, steady_ns: int, positions: np.ndarray, *, scale: float,
        start_pose: np.ndarray | None = None,
    ) -> None:
        """Judge one command; start_pose: the measured pose that a new stream must begin with."""
        self.commands += 1
        if positions.shape != self.lower.shape:
            self.violations['width'] += 1
            return
        if not np.all(np.isfinite(positions)):
            self.violations['finite'] += 1
            return
        inside = (positions >= self.lower) & (positions <= self.upper)
        self.violations['position'] += int(not inside.all())
        if start_pose is not None or self._last is None:
            self._begin(positions, start_pose)
        else:
            self._continue(positions, (steady_ns - self._last_ns) / 1e9, scale)
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        self._note('position', np.abs(positions - middle) / half)
        self._last, self._last_ns = positions, steady_ns

    def _begin(self, positions: np.ndarray, start_pose: np.ndarray | None) -> None:
        self.silence()
        self.streams += 1
        expected = None if start_pose is None else np.clip(start_pose, self.lower, self.upper)
        self.violations['first_pose'] += int(
            expected is None or not np.array_equal(positions, expected)
        )
        self._speed, self._step_s = np.zeros_like(self.lower), 0.0
        self._allowed = self.velocity.copy()

    def _continue(self, positions: np.ndarray, step_s: float, scale: float) -> None:
        if not step_s > 0:
            self.violations['acceleration'] += 1  # two commands at once: no finite acceleration
            return
        speed = (positions - self._last) / step_s
        apart_s = (step_s + self._step_s) / 2
        rate = (speed - self._speed) / apart_s
        self.violations['velocity'] += int(np.any(np.abs(speed) > self.velocity))
        self.violations['acceleration'] += int(np.any(np.abs(rate) > self.acceleration))
        # a smaller speed scale holds as soon as full braking can have reached it
        braking = self._allowed - self.acceleration * (1 - 1e-5) * apart_s
        self._allowed = np.maximum(self.velocity * scale, braking)
        self.violations['scaled_velocity'] += int(np.any(np.abs(speed) > self._allowed + 1e-9))
        self._note('velocity', np.abs(speed) / self.velocity)
        self._note('acceleration', np.abs(rate) / self.acceleration)
        self._speed, self._step_s = speed, step_s

    def judge(self, times: np.ndarray, positions: np.ndarray) -> list[Counter[str]]:
        """Judge what a Tap has noted at full speed scale; return what each command broke.

        times: (commands, 3) ns when it left, ns it was limited by, starts so far; a stream begins
        where that number changes, at whatever pose. positions: (commands, joints).
        """
        fresh = np.diff(times[:, 2], prepend=-1) != 0
        found = []
        for index, pose in enumerate(positions):
            before = self.violations.copy()
            self.command(int(times[index, 1]), pose, scale=1.0,
                         start_pose=pose if fresh[index] else None)
            found.append(self.violations - before)
        return found

    def _note(self, kind: str, shares: np.ndarray) -> None:
        self.nearest[kind] = max(self.nearest[kind], float(shares.max()))
