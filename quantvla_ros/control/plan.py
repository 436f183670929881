# SPDX-License-Identifier: Apache-2.0
"""A plan: knots in time joined by cubics, immutable, C1. Knows no chunk queue and no limit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk

RUN_OUT_S = 0.3  # a plan coasts to rest beyond its end, where a blend is longer than the plan


def slopes(positions: np.ndarray, step_s: float) -> np.ndarray:
    """Velocities (knots, joints) of a monotone cubic through evenly spaced positions.

    The harmonic mean of neighbouring secants where they agree in sign, else 0: between two
    positions the curve never leaves their range, so a gripper that snaps shut does not overshoot
    its limit. The ends take their only secant.
    """
    if len(positions) == 1:
        return np.zeros_like(positions)
    secants = np.diff(positions, axis=0) / step_s
    left, right = secants[:-1], secants[1:]
    agree = left * right > 0
    both = np.where(agree, left + right, 1.0)
    inner = np.where(agree, 2.0 * left * right / both, 0.0)
    return np.concatenate([secants[:1], inner, secants[-1:]])


class Plan:
    """Knots (stamp, position, velocity) and the cubics between them.

    Nothing changes after construction, so one thread may sample while another builds the next.
    end_ns: the last knot. step_ns: distance of the knots of the chunk that it ends in.
    Before the first knot it stands at the first position, after end_ns it coasts to rest.
    """

    def __init__(
        self, stamps_ns: Sequence[int], positions: np.ndarray, velocities: np.ndarray, step_ns: int
    ) -> None:
        self.stamps_ns = list(stamps_ns)
        self.positions = positions
        self.velocities = velocities
        self.step_ns = step_ns
        self.end_ns = self.stamps_ns[-1]
        self._zeros = np.zeros(positions.shape[1])
        self._cubics = self._fit(np.array(self.stamps_ns), positions, velocities)

    @staticmethod
    def _fit(stamps: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
        """Coefficients (intervals, 4, joints) of c0 + c1 t + c2 t^2 + c3 t^3, t in s."""
        length = (np.diff(stamps) / NS_PER_S)[:, None]
        if not len(length):
            return np.zeros((0, 4, positions.shape[1]))
        secant = np.diff(positions, axis=0) / length
        first, last = velocities[:-1], velocities[1:]
        square = (3 * secant - 2 * first - last) / length
        cube = (first + last - 2 * secant) / length**2
        return np.stack([positions[:-1], first, square, cube], axis=1)

    def at(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Return position and velocity at an instant."""
        index = bisect_right(self.stamps_ns, now_ns) - 1
        if index < 0:
            return self.positions[0], self._zeros
        if index >= len(self._cubics):
            return self._coast(now_ns)
        t = (now_ns - self.stamps_ns[index]) / NS_PER_S
        c0, c1, c2, c3 = self._cubics[index]
        return ((c3 * t + c2) * t + c1) * t + c0, (3 * c3 * t + 2 * c2) * t + c1

    def _coast(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Slow down evenly from the last velocity to rest within RUN_OUT_S."""
        t = min((now_ns - self.end_ns) / NS_PER_S, RUN_OUT_S)
        speed = self.velocities[-1]
        return (
            self.positions[-1] + speed * (t - t * t / (2 * RUN_OUT_S)),
            speed * (1 - t / RUN_OUT_S),
        )

    def between(
        self, now_ns: int, until_ns: int
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Return the knots before until_ns that matter from a little before now_ns on.

        The control timer may have read its clock just before a merge read its own.
        """
        last = bisect_right(self.stamps_ns, until_ns - 1)
        first = max(0, bisect_right(self.stamps_ns, now_ns) - 2)
        return (
            self.stamps_ns[first:last],
            self.positions[first:last],
            self.velocities[first:last],
        )


def plan_of(chunk: ActionChunk, start_ns: int, speed: float) -> Plan:
    """Lay a chunk out from start_ns on, slowed down by `speed`, a share of 1."""
    step_s = chunk.step_dt_s / speed
    stamps = [start_ns + round(i * step_s * NS_PER_S) for i in range(chunk.horizon)]
    positions = chunk.positions
    return Plan(stamps, positions, slopes(positions, step_s), round(step_s * NS_PER_S))


def blend(old: Plan, new: Plan, now_ns: int, start_ns: int, length_s: float) -> Plan:
    """Return the plan that is `old` until start_ns and `new` length_s later, C1 throughout.

    Between, new + h, where the cubic h takes the difference of the two plans in position and
    velocity at start_ns to zero. A cubic added to cubics is represented exactly by knots at the
    ends of h and at those of `new` between. The knot of the old plan at start_ns changes nothing
    before it: one cubic cut in two is the same cubic.
    """
    stamps, positions, velocities = old.between(now_ns, start_ns)
    end_ns = start_ns + max(1, round(length_s * NS_PER_S))
    (p0, v0), (p1, v1) = old.at(start_ns), new.at(start_ns)
    gap, turn = p0 - p1, v0 - v1
    first, last = bisect_right(new.stamps_ns, start_ns), bisect_right(new.stamps_ns, end_ns - 1)
    knots, rows, rates = list(stamps), [*positions], [*velocities]
    for stamp in (start_ns, *new.stamps_ns[first:last], end_ns):
        s = (stamp - start_ns) / (end_ns - start_ns)
        position, velocity = new.at(stamp)
        fade = gap * (1 + 2 * s) + turn * (length_s * s)
        knots.append(stamp)
        rows.append(position + fade * (1 - s) ** 2)
        rates.append(
            velocity + (gap * (6 * s * (s - 1)) / length_s) + turn * ((1 - s) * (1 - 3 * s))
        )
    rest = bisect_right(new.stamps_ns, end_ns)
    knots += new.stamps_ns[rest:]
    rows += [*new.positions[rest:]]
    rates += [*new.velocities[rest:]]
    return Plan(knots, np.array(rows), np.array(rates), new.step_ns)
