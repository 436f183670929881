# SPDX-License-Identifier: Apache-2.0
"""The other side of `quantvla bench ros`, as processes of their own: cameras, joints, listeners.

Run as `python -m quantvla_ros.bench.ros_robot cameras|listen|robot SECONDS`; prints one JSON line.
"""

from __future__ import annotations

import array
import json
import sys
import time
from typing import Any

import numpy as np
import rclpy
from rclpy.executors import ExternalShutdownException
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String

from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.nodes.names import COMMAND, LATCHED, ROBOT_DESCRIPTION, SENSOR

WIDTH, HEIGHT, RATE_HZ = 640, 480, 30.0
TOPICS = ('bench/left', 'bench/right')
QUEUE = QoSProfile(depth=5, reliability=SENSOR.reliability)


def picture(stamp_ns: int, pixels: array.array) -> Image:
    """Return a raw colour picture of the bench's size."""
    message = Image(height=HEIGHT, width=WIDTH, encoding='rgb8', step=3 * WIDTH, data=pixels)
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 1_000_000_000)
    return message


def noise() -> array.array:
    """Return the bytes of a picture."""
    data = array.array('B')
    data.frombytes(np.random.default_rng(0).bytes(WIDTH * HEIGHT * 3))
    return data


def pace(period_s: float, seconds: float) -> Any:
    """Yield at a fixed rate on the steady clock."""
    start = time.monotonic()
    for number in range(round(seconds / period_s)):
        due = start + number * period_s
        time.sleep(max(0.0, due - time.monotonic()))
        yield number


def cameras(seconds: float) -> dict[str, Any]:
    """Publish two cameras once somebody listens, and tell how many pictures left."""
    node = rclpy.create_node('bench_cameras')
    publishers = [node.create_publisher(Image, topic, QUEUE) for topic in TOPICS]
    while any(p.get_subscription_count() < 1 for p in publishers):
        time.sleep(0.05)
    time.sleep(1.0)
    pixels, sent, cpu = noise(), 0, time.process_time()
    for _ in pace(1.0 / RATE_HZ, seconds):
        for publisher in publishers:
            publisher.publish(picture(time.time_ns(), pixels))
            sent += 1
    cpu = time.process_time() - cpu
    time.sleep(1.0)
    return {'sent': sent, 'cpu': cpu / seconds}


def listen(seconds: float) -> dict[str, Any]:
    """Receive two cameras and tell how many pictures came and how late."""
    node = rclpy.create_node('bench_listener')
    late: list[float] = []

    def take(message: Image) -> None:
        stamp = message.header.stamp
        np.frombuffer(message.data, np.uint8)
        late.append((time.time_ns() - stamp.sec * 1_000_000_000 - stamp.nanosec) / 1e6)

    for topic in TOPICS:
        node.create_subscription(Image, topic, take, QUEUE)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.1)
    return {'received': len(late), 'late_ms': late}


class Robot(Node):
    """Two cameras, joint states and a perfect arm that is where it was told to be."""

    def __init__(self, contract: Contract) -> None:
        super().__init__('bench_robot')
        self._contract = contract
        self._order = [contract.joints.names.index(n) for n in contract.controller.joints]
        self._positions = np.zeros(len(contract.joints.names))
        self.commands: list[tuple[int, float]] = []  # (steady ns, first joint)
        self._pixels = noise()
        self._description = self.create_publisher(String, ROBOT_DESCRIPTION, LATCHED)
        self._description.publish(String(data=urdf(contract)))
        self._joints = self.create_publisher(JointState, contract.joints.topic, COMMAND)
        self._cameras = [self.create_publisher(Image, c.topic, SENSOR) for c in contract.cameras]
        self.create_subscription(
            Float64MultiArray, contract.controller.topic, self._on_command, COMMAND)
        self.create_timer(0.01, self._send_joints)
        self.create_timer(1.0 / RATE_HZ, self._send_pictures)

    def _on_command(self, message: Float64MultiArray) -> None:
        self.commands.append((time.monotonic_ns(), message.data[0]))
        self._positions[self._order] = message.data

    def _send_joints(self) -> None:
        message = JointState(name=list(self._contract.joints.names),
                             position=self._positions.tolist())
        message.header.stamp = self.get_clock().now().to_msg()
        self._joints.publish(message)

    def _send_pictures(self) -> None:
        for publisher in self._cameras:
            publisher.publish(picture(time.time_ns(), self._pixels))


def urdf(contract: Contract) -> str:
    """Return a robot description with the joints of a contract."""
    joints = ''.join(
        f'<joint name="{name}" type="revolute"><parent link="base"/><child link="{name}_link"/>'
        '<axis xyz="0 0 1"/><limit lower="-3" upper="3" velocity="2" effort="10"/></joint>'
        f'<link name="{name}_link"/>' for name in contract.joints.names)
    return f'<robot name="bench"><link name="base"/>{joints}</robot>'


def robot(seconds: float, contract: str) -> dict[str, Any]:
    """Be a robot for a while and tell when each command came."""
    node = Robot(load_contract(contract))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        rclpy.spin_once(node, timeout_sec=0.1)
    return {'commands': node.commands}


def main() -> int:
    """Serve the part named on the command line."""
    part, seconds, *rest = sys.argv[1:]
    parts: dict[str, Any] = {'cameras': cameras, 'listen': listen, 'robot': robot}
    rclpy.init(args=[])
    try:
        print(json.dumps(parts[part](float(seconds), *rest)))
    except (KeyboardInterrupt, ExternalShutdownException):
        return 1
    rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
