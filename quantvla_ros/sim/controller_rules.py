# SPDX-License-Identifier: Apache-2.0
"""What joint_trajectory_controller of ROS 2 jazzy accepts: one function per rule, with its reason.

A rule returns a sentence when it refuses, else None. The released controller says it in its log
only and goes on with what it did before: the sender is not told. Checks no finiteness, because
the released controller does not: a NaN goes through to the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantvla_ros.action import NS_PER_S

VELOCITY_AT_END = 1e-6  # above float noise; the released check compares with epsilon of float


@dataclass(frozen=True)
class Point:
    """One point of a trajectory message. Empty tuples stand for fields that are not given."""

    time_ns: int
    positions: tuple[float, ...]
    velocities: tuple[float, ...] = ()
    accelerations: tuple[float, ...] = ()
    effort: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrajectoryMessage:
    """What a trajectory_msgs/JointTrajectory says. stamp_ns 0 means: start now."""

    joint_names: tuple[str, ...]
    points: tuple[Point, ...]
    stamp_ns: int = 0


@dataclass(frozen=True)
class Expectation:
    """What the controller was configured with, and the time it is."""

    joints: tuple[str, ...]
    now_ns: int
    allow_nonzero_end_velocity: bool = False
    allow_partial_joints: bool = False


Rule = Callable[[TrajectoryMessage, Expectation], 'str | None']


def _time_ns(stamp: Any) -> int:
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def read_message(message: Any) -> TrajectoryMessage:
    """Read a message-like object: nothing is checked here."""
    points = tuple(
        Point(_time_ns(p.time_from_start), tuple(p.positions), tuple(p.velocities),
              tuple(p.accelerations), tuple(p.effort))
        for p in message.points
    )
    return TrajectoryMessage(tuple(message.joint_names), points, _time_ns(message.header.stamp))


def no_joint_names(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Numbers without names could move any joint."""
    return None if message.joint_names else 'empty joint names on incoming trajectory'


def no_points(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """An empty message is not a way to stop: the old trajectory goes on."""
    return None if message.points else 'empty trajectory received'


def wholly_in_the_past(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """A trajectory that has ended already would be a jump to its last point."""
    if not message.stamp_ns:
        return None
    end = message.stamp_ns + message.points[-1].time_ns
    if end >= expected.now_ns:
        return None
    late = (expected.now_ns - end) / NS_PER_S
    return f'trajectory with non-zero start time ends {late:.3f} s in the past'


def unknown_joints(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """A name that the controller does not own is another robot's message or a typo."""
    unknown = [name for name in message.joint_names if name not in expected.joints]
    if not unknown:
        return None
    return f'incoming joints {unknown} do not match the joints {list(expected.joints)}'


def missing_joints(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Without allow_partial_joints_goal every joint of the controller must be told where to go."""
    missing = [name for name in expected.joints if name not in message.joint_names]
    if not missing or expected.allow_partial_joints:
        return None
    return f'joints on incoming trajectory do not match: {missing} are missing'


def repeated_joints(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Two targets for one joint have no meaning."""
    if len(set(message.joint_names)) == len(message.joint_names):
        return None
    return f'joint names {list(message.joint_names)} are not unique'


def moving_at_the_end(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """What follows the last point is a stop, which would be abrupt at a speed above zero."""
    if expected.allow_nonzero_end_velocity:
        return None
    pairs = zip(message.joint_names, message.points[-1].velocities, strict=False)
    for name, velocity in pairs:
        if abs(velocity) > VELOCITY_AT_END:
            return f'velocity of last trajectory point of joint {name!r} is not zero: {velocity:g}'
    return None


def times_do_not_increase(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Two points at one time are a jump, a point before its predecessor has no meaning."""
    for index in range(1, len(message.points)):
        before, here = message.points[index - 1].time_ns, message.points[index].time_ns
        if here <= before:
            return (f'time between points {index - 1} and {index} is not strictly increasing: '
                    f'{before / NS_PER_S:g} s and {here / NS_PER_S:g} s')
    return None


def wrong_widths(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Each point needs one number per name, in every field it uses, and positions always."""
    due = len(message.joint_names)
    for index, point in enumerate(message.points):
        for field in ('positions', 'velocities', 'accelerations'):
            values: Sequence[float] = getattr(point, field)
            if len(values) != due and (values or field == 'positions'):
                return f'mismatch between joint names ({due}) and {field} ({len(values)}) ' \
                       f'at point {index}'
    return None


def effort_given(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """There is no effort interface on a position-controlled arm."""
    if any(point.effort for point in message.points):
        return 'trajectories with effort fields are not supported'
    return None


# in the order in which the released controller looks
RULES: tuple[Rule, ...] = (
    no_joint_names, no_points, wholly_in_the_past, unknown_joints, missing_joints,
    repeated_joints, moving_at_the_end, times_do_not_increase, wrong_widths, effort_given,
)


def refusal(message: TrajectoryMessage, expected: Expectation) -> str | None:
    """Return why the message is refused, or None when it is accepted."""
    for rule in RULES:
        reason = rule(message, expected)
        if reason is not None:
            return reason
    return None
