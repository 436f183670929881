# SPDX-License-Identifier: Apache-2.0
"""The recorder as a process: real messages over DDS come back from the bag byte for byte."""

import io
import json
import os
import time

import pytest

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')
rosbag2 = pytest.importorskip('rosbags.rosbag2', reason='rosbags is not installed')

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from rclpy.serialization import serialize_message  # noqa: E402
from sensor_msgs.msg import Image, JointState  # noqa: E402
from std_msgs.msg import String  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from quantvla_ros.graph import graph_named  # noqa: E402
from quantvla_ros.processes import Supervisor  # noqa: E402

pytestmark = pytest.mark.ros
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
SENSOR = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


@pytest.fixture
def domain(monkeypatch):
    monkeypatch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    monkeypatch.setenv('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))


class Robot:
    """A node that publishes what the recorder should find, and listens to its status."""

    def __init__(self):
        self.context = rclpy.Context()
        self.context.init()
        self.node = rclpy.create_node('robot', context=self.context)
        self.image = self.node.create_publisher(Image, 'agentview/image_raw', SENSOR)
        self.joints = self.node.create_publisher(JointState, 'joint_states', 10)
        self.instruction = self.node.create_publisher(String, 'instruction', LATCHED)
        self.status = {}
        self.node.create_subscription(String, 'record_node/status', self.on_status, LATCHED)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def on_status(self, message):
        self.status = json.loads(message.data)

    def spin_until(self, condition, seconds=30.0):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.executor.spin_once(timeout_sec=0.02)
            if condition():
                return
        raise AssertionError(f'not reached; the last status was {self.status}')

    def call(self, kind, name, request):
        client = self.node.create_client(kind, f'record_node/{name}')
        self.spin_until(client.service_is_ready)
        future = client.call_async(request)
        self.spin_until(future.done)
        return future.result()

    def heard(self):
        return sum(p.get_subscription_count() > 0
                   for p in (self.image, self.joints, self.instruction)) == 3

    def close(self):
        self.node.destroy_node()
        self.context.shutdown()


@pytest.fixture
def robot(domain):
    robot = Robot()
    yield robot
    robot.close()


@pytest.fixture
def recorder(domain, robot, tmp_path):
    def start(**given):
        words = {'bag': str(tmp_path / 'bag'), 'recorder': 'record_node', 'dds': 'local',
                 'record_at_start': 'false', **given}
        for process in graph_named('record').processes(words):
            supervisor.start(process)
        robot.spin_until(lambda: robot.status)
        return supervisor

    log = io.StringIO()
    with Supervisor(log) as supervisor:
        yield start
    print(log.getvalue())


def image(i):
    message = Image(height=4, width=4, encoding='rgb8', step=12)
    message.header.stamp.nanosec = i
    message.data = bytes([i]) * 48
    return message


def test_bag_holds_the_bytes_that_were_published(robot, recorder, tmp_path):
    instruction = serialize_message(String(data='pick up the cup'))  # whole words of 4 bytes
    robot.instruction.publish(instruction)  # latched, before anything is recorded
    recorder()
    robot.spin_until(robot.heard)
    robot.spin_until(lambda: '/wrist/image_raw' in robot.status['without_publisher'])
    robot.spin_until(lambda: '/joint_states' not in robot.status['without_publisher'])
    robot.spin_until(lambda: robot.call(SetBool, 'record', SetBool.Request(data=True)).success)
    second = robot.call(Trigger, 'start', Trigger.Request())
    assert not second.success
    assert 'recording already' in second.message
    sent = {'/agentview/image_raw': [], '/joint_states': [], '/instruction': []}
    def send(topic, publisher, message):
        data = serialize_message(message)
        publisher.publish(data)  # as bytes: a second serialization may differ in its padding
        sent[topic].append(data)

    for i in range(20):
        send('/agentview/image_raw', robot.image, image(i))
        send('/joint_states', robot.joints, JointState(name=['a'], position=[float(i)]))
        time.sleep(0.005)  # a camera's pace: best effort keeps no more than its depth
    sent['/instruction'].append(instruction)
    robot.spin_until(lambda: robot.status['messages'] >= 41)
    reply = robot.call(Trigger, 'stop', Trigger.Request())
    assert reply.success, reply.message
    assert ' 0 dropped' in reply.message
    found = {topic: [] for topic in sent}
    with rosbag2.Reader(tmp_path / 'bag') as reader:
        for connection, _, data in reader.messages():
            found.setdefault(connection.topic, []).append(bytes(data))
    for topic, messages in sent.items():
        assert found[topic] == messages, topic


def test_interrupt_closes_the_bag(robot, recorder, tmp_path):
    supervisor = recorder(record_at_start='true')
    robot.spin_until(robot.heard)
    robot.spin_until(lambda: robot.status['recording'])
    robot.joints.publish(JointState(name=['a'], position=[1.0]))
    robot.spin_until(lambda: robot.status['messages'] > 0)
    supervisor.stop()
    assert supervisor.children[0].popen.returncode == 0
    with rosbag2.Reader(tmp_path / 'bag') as reader:
        assert '/joint_states' in {c.topic for c, _, _ in reader.messages()}


def test_folder_that_cannot_be_written_is_told(robot, recorder, tmp_path):
    (tmp_path / 'file').write_text('')
    recorder(bag=str(tmp_path / 'file' / 'bag'))
    reply = Trigger.Response()

    def refused():
        nonlocal reply
        reply = robot.call(Trigger, 'start', Trigger.Request())
        return 'cannot write' in reply.message

    robot.spin_until(refused)
    assert not reply.success
    assert not robot.call(Trigger, 'stop', Trigger.Request()).success
