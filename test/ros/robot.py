# SPDX-License-Identifier: Apache-2.0
"""A robot for tests, of two joints and one camera unless told: it does what commands say.

One thread publishes everything, so that a test can break any input at will; what comes in is kept
under one condition, so that a test waits for an event and never for a time.
"""

import array
import json
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import rclpy
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from quantvla_ros.nodes.names import LATCHED

PATIENCE_S = 40.0  # how long a busy machine may take; no claim rests on it
LIMITS = {'shoulder': (-1.0, 1.0, 2.0), 'elbow': (-1.0, 1.0, 2.0)}


def describe(limits):
    """The robot description of some joints."""
    return '<robot name="two"><link name="base"/>' + ''.join(
        f'<joint name="{name}" type="revolute"><parent link="base"/><child link="base"/>'
        f'<limit lower="{lower}" upper="{upper}" velocity="{velocity}" effort="1"/></joint>'
        for name, (lower, upper, velocity) in limits.items()
    ) + '</robot>'


URDF = describe(LIMITS)
CONTRACT = """
contract: 1
robot: two_joints
policy: sweep
instruction: {topic: instruction, default: sweep}
cameras:
  front: {topic: front/image, width: 8, height: 6, max_age_s: 0.9, max_silence_s: 0.6}
joints: {topic: joint_states, names: [shoulder, elbow], max_age_s: 0.9, max_silence_s: 0.6}
action: {kind: absolute, joints: [shoulder, elbow], horizon: 20, execute: 3, rate_hz: 10.0}
controller: {kind: KIND, topic: arm/commands, joints: [elbow, shoulder], rate_hz: 100.0}
"""


@dataclass(frozen=True)
class Body:
    """What a robot has: joints as it publishes and as it is commanded, cameras of one size."""

    measured: tuple[str, ...] = ('gripper', 'elbow', 'shoulder')
    commanded: tuple[str, ...] = ('elbow', 'shoulder')
    cameras: tuple[str, ...] = ('front',)
    size: tuple[int, int] = (8, 6)
    urdf: str = URDF


TWO = Body()


def healthy(body=TWO):
    """Every way a test can break the robot, switched off."""
    return SimpleNamespace(
        camera=True, frozen=False, size=body.size, encoding='rgb8', back_s=0.0,
        joints=True, names=body.measured, nan=False, stamp_s=0.0,
    )


SENTINELS = 5.0  # rad: commands above are marks of a test, which no arm follows


class Robot:
    """Publishes inputs in namespace /robot, follows commands, and keeps all that it hears."""

    def __init__(self, kind='forward_command', body=TWO):
        self.node = rclpy.create_node('robot', namespace='/robot', use_global_arguments=False)
        self.body = body
        self.faults = healthy(body)
        self.changed = threading.Condition()
        self.positions = dict.fromkeys(body.measured, 0.0)
        self.commands, self.statuses, self.active, self.chunks = [], [], [], []
        self.diagnostics = []
        self._count = 0
        node = self.node
        self._images = [node.create_publisher(Image, f'{camera}/image', 5)
                        for camera in body.cameras]
        self._states = node.create_publisher(JointState, 'joint_states', 5)
        self._description = node.create_publisher(String, 'robot_description', LATCHED)
        self.instruction = node.create_publisher(String, 'instruction', LATCHED)
        self.kind = Float64MultiArray if kind == 'forward_command' else JointTrajectory
        self.controller = None
        self.connect_controller()
        node.create_subscription(
            String, 'policy_node/status', lambda m: self._keep(self.statuses, json.loads(m.data)),
            LATCHED)
        node.create_subscription(
            Bool, 'policy_node/is_active', lambda m: self._keep(self.active, m.data), LATCHED)
        node.create_subscription(
            JointTrajectory, 'policy_node/chunk', lambda m: self._keep(self.chunks, m), 5)
        self.clients = {
            name: node.create_client(kind, f'policy_node/{name}')
            for name, kind in (('enable', SetBool), ('estop', Trigger), ('reset', Trigger))
        }
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._spin, daemon=True),
                         threading.Thread(target=self._publish, daemon=True)]

    def start(self):
        self.describe()
        for thread in self._threads:
            thread.start()
        return self

    def stop(self):
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        self._executor.remove_node(self.node)
        self.node.destroy_node()

    def describe(self, text=''):
        self._description.publish(String(data=text or self.body.urdf))

    def connect_controller(self):
        self.controller = self.node.create_subscription(
            self.kind, 'arm/commands', self._command, 50)

    def disconnect_controller(self):
        subscription, self.controller = self.controller, None
        self.node.destroy_subscription(subscription)

    @property
    def status(self):
        """The newest ~/status; every key is None before the first."""
        return self.statuses[-1] if self.statuses else defaultdict(lambda: None)

    def swap(self, key):
        """Return what ~/status says of swaps; None until a policy is loaded."""
        return (self.status['swap'] or {}).get(key)

    def wait(self, ready, what=''):
        """Wait until something that was heard makes ready() true."""
        with self.changed:
            done = self.changed.wait_for(ready, PATIENCE_S)
        assert done, f'never: {what}; last status {dict(self.status)}'

    def call(self, name, on=True):
        """Call a service and return its answer."""
        client = self.clients[name]
        assert client.wait_for_service(PATIENCE_S)
        request = SetBool.Request(data=on) if name == 'enable' else Trigger.Request()
        future = client.call_async(request)
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_S), f'no answer from {name}'
        return future.result()

    def set_parameters(self, **values):
        """Set parameters of the policy node as a whole; '__' in a name stands for a dot."""
        client = self.node.create_client(
            SetParametersAtomically, 'policy_node/set_parameters_atomically')
        assert client.wait_for_service(PATIENCE_S)
        request = SetParametersAtomically.Request(parameters=[
            Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
            for name, value in values.items()])
        future, done = client.call_async(request), threading.Event()
        future.add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_S), 'no answer to a set of parameters'
        self.node.destroy_client(client)
        return future.result().result

    def _keep(self, where, what):
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def _command(self, message):
        if isinstance(message, Float64MultiArray):
            if max(map(abs, message.data)) < SENTINELS:
                self.positions.update(zip(self.body.commanded, message.data, strict=True))
        else:
            self.positions.update(
                zip(message.joint_names, message.points[0].positions, strict=True))
        self._keep(self.commands, message)

    def _spin(self):
        while not self._end.is_set():
            self._executor.spin_once(timeout_sec=0.05)

    def _publish(self):
        while not self._end.wait(0.02):
            self._count += 1
            if self.faults.joints:
                self._states.publish(self._joint_state())
            if self.faults.camera and self._count % 3 == 0:
                for publisher in self._images:
                    publisher.publish(self._picture())

    def _stamp(self, message, shift_s=0.0):
        nanoseconds = time.time_ns() + round(shift_s * 1e9)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(nanoseconds, 10**9)
        return message

    def _joint_state(self):
        message = JointState(name=list(self.faults.names))
        known = list(self.positions.values())
        values = [self.positions.get(name, known[i]) for i, name in enumerate(self.faults.names)]
        if self.faults.nan:
            values = [float('nan')] * len(values)
        message.position = values
        return self._stamp(message, self.faults.stamp_s)

    def _picture(self):
        faults = self.faults
        width, height = faults.size
        value = 7 if faults.frozen else self._count % 251
        message = Image(width=width, height=height, encoding=faults.encoding, step=3 * width)
        message.data = array.array('B', np.full(3 * width * height, value, np.uint8).tobytes())
        return self._stamp(message, faults.stamp_s - faults.back_s)
