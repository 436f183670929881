# SPDX-License-Identifier: Apache-2.0
"""The two stock controllers of ros2_control as a simulated robot has them, and the gripper.

Emulates what the released jazzy versions do with good and bad commands, so that a policy which
works here has met their rules. Owns no topic and no clock; knows no simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.sim.controller_rules import Expectation, TrajectoryMessage, refusal

SLACK = 1e-6  # rad or m; rounding of a command at its limit is no violation


@dataclass(frozen=True)
class Motion:
    """Measured or desired state of the controller's joints, in its order."""

    positions: np.ndarray
    velocities: np.ndarray


class Controller(Protocol):
    """What the robot asks of either controller."""

    joints: tuple[str, ...]
    active: bool

    def sample(self, now_ns: int, measured: Motion) -> np.ndarray | None:
        """Return the position command of each joint now, or None: nothing was commanded yet."""

    def activate(self) -> None:
        """Forget every command and accept new ones."""


class ForwardCommandController:
    """Passes the last numbers on for ever: no names, no stamps, no timeout, no limit."""

    def __init__(self, joints: Sequence[str]) -> None:
        self.joints = tuple(joints)
        self.activate()

    def activate(self) -> None:
        """Forget every command and accept new ones."""
        self.active = True
        self._command: np.ndarray | None = None

    def receive(self, values: Sequence[float]) -> str | None:
        """Take a command; return a sentence when the controller refuses it.

        A wrong width makes the released controller's update fail, and controller_manager then
        deactivates it: nothing is taken any more until it is activated again. A vector of
        NaN only is ignored; a single NaN is passed on, which the hardware has to survive.
        """
        if not self.active:
            return 'forward_command_controller is inactive after an error; reset the robot'
        command = np.array(values, dtype=np.float64)
        if len(command) != len(self.joints):
            self.active = False
            return (f'command size ({len(command)}) does not match number of interfaces '
                    f'({len(self.joints)}); the controller is deactivated')
        if np.isnan(command).all():
            return None
        self._command = command
        return None

    def sample(self, now_ns: int, measured: Motion) -> np.ndarray | None:
        """Return the last command, however old it is."""
        return self._command if self.active else None


class JointTrajectoryController:
    """Interpolates a trajectory between its points, from where the robot is when it arrives.

    As released with jazzy: a new message replaces the old one at once (nothing is spliced), the
    way to the first point starts at the present state, and a first point at time zero is a jump.
    from_desired: start at the last command instead of the measured state, which the controller
    calls interpolate_from_desired_state (open_loop_control in older releases).
    """

    def __init__(
        self, joints: Sequence[str], allow_nonzero_end_velocity: bool = False,
        allow_partial_joints: bool = False, from_desired: bool = False,
    ) -> None:
        self.joints = tuple(joints)
        self._allow_nonzero_end = allow_nonzero_end_velocity
        self._allow_partial = allow_partial_joints
        self._from_desired = from_desired
        self.activate()

    def activate(self) -> None:
        """Forget every command and accept new ones."""
        self.active = True
        self._message: TrajectoryMessage | None = None
        self._knots: _Knots | None = None
        self._desired: Motion | None = None

    def receive(self, message: TrajectoryMessage, now_ns: int) -> str | None:
        """Take a trajectory; return why it is refused, or None. A refused one changes nothing."""
        expected = Expectation(self.joints, now_ns, self._allow_nonzero_end, self._allow_partial)
        reason = refusal(message, expected)
        if reason is None:
            self._message, self._knots = message, None
        return reason

    def sample(self, now_ns: int, measured: Motion) -> np.ndarray | None:
        """Return the position command of each joint now."""
        if self._message is None:
            return None
        if self._knots is None:
            start = self._desired if self._from_desired and self._desired else measured
            self._knots = _Knots(self.joints, self._message, start, now_ns)
        self._desired = self._knots.at(now_ns)
        return self._desired.positions


class _Knots:
    """A trajectory as knots in time, the state at its arrival first."""

    def __init__(
        self, joints: tuple[str, ...], message: TrajectoryMessage, start: Motion, now_ns: int
    ) -> None:
        begin = message.stamp_ns or now_ns
        columns = [joints.index(name) for name in message.joint_names]
        self.times = np.array([now_ns, *(begin + p.time_ns for p in message.points)], np.int64)
        shape = (len(self.times), len(joints))
        self.positions = np.tile(start.positions, (shape[0], 1))
        self.velocities = np.zeros(shape)
        self.velocities[0] = start.velocities
        self.accelerations = np.zeros(shape)
        for row, point in enumerate(message.points, 1):
            self.positions[row, columns] = point.positions
            if point.velocities:
                self.velocities[row, columns] = point.velocities
            if point.accelerations:
                self.accelerations[row, columns] = point.accelerations
        # the state at arrival has position and velocity, never an acceleration
        self._has_velocity = [True, *(bool(p.velocities) for p in message.points)]
        self._has_acceleration = [False, *(bool(p.accelerations) for p in message.points)]

    def at(self, now_ns: int) -> Motion:
        """Return the desired state: between two knots, or the last one for ever."""
        after = int(np.searchsorted(self.times[1:], now_ns, side='right')) + 1
        if after >= len(self.times):
            return Motion(self.positions[-1].copy(), self.velocities[-1].copy())
        before = after - 1
        span = (self.times[after] - self.times[before]) / NS_PER_S
        t = (now_ns - self.times[before]) / NS_PER_S
        if span <= 0.0:
            return Motion(self.positions[after].copy(), self.velocities[after].copy())
        p0, p1 = self.positions[before], self.positions[after]
        v0, v1 = self.velocities[before], self.velocities[after]
        if not (self._has_velocity[before] and self._has_velocity[after]):
            rate = (p1 - p0) / span
            return Motion(p0 + rate * t, rate)
        if not (self._has_acceleration[before] and self._has_acceleration[after]):
            return _spline(t, _cubic(span, p0, v0, p1, v1))
        a0, a1 = self.accelerations[before], self.accelerations[after]
        return _spline(t, _quintic(span, p0, v0, a0, p1, v1, a1))


def _cubic(
    span: float, p0: np.ndarray, v0: np.ndarray, p1: np.ndarray, v1: np.ndarray
) -> list[np.ndarray]:
    """Return c[k] of sum c[k] t^k that meets position and velocity at 0 and at span."""
    gap = p1 - p0
    return [p0, v0, (3 * gap - (2 * v0 + v1) * span) / span**2,
            (-2 * gap + (v0 + v1) * span) / span**3]


def _quintic(
    span: float, p0: np.ndarray, v0: np.ndarray, a0: np.ndarray,
    p1: np.ndarray, v1: np.ndarray, a1: np.ndarray,
) -> list[np.ndarray]:
    """Return c[k] of sum c[k] t^k that meets position, velocity, acceleration at both ends."""
    gap = p1 - p0
    return [
        p0, v0, a0 / 2,
        (20 * gap - (8 * v1 + 12 * v0) * span + (a1 - 3 * a0) * span**2) / (2 * span**3),
        (-30 * gap + (14 * v1 + 16 * v0) * span + (3 * a0 - 2 * a1) * span**2) / (2 * span**4),
        (12 * gap - 6 * (v1 + v0) * span + (a1 - a0) * span**2) / (2 * span**5),
    ]


def _spline(t: float, coefficients: list[np.ndarray]) -> Motion:
    positions = sum(c * t**k for k, c in enumerate(coefficients))
    velocities = sum(k * c * t ** (k - 1) for k, c in enumerate(coefficients) if k)
    return Motion(np.asarray(positions), np.asarray(velocities))


class GripperJoint:
    """A finger position target -> LIBERO's gripper command, which only knows open and close.

    LIBERO drives its fingers by a number from -1 (open) to 1 (closed) that moves at a fixed speed
    in the sign of the command. Asking for the end positions is exactly LIBERO's open and close;
    a target in between stops the number where it belongs.
    """

    def __init__(self, open_position: float, closed_position: float, speed: float) -> None:
        """Positions in m; speed: of the number, per physics step."""
        self._open, self._closed = open_position, closed_position
        self._speed = speed

    def command(self, target: float, present: float, substeps: int) -> float:
        """Return -1, 0 or 1 for the next physics steps, from the number's present value."""
        share = (target - self._open) / (self._closed - self._open)
        wanted = 2.0 * float(np.clip(share, 0.0, 1.0)) - 1.0
        gap = wanted - present
        at_an_end = abs(wanted) == 1.0
        if not at_an_end and abs(gap) < self._speed * substeps:
            return 0.0
        return float(np.sign(gap))


def violation(
    command: np.ndarray, joints: Sequence[str], limits: dict[str, tuple[float, float]]
) -> str | None:
    """Return what is wrong with a command that reached the hardware, or None.

    The controllers pass such numbers on; a real robot faults on them, so the sender must hear of
    it. limits: joint -> (lower, upper); joints without an entry are not checked.
    """
    for name, value in zip(joints, command, strict=True):
        if not np.isfinite(value):
            return f'{name} was commanded to {value}, which is not a number a robot can follow'
        low, high = limits.get(name, (-np.inf, np.inf))
        if not low - SLACK <= value <= high + SLACK:
            return f'{name} was commanded to {value:.4f}; its limits are {low:.4f} to {high:.4f}'
    return None
