# SPDX-License-Identifier: Apache-2.0
"""Position, velocity and acceleration limits that hold on the wire, all at once and always.

Owns the arithmetic of one control period. Decides no stop and keeps no time: the Guard does.
What is limited is what can be measured on the wire: with positions p at times t and steps
h[k] = t[k] - t[k-1], the velocity is v[k] = (p[k] - p[k-1]) / h[k] and the acceleration is the
second difference a[k] = (v[k] - v[k-1]) / ((h[k] + h[k-1]) / 2).

Why a command is always reachable: v[k] belongs to the middle of its step, so under full braking
the v[k] lie on a straight line of slope -A over time, and the midpoint rule integrates a line
exactly. From the end of step k the joint therefore needs at most w^2 / 2A to stop, with
w = max(0, v[k] - A h[k] / 2), whatever the later steps h are. Every step keeps
p[k] + w^2 / 2A <= upper (and its mirror image), so full braking is always allowed by the position
limit and there is always a command that satisfies all three limits, jitter or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantvla_ros.contract import JointLimits
from quantvla_ros.control.urdf import Limit, read_urdf_limits
from quantvla_ros.observation import freeze

DEFAULT_ACCELERATION_RAD = 10.0  # rad/s^2, the rate limiters of libfranka
DEFAULT_ACCELERATION_M = 2.0  # m/s^2, for sliding joints such as gripper fingers
DEFAULT_LEAD_RAD = 0.5
DEFAULT_LEAD_M = 0.1
MARGIN = 1e-6  # share of each limit kept back, so that rounding never crosses it
CLIPPED_RAD, CLIPPED_M = 1e-3, 1e-4  # a command farther from its target counts as clipped
TRACKING_SHARE = 0.7  # share of the braking used to close in on a target: the rest is reserve


def merge_limits(
    joint_names: Sequence[str],
    described: Mapping[str, Limit],
    tighter: Mapping[str, JointLimits],
) -> dict[str, Limit]:
    """Tighten the described limits; fill in the default acceleration.

    Raises ValueError, one sentence per problem, when a value of `tighter` is looser than the
    description or leaves no room, and when a joint is not in the description at all.
    """
    problems = [f'joint {name!r} of limits is not commanded' for name in tighter
                if name not in joint_names]
    merged = {}
    for name in joint_names:
        base, own = described.get(name), tighter.get(name, JointLimits())
        if base is None:
            known = ', '.join(sorted(described)) or 'none'
            problems.append(f'joint {name!r} is not in the robot description, which has {known}')
            continue
        fallback = DEFAULT_ACCELERATION_M if base.prismatic else DEFAULT_ACCELERATION_RAD
        limit = Limit(
            base.lower if own.lower is None else own.lower,
            base.upper if own.upper is None else own.upper,
            base.velocity if own.velocity is None else own.velocity,
            min(base.acceleration, math.inf if own.acceleration is None else own.acceleration),
            base.prismatic,
        )
        for key, seen, bound, looser in (
            ('lower', limit.lower, base.lower, limit.lower < base.lower),
            ('upper', limit.upper, base.upper, limit.upper > base.upper),
            ('velocity', limit.velocity, base.velocity, limit.velocity > base.velocity),
        ):
            if looser:
                problems.append(
                    f'limits.{name}.{key} is {seen:g}, looser than the {bound:g} of the robot '
                    'description; it may only be tightened'
                )
        if limit.lower >= limit.upper:
            problems.append(f'joint {name!r} has no room from {limit.lower:g} to {limit.upper:g}')
        if not math.isfinite(limit.acceleration):
            limit = Limit(limit.lower, limit.upper, limit.velocity, fallback, limit.prismatic)
        merged[name] = limit
    if problems:
        raise ValueError('\n'.join(problems))
    return merged


@dataclass(frozen=True)
class Motion:
    """Where the wire is: last positions, velocities of the last step, and its length in s.

    step_s is 0 for the first command, which starts from rest.
    """

    positions: np.ndarray
    velocities: np.ndarray
    step_s: float

    @classmethod
    def at_rest(cls, positions: np.ndarray) -> Motion:
        """Return the motion of a joint group that stands still."""
        return cls(freeze(np.array(positions, dtype=np.float64)),
                   freeze(np.zeros(len(positions))), 0.0)


class JointLimiter:
    """Turn any finite target into a command that the joints can follow and can stop from.

    lower, upper, velocity, acceleration, lead: (joints,) float64 in SI, in the order of
    joint_names. lead bounds the distance between a command and the measured position: a blocked
    arm is not pushed farther than this. snap: (joints,) bool, the joints whose target may jump
    across their range (a gripper): they follow at their own limits and are not called clipped,
    nor is a chunk refused because of them. Raises ValueError when a joint lacks a position or a
    velocity limit, unless allow_unlimited.
    """

    def __init__(
        self,
        limits: Mapping[str, Limit],
        *,
        lead_rad: float = DEFAULT_LEAD_RAD,
        lead_m: float = DEFAULT_LEAD_M,
        snap_joints: Sequence[str] = (),
        allow_unlimited: bool = False,
    ) -> None:
        self.joint_names = tuple(limits)
        self.prismatic = freeze(np.array([limit.prismatic for limit in limits.values()]))
        self.lower = self._column(limits, 'lower')
        self.upper = self._column(limits, 'upper')
        self.velocity = self._column(limits, 'velocity')
        self.acceleration = self._column(limits, 'acceleration')
        self._refuse_impossible(limits, allow_unlimited=allow_unlimited)
        if not (lead_rad > 0 and lead_m > 0):
            raise ValueError(f'lead is {lead_rad} rad and {lead_m} m; expected above 0')
        self.lead = self.by_kind(lead_rad, lead_m)
        self._scale = 1.0  # written by any thread, read once per step: a float swaps whole
        self._velocity = self.velocity * (1 - MARGIN)
        self._brake = self.acceleration * (1 - MARGIN)
        # one row each for closing in on a target, for the room ahead and for the room behind
        self._brakes = np.array([self._brake * TRACKING_SHARE, self._brake, self._brake])
        strangers = set(snap_joints) - set(limits)
        if strangers:
            raise ValueError(f'snap_joints names {sorted(strangers)}; expected {list(limits)}')
        self.snap = freeze(np.array([name in snap_joints for name in limits]))
        tolerance = np.where(self.snap, math.inf, self.by_kind(CLIPPED_RAD, CLIPPED_M))
        self._tolerance = freeze(tolerance)

    @classmethod
    def from_description(
        cls,
        joint_names: Sequence[str],
        description: str,
        tighter: Mapping[str, JointLimits] | None = None,
        *,
        lead_rad: float = DEFAULT_LEAD_RAD,
        lead_m: float = DEFAULT_LEAD_M,
        snap_joints: Sequence[str] = (),
        allow_unlimited: bool = False,
    ) -> JointLimiter:
        """Read the URDF text, tighten by the contract's limits, refuse what is missing."""
        limits = merge_limits(joint_names, read_urdf_limits(description), tighter or {})
        return cls(
            limits,
            lead_rad=lead_rad,
            lead_m=lead_m,
            snap_joints=snap_joints,
            allow_unlimited=allow_unlimited,
        )

    @staticmethod
    def _column(limits: Mapping[str, Limit], key: str) -> np.ndarray:
        return freeze(np.array([getattr(limit, key) for limit in limits.values()], dtype=float))

    def _refuse_impossible(self, limits: Mapping[str, Limit], *, allow_unlimited: bool) -> None:
        problems = [] if limits else ['no joint is commanded']
        for name, limit in limits.items():
            if not limit.lower < limit.upper:
                problems.append(f'joint {name!r} has no room: {limit.lower:g} to {limit.upper:g}')
            if not limit.velocity > 0:
                problems.append(f'joint {name!r} has velocity {limit.velocity:g}; not above 0')
            if not 0 < limit.acceleration < math.inf:
                problems.append(f'joint {name!r} has no acceleration limit')
            missing = [
                word
                for word, value in (
                    ('lower position', limit.lower),
                    ('upper position', limit.upper),
                    ('velocity', limit.velocity),
                )
                if not math.isfinite(value)
            ]
            if missing and not allow_unlimited:
                problems.append(
                    f'joint {name!r} has no {" and no ".join(missing)} limit; give it under '
                    'limits in the contract, or allow unlimited joints by name'
                )
        if problems:
            raise ValueError('\n'.join(problems))

    def by_kind(self, rad: float, metre: float) -> np.ndarray:
        """Return (joints,) with one value for turning and another for sliding joints."""
        return freeze(np.where(self.prismatic, metre, rad))

    @property
    def speed_scale(self) -> float:
        """Share of velocity, and of acceleration when gaining speed; braking is never scaled."""
        return self._scale

    @speed_scale.setter
    def speed_scale(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f'speed scale is {value!r}; expected 0 to 1')
        self._scale = float(value)

    def inside(self, positions: np.ndarray) -> np.ndarray:
        """Return the nearest pose within the position limits."""
        return np.clip(positions, self.lower, self.upper)

    def step(
        self,
        motion: Motion,
        target: np.ndarray,
        target_velocity: np.ndarray,
        step_s: float,
        *,
        measured: np.ndarray | None = None,
        velocity_share: float = 1.0,
    ) -> tuple[Motion, np.ndarray]:
        """Return the next motion towards a finite target, and which joints were clipped.

        target_velocity lets a lagging command close in without overshoot. velocity_share limits
        the velocity further (the ramp after a start). clipped: (joints,) bool, the command is
        farther from the target than CLIPPED_RAD or CLIPPED_M.
        """
        high, low = self.upper, self.lower
        if measured is not None:
            high = np.minimum(high, measured + self.lead)
            low = np.maximum(low, measured - self.lead)
        aim = np.minimum(np.maximum(target, self.lower), self.upper)
        gap = aim - target_velocity * step_s - motion.positions
        closing, up, down = self._reach(
            np.array([np.abs(gap), high - motion.positions, motion.positions - low]),
            step_s,
            self._brakes,
        )
        wanted = target_velocity + np.copysign(closing, gap)
        bound = self._velocity * (self._scale * velocity_share)
        up, down = np.minimum(up, bound), np.maximum(-down, -bound)
        wanted = np.maximum(np.minimum(wanted, up), down)
        after = self._advance(motion, wanted, step_s, self._scale)
        return after, np.abs(target - after.positions) > self._tolerance

    def brake(self, motion: Motion, step_s: float) -> Motion:
        """Return the next motion of a stop: all joints slow down together along their path."""
        drop = self._brake * (0.5 * (step_s + motion.step_s))
        speed = np.abs(motion.velocities)
        moving = speed > 0
        if not moving.any():
            return Motion(motion.positions, motion.velocities, step_s)
        keep = max(0.0, 1.0 - float((drop[moving] / speed[moving]).min()))
        up, down = self._reach(
            np.array([self.upper - motion.positions, motion.positions - self.lower]),
            step_s,
            self._brakes[1:],
        )
        bound = self._velocity * self._scale
        up, down = np.minimum(up, bound), np.maximum(-down, -bound)
        wanted = np.maximum(np.minimum(motion.velocities * keep, up), down)
        return self._advance(motion, wanted, step_s, 1.0)

    @staticmethod
    def _reach(room: np.ndarray, step_s: float, brake: np.ndarray) -> np.ndarray:
        """Fastest v with v h + max(0, v - A h / 2)^2 / 2A <= room: see the module's docstring."""
        twice = np.maximum(room, 0.0) * 2.0
        fast = np.sqrt(twice * brake) - brake * (0.5 * step_s)
        return np.where(twice > brake * (step_s * step_s), fast, twice * (0.5 / step_s))

    def _advance(
        self, motion: Motion, wanted: np.ndarray, step_s: float, scale: float
    ) -> Motion:
        """Bound the wanted velocity by the acceleration, which has the last word, and move."""
        before = motion.velocities
        change = self._brake * (0.5 * (step_s + motion.step_s))
        high, low = before + change, before - change
        if scale < 1.0:
            # gaining speed is scaled, losing it never is: the stopping distance counts on it
            high = np.where(before >= 0, before + change * scale, np.where(
                high > 0, high * scale, high))
            low = np.where(before <= 0, before - change * scale, np.where(
                low < 0, low * scale, low))
        velocities = np.minimum(np.maximum(wanted, low), high)
        positions = motion.positions + velocities * step_s
        positions = np.minimum(np.maximum(positions, self.lower), self.upper)  # rounding only
        positions.flags.writeable = False
        velocities.flags.writeable = False
        return Motion(positions, velocities, step_s)
