# SPDX-License-Identifier: Apache-2.0
"""Is a chunk worth executing at all? Free functions on values; keeps no state and stops nothing.

Nonsense is refused here, before it becomes part of a plan; overshoot is left to the JointLimiter.
Also holds the settings of the Guard, whose bounds these checks need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.control.limits import JointLimiter


@dataclass(frozen=True)
class GuardSettings:
    """How the guard behaves. Raises ValueError with a sentence for each impossible value.

    max_tick_gap_s: a control tick later than this stops the arm: its motion was not steady.
    min_tick_s: a tick sooner after the last command than this publishes nothing.
    first_chunk_s: how long to hold the start pose while waiting for the first chunk.
    hold_s: how long the rest pose is published after a stop, before silence.
    start_ramp_s, start_speed: after a start the velocity limit grows from this share to all of it.
    long_clip_s: clipping for longer than this stops the arm: the policy left its domain.
    estop_cooldown_s: how long after an e-stop reset is refused.
    max_refusals: so many refused chunks in a row stop the arm.
    max_future_s: a chunk stamped farther ahead than this is refused.
    huge_step_rad, huge_step_m: a chunk with a longer step from row to row, or from the last
        command to its first reachable row, is refused. Snap joints of the limiter may cross
        their whole range besides.
    start_tolerance_rad, start_tolerance_m: how far outside its limits a joint may be at a start;
        the first command is then the nearest pose inside.
    """

    max_tick_gap_s: float = 0.1
    min_tick_s: float = 0.0005
    first_chunk_s: float = 5.0
    hold_s: float = 1.0
    start_ramp_s: float = 1.0
    start_speed: float = 0.1
    long_clip_s: float = 1.0
    estop_cooldown_s: float = 0.5
    max_refusals: int = 3
    max_future_s: float = 0.5
    huge_step_rad: float = 0.5
    huge_step_m: float = 0.1
    start_tolerance_rad: float = 0.02
    start_tolerance_m: float = 0.005

    def __post_init__(self) -> None:
        problems = []
        may_be_zero = ('hold_s', 'start_ramp_s', 'estop_cooldown_s')
        for item in fields(self):
            value = getattr(self, item.name)
            if not math.isfinite(value) or value < 0:
                problems.append(f'{item.name} is {value!r}; expected 0 or more')
            elif value == 0 and item.name not in may_be_zero:
                problems.append(f'{item.name} is {value!r}; expected above 0')
        if self.start_speed > 1:
            problems.append(f'start_speed is {self.start_speed!r}; expected at most 1')
        if self.min_tick_s >= self.max_tick_gap_s:
            problems.append(
                f'min_tick_s is {self.min_tick_s!r}; expected below max_tick_gap_s, '
                f'{self.max_tick_gap_s!r}'
            )
        if problems:
            raise ValueError('\n'.join(problems))


def pose_problem(pose: np.ndarray | None, limiter: JointLimiter, tolerance: np.ndarray) -> str:
    """Return why a measured pose (joints,) cannot be started from, '' when it can."""
    names = limiter.joint_names
    if pose is None:
        return 'no joint positions were measured yet'
    if pose.shape != (len(names),):
        return f'measured positions have shape {pose.shape}; expected {len(names)} joints'
    if not np.isfinite(pose).all():
        bad = [name for name, value in zip(names, pose, strict=True) if not math.isfinite(value)]
        return f'measured position of {", ".join(bad)} is not a number'
    outside = np.maximum(limiter.lower - pose, pose - limiter.upper) - tolerance
    joint = int(outside.argmax())
    if outside[joint] <= 0:
        return ''
    return (
        f'joint {names[joint]!r} is at {pose[joint]:.3f}, outside its limits '
        f'{limiter.lower[joint]:.3f} to {limiter.upper[joint]:.3f}; move it inside by hand'
    )


def _first_reachable(chunk: ActionChunk, now_ns: int) -> int:
    """Row that is due next; the last row when all are past."""
    passed = math.ceil((now_ns - chunk.stamp_ns) / NS_PER_S / chunk.step_dt_s)
    return min(max(passed, 0), chunk.horizon - 1)


def refuse_chunk(
    chunk: ActionChunk,
    limiter: JointLimiter,
    settings: GuardSettings,
    now_ns: int,
    commanded: np.ndarray | None,
) -> tuple[str, str] | None:
    """Return (kind, sentence) when a chunk is nonsense, None when it may be merged.

    commanded: last command (joints,), None before the first.
    """
    names = limiter.joint_names
    if len(chunk.joint_names) != len(names):
        return 'wrong_width', (
            f'chunk has {len(chunk.joint_names)} joints; expected {len(names)}: {list(names)}'
        )
    if chunk.joint_names != names:
        return 'wrong_names', f'chunk is for {list(chunk.joint_names)}; expected {list(names)}'
    if not (np.isfinite(chunk.positions).all() and math.isfinite(chunk.step_dt_s)):
        bad = [f'row {row} of {names[joint]!r} is {chunk.positions[row, joint]}'
               for row, joint in np.argwhere(~np.isfinite(chunk.positions))[:3]]
        what = '; '.join(bad) or f'step_dt_s is {chunk.step_dt_s}'
        return 'non_finite', f'chunk holds values that are not finite: {what}'
    ahead_s = (chunk.stamp_ns - now_ns) / NS_PER_S
    if ahead_s > settings.max_future_s:
        return 'future', (
            f'chunk starts {ahead_s:.3f} s ahead; expected at most {settings.max_future_s:g} s'
        )
    return _huge_step(chunk, limiter, settings, now_ns, commanded)


def _huge_step(
    chunk: ActionChunk,
    limiter: JointLimiter,
    settings: GuardSettings,
    now_ns: int,
    commanded: np.ndarray | None,
) -> tuple[str, str] | None:
    rows, reachable = chunk.positions, _first_reachable(chunk, now_ns)
    entry = rows[reachable] if commanded is None else commanded
    bound = limiter.by_kind(settings.huge_step_rad, settings.huge_step_m)
    bound = np.where(limiter.snap, bound + limiter.upper - limiter.lower, bound)
    with np.errstate(over='ignore'):  # an infinite step is a huge one
        steps = np.abs(np.diff(rows, axis=0)).max(axis=0, initial=0.0)
        steps = np.maximum(steps, np.abs(rows[reachable] - entry))
        excess = steps / bound
    joint = int(excess.argmax())
    if excess[joint] <= 1:
        return None
    unit = 'm' if limiter.prismatic[joint] else 'rad'
    return 'huge_step', (
        f'chunk moves joint {limiter.joint_names[joint]!r} by {steps[joint]:.3f} {unit} in one '
        f'step; at most {bound[joint]:g} {unit}'
    )
