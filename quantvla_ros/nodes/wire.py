# SPDX-License-Identifier: Apache-2.0
"""The publishers behind a contract's controller and gripper. Wires only: commands.py computes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from quantvla_ros.contract import Contract, Gripper
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.nodes.commands import (
    Bounds,
    CommandOrder,
    GripperSwitch,
    braking_trajectory,
    make_forward,
    make_trajectory,
)
from quantvla_ros.nodes.names import COMMAND


class GripperAction:
    """A gripper behind control_msgs/action/GripperCommand, where the robot has control_msgs."""

    def __init__(self, node: Any, gripper: Gripper) -> None:
        try:
            self._type = importlib.import_module('control_msgs.action').GripperCommand
        except ImportError as error:
            raise ValueError(
                'gripper.kind is action, which needs control_msgs; install '
                'ros-$ROS_DISTRO-control-msgs, or use gripper.kind joint or topic'
            ) from error
        from rclpy.action import ActionClient

        self._client = ActionClient(node, self._type, gripper.topic)
        self._effort = gripper.max_effort

    def send(self, position: float) -> None:
        """Send a goal and do not wait for its end: a good grasp looks like a stall."""
        goal = self._type.Goal()
        goal.command.position = position
        goal.command.max_effort = self._effort
        self._client.send_goal_async(goal)

    def destroy(self) -> None:
        """Give the client back."""
        self._client.destroy()


class CommandPublisher:
    """Publishes setpoints to the controller and to the gripper of a contract.

    limiter: of action.joints. publish is for the control
    thread; the rest is for the executor.
    """

    def __init__(
        self, node: Any, contract: Contract, limiter: JointLimiter, lead_s: float
    ) -> None:
        self.contract = contract
        self._order = CommandOrder(contract)
        arm = self._order.arm
        self._bounds = Bounds(limiter.lower[arm], limiter.upper[arm], limiter.acceleration[arm])
        self._lead_s = lead_s
        self._forward = contract.controller.kind == 'forward_command'
        if not self._forward and lead_s < 1.0 / contract.controller.rate_hz:
            raise ValueError(
                f'trajectory.lead_s is {lead_s}; expected at least one control period, '
                f'{1.0 / contract.controller.rate_hz:g} s'
            )
        kind = Float64MultiArray if self._forward else JointTrajectory
        self._node = node
        self._switch = GripperSwitch(contract.gripper)
        self._action = self._gripper = None
        if contract.gripper.kind == 'action':
            self._action = GripperAction(node, contract.gripper)
        self.publisher = node.create_publisher(kind, contract.controller.topic, COMMAND)
        if contract.gripper.kind == 'topic':
            topic = contract.gripper.topic
            self._gripper = node.create_publisher(Float64MultiArray, topic, COMMAND)

    def publish(self, positions: np.ndarray, velocities: np.ndarray) -> None:
        """Publish one setpoint, (joints,) in the order of action.joints."""
        arm = positions[self._order.arm]
        if self._forward:
            self.publisher.publish(make_forward(arm))
        else:
            points = braking_trajectory(
                arm, velocities[self._order.arm], self._bounds, self._lead_s
            )
            self.publisher.publish(make_trajectory(self.contract.controller.joints, points))
        if self._order.gripper is None:
            return
        position = positions[self._order.gripper]
        if self._gripper is not None:
            self._gripper.publish(make_forward(np.array([position])))
        goal = self._switch.update(float(position))
        if goal is not None and self._action is not None:
            self._action.send(goal)

    def clear(self) -> None:
        """Forget the gripper's last goal."""
        self._switch.clear()

    def listeners(self) -> int:
        """How many controllers hear the command topic."""
        return int(self.publisher.get_subscription_count())

    def rivals(self) -> int:
        """How many others publish on the command topic."""
        return max(0, int(self._node.count_publishers(self.contract.controller.topic)) - 1)

    def destroy(self) -> None:
        """Give publishers and client back."""
        self._node.destroy_publisher(self.publisher)
        if self._gripper is not None:
            self._node.destroy_publisher(self._gripper)
        if self._action is not None:
            self._action.destroy()
