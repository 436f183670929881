# SPDX-License-Identifier: Apache-2.0
"""Subscriptions of a contract: every message goes to the builder and is told to Freshness.

Wires only. A callback checks and keeps; pictures are decoded where they are used. What cannot be
used is reported as broken, with its sentence, and never reaches the policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String

from quantvla_ros.action import NS_PER_S
from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.contract import Camera, Contract
from quantvla_ros.control.freshness import Freshness, frame_digest
from quantvla_ros.decode import DecodeError
from quantvla_ros.nodes.names import LATCHED, SENSOR

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

JOINTS = 'joint_states'


def camera_key(name: str) -> str:
    """The name of a camera among all inputs."""
    return f'camera {name}'


def vector_key(name: str) -> str:
    """The name of a vector among all inputs."""
    return f'vector {name}'


class RateMeter:
    """Messages per second over the last few, on the steady clock."""

    def __init__(self, window: int = 30) -> None:
        self._arrivals_ns: deque[int] = deque(maxlen=window)

    def note(self, steady_ns: int) -> None:
        """Note an arrival."""
        self._arrivals_ns.append(steady_ns)

    def rate_hz(self, steady_ns: int) -> float:
        """Return the rate; it falls towards 0 when nothing comes any more."""
        arrivals = list(self._arrivals_ns)
        if len(arrivals) < 2:
            return 0.0
        return (len(arrivals) - 1) * NS_PER_S / max(1, steady_ns - arrivals[0])


class Inputs:
    """All inputs of a contract on one node.

    listen takes waiting messages from within a transition; otherwise the executor calls the same
    callbacks. Both happen on the executor's thread.
    """

    def __init__(self, node: Node, contract: Contract, builder: ObservationBuilder) -> None:
        self._node = node
        self._contract = contract
        self._builder = builder
        self._freshness: Freshness | None = None
        self._subscriptions: list[Any] = []
        self.on_instruction: Callable[[str], None] = lambda text: None
        self.on_picture: Callable[[], None] = lambda: None
        self.rates: dict[str, RateMeter] = {}
        for camera in contract.cameras:
            self._subscribe_camera(camera)
        self._subscribe(JointState, contract.joints.topic, SENSOR, self._joints)
        self.rates[JOINTS] = RateMeter()
        for vector in contract.vectors:
            self.rates[vector_key(vector.name)] = RateMeter()
            self._subscribe(
                Float64MultiArray, vector.topic, SENSOR,
                lambda message, name=vector.name: self._vector(name, message),
            )
        # A latched publisher is heard late by the one, a plain `ros2 topic pub` by the other.
        # That the latched one does not hear a plain publisher is known, so no warning of it.
        quiet = SubscriptionEventCallbacks(use_default_callbacks=False)
        for qos, events in ((LATCHED, quiet), (QoSProfile(depth=1), None)):
            self._subscribe(String, contract.instruction_topic, qos, self._instruction, events)

    def watch(self, freshness: Freshness) -> None:
        """Tell this Freshness of every message from now on."""
        self._freshness = freshness

    def listen(self) -> None:
        """Take every message that waits."""
        for subscription in self._subscriptions:
            with subscription.handle:
                while True:
                    taken = subscription.handle.take_message(subscription.msg_type, False)
                    if taken is None:
                        break
                    subscription.callback(taken[0])

    def destroy(self) -> None:
        """Give every subscription back."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def _subscribe(
        self, kind: Any, topic: str, qos: QoSProfile, callback: Any, events: Any = None
    ) -> None:
        self._subscriptions.append(
            self._node.create_subscription(kind, topic, callback, qos, event_callbacks=events)
        )

    def _subscribe_camera(self, camera: Camera) -> None:
        self.rates[camera_key(camera.name)] = RateMeter()
        kind = CompressedImage if camera.type.endswith('CompressedImage') else Image
        self._subscribe(
            kind, camera.topic, SENSOR, lambda message: self._camera(camera.name, message)
        )

    def _camera(self, name: str, message: Any) -> None:
        self._note(
            camera_key(name),
            lambda: self._builder.put_camera(name, message),
            lambda: frame_digest(np.frombuffer(message.data, np.uint8)),
        )
        self.on_picture()

    def _joints(self, message: Any) -> None:
        self._note(JOINTS, lambda: self._builder.put_joints(message), lambda: None)

    def _vector(self, name: str, message: Any) -> None:
        now_ns = self._node.get_clock().now().nanoseconds
        self._note(
            vector_key(name),
            lambda: self._builder.put_vector(name, message, now_ns),
            lambda: None,
        )

    def _note(
        self, key: str, put: Callable[[], int], digest: Callable[[], int | None]
    ) -> None:
        self.rates[key].note(time.monotonic_ns())
        freshness = self._freshness
        try:
            stamp_ns = put()
        except DecodeError as error:
            if freshness is not None:
                freshness.broken(key, error.kind, error.what)
            return
        if freshness is not None:
            freshness.arrived(key, stamp_ns, digest())

    def _instruction(self, message: Any) -> None:
        if message.data != self._builder.instruction:
            self._builder.instruction = message.data
            self.on_instruction(message.data)
