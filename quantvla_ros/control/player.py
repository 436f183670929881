# SPDX-License-Identifier: Apache-2.0
"""Execute chunks by their stamps: merge while the old one runs, sample at any time.

Owns when a step is due and how one chunk passes into the next. Judges no value (the Guard admits
chunks) and bounds no command (the JointLimiter does). Steps are dropped because their own time
has passed and for no other reason: no latency is estimated, so a slow first inference cannot make
later chunks skip ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.plan import Plan, blend, plan_of
from quantvla_ros.control.types import Sample

SLOWEST = 0.05  # a smaller speed scale no longer stretches a chunk; the limiter then slows it


@dataclass(frozen=True)
class PlayerSettings:
    """How chunks pass into each other.

    blend_s: shortest blend; it grows with the gap, so that the seam asks for no more than half of
    each joint's velocity and acceleration. max_blend_s: a gap that needs longer is refused.
    prefix_tolerance: rad or m; a chunk made with a prefix that fits so well joins within one step.
    """

    blend_s: float = 0.1
    max_blend_s: float = 0.5
    prefix_tolerance: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.blend_s <= self.max_blend_s:
            raise ValueError(
                f'blend_s is {self.blend_s} and max_blend_s {self.max_blend_s}; '
                'expected 0 < blend_s <= max_blend_s'
            )
        if not self.prefix_tolerance >= 0:
            raise ValueError(f'prefix_tolerance is {self.prefix_tolerance}; expected 0 or more')


@dataclass(frozen=True)
class _Running:
    """What is being executed; replaced whole, never changed. chunk_dt_s: the policy's own step."""

    plan: Plan
    joint_names: tuple[str, ...]
    chunk_dt_s: float


class ChunkPlayer:
    """Plays chunks of limiter.joint_names.

    The inference thread merges, the control timer samples, clear() belongs to whoever starts the
    guard while no inference runs. They share one reference, `_running`, to an immutable snapshot:
    a merge builds the next one beside it and swaps, so sample() waits for nobody and sees either
    the old plan or the new one. A merge that overlaps a clear() may win; the guard then sees a
    plan again, which is why nodes clear once more before they start.
    """

    def __init__(self, limiter: JointLimiter, settings: PlayerSettings | None = None) -> None:
        self._limiter = limiter
        self._settings = settings or PlayerSettings()
        self._running: _Running | None = None  # written by inference, read by the control timer

    def merge(self, chunk: ActionChunk, now_ns: int, *, prefixed: bool = False) -> str | None:
        """Take over a chunk by its stamps; return why it was refused, or None.

        Without a running plan nothing is skipped and step 0 is due now: the arm stood still since
        the observation. prefixed: the chunk was made with remaining() as its real-time-chunking
        prefix, so it continues the plan exactly and is joined without a blend.
        A speed scale below 1 stretches the chunk in time, so that the path stays what it was.
        """
        if chunk.joint_names != self._limiter.joint_names:
            return (
                f'chunk is for joints {list(chunk.joint_names)}; expected '
                f'{list(self._limiter.joint_names)}'
            )
        speed = max(SLOWEST, self._limiter.speed_scale)
        new = plan_of(chunk, chunk.stamp_ns, speed)
        if now_ns >= new.end_ns:
            late_s = (now_ns - new.end_ns) / NS_PER_S
            return f'chunk is late: its last step was due {late_s:.3f} s ago'
        running = self._running
        start_ns = max(now_ns, chunk.stamp_ns)
        if running is None or start_ns >= running.plan.end_ns:
            plan = plan_of(chunk, start_ns, speed)
        else:
            old = running.plan
            gap = np.abs(new.at(start_ns)[0] - old.at(start_ns)[0])
            reason = self._too_far(gap)
            if reason is not None:
                return reason
            length_s = self._blend_s(old, new, start_ns, gap, prefixed=prefixed)
            plan = blend(old, new, now_ns, start_ns, length_s)
        self._running = _Running(plan, chunk.joint_names, chunk.step_dt_s)
        return None

    def _too_far(self, gap: np.ndarray) -> str | None:
        """Refuse a gap (joints,) that even the longest blend cannot cross within the limits.

        The cubic that fades a gap out over T has a rate of at most 1.5 gap / T and a second
        derivative of at most 6 gap / T^2.
        """
        limiter, longest_s = self._limiter, self._settings.max_blend_s
        allowed = np.minimum(
            limiter.velocity * longest_s / 1.5, limiter.acceleration * longest_s**2 / 6
        )
        excess = np.where(limiter.snap, 0.0, gap / allowed)
        joint = int(excess.argmax())
        if excess[joint] <= 1:
            return None
        return (
            f'chunk is {gap[joint]:.3f} away from the running plan at joint '
            f'{limiter.joint_names[joint]!r}; a blend of {longest_s:g} s crosses at most '
            f'{allowed[joint]:.3f} within its limits'
        )

    def _blend_s(
        self, old: Plan, new: Plan, start_ns: int, gap: np.ndarray, *, prefixed: bool
    ) -> float:
        """How long to blend: long enough that the seam takes at most half of each limit.

        The blend adds at most 1.5 gap / T of velocity and 6 gap / T^2 + 4 turn / T of
        acceleration, where turn is the difference of the two velocities. max_blend_s comes
        first; what then exceeds a limit is left to the limiter.
        """
        settings, limiter = self._settings, self._limiter
        left_s = (new.end_ns - start_ns) / NS_PER_S
        if prefixed and float(gap.max()) <= settings.prefix_tolerance:
            # the prefix already holds the old plan: join it at once
            return min(settings.blend_s, new.step_ns / NS_PER_S)
        turn = np.abs(new.at(start_ns)[1] - old.at(start_ns)[1])
        half = 0.5 * limiter.acceleration
        for_acceleration = (2 * turn + np.sqrt(4 * turn**2 + 6 * gap * half)) / half
        wished = np.maximum(3 * gap / limiter.velocity, for_acceleration)
        wished_s = float(np.where(limiter.snap, 0.0, wished).max())
        longest_s = min(settings.max_blend_s, max(left_s, settings.blend_s))
        return min(max(settings.blend_s, wished_s), longest_s)

    def sample(self, now_ns: int) -> Sample | None:
        """Return the plan at now_ns (header time), None when there is none.

        Beyond the end: the last position at rest, exhausted; the guard stops along its own motion.
        """
        running = self._running
        if running is None:
            return None
        plan = running.plan
        if now_ns >= plan.end_ns:
            return Sample(plan.positions[-1], np.zeros(len(plan.positions[-1])), 0, True)
        positions, velocities = plan.at(now_ns)
        steps_left = -(-(plan.end_ns - now_ns) // plan.step_ns)
        return Sample(positions, velocities, steps_left, False)

    def remaining(self, start_ns: int) -> ActionChunk | None:
        """Return the plan from start_ns on, one row per step, as prefix for the next chunk.

        Pass the stamp of the observation: row i is then due together with row i of the next
        chunk. None when nothing is left. Rows past the end are not made up.
        """
        running = self._running
        if running is None or start_ns >= running.plan.end_ns:
            return None
        plan = running.plan
        count = (plan.end_ns - start_ns) // plan.step_ns + 1
        rows = [plan.at(start_ns + i * plan.step_ns)[0] for i in range(count)]
        return ActionChunk(
            running.joint_names, np.array(rows), start_ns, running.chunk_dt_s
        )

    def clear(self) -> None:
        """Forget every plan: after a stop and before a start."""
        self._running = None
