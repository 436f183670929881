# SPDX-License-Identifier: Apache-2.0
"""Setpoints -> command messages, with the semantics of the released controllers.

joint_trajectory_controller gets, in every control period, a short receding trajectory: the
setpoint, and after it full braking to rest. It begins after time 0 (a point at 0 is a jump), its
times increase, its last velocity is zero, and it is never empty. It relies on no splicing: each
message stands alone, and if it is the last one the arm brakes within its limits by itself.
forward_command_controller gets the positions in its own joint order.

Owns the arithmetic and the making of messages; every number in them has passed the Guard. It
publishes nothing: that is wire.py. Only the make functions at the end import message packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.contract import Contract, Gripper

KNOT_GRID_S = 1e-3


@dataclass(frozen=True)
class TrajectoryPoint:
    """One point: (joints,) in SI at seconds after the start."""

    time_s: float
    positions: np.ndarray
    velocities: np.ndarray


@dataclass(frozen=True)
class Bounds:
    """What braking must respect: (joints,) in SI, in the order of the controller."""

    lower: np.ndarray
    upper: np.ndarray
    acceleration: np.ndarray


def braking_trajectory(
    positions: np.ndarray, velocities: np.ndarray, bounds: Bounds, lead_s: float
) -> list[TrajectoryPoint]:
    """Return the setpoint at lead_s and the way from it to rest, each joint at its own pace.

    A joint brakes evenly over its stopping time, rounded up to the grid so that no two knots are
    closer: never harder than its acceleration limit. Where that would pass a position limit, the
    velocity at the setpoint is lowered until it does not. Between two knots each joint runs on
    one parabola or rests, and a cubic through positions and velocities, which is what the
    controller lays, is that parabola exactly: so the limits hold between the points too.
    """
    speed = np.abs(velocities)
    stop_s = np.ceil(speed / bounds.acceleration / KNOT_GRID_S) * KNOT_GRID_S
    moving = stop_s > 0
    ahead = np.where(velocities > 0, bounds.upper - positions, positions - bounds.lower)
    safe_s = np.where(moving, stop_s, KNOT_GRID_S)
    speed = np.minimum(speed, 2.0 * np.maximum(ahead, 0.0) / safe_s)
    start = np.where(moving, np.copysign(speed, velocities), 0.0)
    points = [TrajectoryPoint(lead_s, positions, start)]
    for end_s in np.unique(stop_s[moving]):
        passed = np.minimum(end_s, stop_s)
        left = 1.0 - passed / safe_s  # share of the velocity that is left
        travelled = start * 0.5 * passed * (1.0 + left)
        resting = stop_s <= end_s
        points.append(
            TrajectoryPoint(
                float(lead_s + end_s),
                np.clip(positions + travelled, bounds.lower, bounds.upper),  # rounding only
                np.where(resting, 0.0, start * left),
            )
        )
    return points


def joint_order(have: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """Return where each wanted joint is; raises ValueError that names what is missing."""
    missing = [name for name in wanted if name not in have]
    if missing:
        raise ValueError(f'joints {", ".join(missing)} are not among {", ".join(have)}')
    return np.array([list(have).index(name) for name in wanted], dtype=np.intp)


class GripperSwitch:
    """When an action goal is due: on a change between open and closed, with hysteresis.

    A goal per step would flood the action server. hysteresis is a share of the stroke, around its
    middle; positions inside it keep the last goal.
    """

    def __init__(self, gripper: Gripper) -> None:
        self._gripper = gripper
        self._goal: float | None = None

    def update(self, position: float) -> float | None:
        """Return the goal to send now, or None."""
        gripper = self._gripper
        share = (position - gripper.closed_position) / (
            gripper.open_position - gripper.closed_position
        )
        if abs(share - 0.5) < gripper.hysteresis / 2:
            return None
        goal = gripper.open_position if share > 0.5 else gripper.closed_position
        if goal == self._goal:
            return None
        self._goal = goal
        return goal

    def clear(self) -> None:
        """Forget the last goal: after a start it is sent again."""
        self._goal = None


class CommandOrder:
    """Which columns of a setpoint go where: to the controller and to the gripper."""

    def __init__(self, contract: Contract) -> None:
        action, controller = contract.action, contract.controller
        self.arm = joint_order(action.joints, controller.joints)
        self.gripper: int | None = None
        if contract.gripper.kind in ('topic', 'action'):
            self.gripper = int(joint_order(action.joints, [contract.gripper.joint])[0])


# messages ----------------------------------------------------------------------------------


def make_forward(positions: np.ndarray) -> Any:
    """Return a std_msgs/msg/Float64MultiArray."""
    from std_msgs.msg import Float64MultiArray

    return Float64MultiArray(data=positions.tolist())


def make_trajectory(joints: Sequence[str], points: Sequence[TrajectoryPoint]) -> Any:
    """Return a trajectory_msgs/msg/JointTrajectory that starts when it arrives (stamp zero)."""
    from trajectory_msgs.msg import JointTrajectory

    return JointTrajectory(joint_names=list(joints), points=[_point(item) for item in points])


def make_chunk(chunk: ActionChunk) -> Any:
    """Return a planned chunk as a JointTrajectory with its stamp, for viewers and not for use."""
    from trajectory_msgs.msg import JointTrajectory

    message = JointTrajectory(joint_names=list(chunk.joint_names))
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(chunk.stamp_ns, NS_PER_S)
    still = np.zeros(0)
    message.points = [
        _point(TrajectoryPoint(step * chunk.step_dt_s, row, still))
        for step, row in enumerate(chunk.positions)
    ]
    return message


def _point(item: TrajectoryPoint) -> Any:
    from trajectory_msgs.msg import JointTrajectoryPoint

    point = JointTrajectoryPoint(
        positions=item.positions.tolist(), velocities=item.velocities.tolist()
    )
    seconds, nanoseconds = divmod(round(item.time_s * NS_PER_S), NS_PER_S)
    point.time_from_start.sec, point.time_from_start.nanosec = seconds, nanoseconds
    return point
