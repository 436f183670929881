# SPDX-License-Identifier: Apache-2.0
"""What the policy sees of live topics and of a bag of them is the same to the byte, over DDS."""

import array
import time

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip('rclpy', reason='rclpy is not on this machine')

from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy  # noqa: E402
from sensor_msgs.msg import CompressedImage, Image, JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray, String  # noqa: E402

from quantvla_ros.builder import ObservationBuilder  # noqa: E402
from quantvla_ros.calibration.bags import observations  # noqa: E402
from quantvla_ros.calibration.frames import frames_digest  # noqa: E402
from quantvla_ros.contract import load_contract  # noqa: E402
from quantvla_ros.nodes.inputs import Inputs  # noqa: E402
from quantvla_ros.nodes.record_node import RecordNode  # noqa: E402

pytestmark = pytest.mark.ros
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
SENSOR = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
MOMENTS = 24
CONTRACT = {
    'contract': 1, 'robot': 'r', 'policy': 'hold', 'instruction': {'default': 'stay'},
    'cameras': {
        'front': {'topic': 'front/image_raw', 'width': 64, 'height': 48, 'encoding': 'bgr8',
                  'max_age_s': 9.0, 'flip': 'both',
                  'policy': {'width': 32, 'height': 32, 'resize': 'pad'}},
        'wrist': {'topic': 'wrist/compressed', 'type': 'sensor_msgs/msg/CompressedImage',
                  'encoding': 'jpeg', 'width': 64, 'height': 48, 'max_age_s': 9.0,
                  'policy': {'width': 30, 'height': 20, 'resize': 'crop'}},
    },
    'joints': {'names': ['a', 'b'], 'topic': 'joint_states', 'units': ['deg', 'rad'],
               'max_age_s': 9.0},
    'vectors': {'force': {'topic': 'force', 'size': 3}},
    'action': {'kind': 'absolute', 'joints': ['b'], 'horizon': 4, 'rate_hz': 10.0},
    'controller': {'kind': 'forward_command', 'topic': 'c', 'joints': ['b']},
}


class Robot:
    """Sends everything of the contract, a different picture each time."""

    def __init__(self):
        self.node = rclpy.create_node('sender', namespace='/lab', use_global_arguments=False)
        make = self.node.create_publisher
        self.front = make(Image, 'front/image_raw', SENSOR)
        self.wrist = make(CompressedImage, 'wrist/compressed', SENSOR)
        self.joints = make(JointState, 'joint_states', 10)
        self.force = make(Float64MultiArray, 'force', 10)
        self.instruction = make(String, 'instruction', LATCHED)

    def stamped(self, message):
        message.header.stamp = self.node.get_clock().now().to_msg()
        return message

    def send_state(self, i):
        if i % 8 == 0:
            self.instruction.publish(String(data=f'put cup {i} away'))
        self.force.publish(Float64MultiArray(data=[0.1 * i, -1.0 / 3.0, float(i)]))
        self.joints.publish(self.stamped(JointState(
            name=['other', 'b', 'a'], position=[9.0, np.sin(0.1 * i), 10.0 * i])))

    def send_pictures(self, i):
        import cv2

        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8)
        raw = Image(width=64, height=48, encoding='bgr8', step=192)
        raw.data = array.array('B', pixels.tobytes())
        self.front.publish(self.stamped(raw))
        packed = CompressedImage(format='jpeg')
        packed.data = array.array('B', cv2.imencode('.jpg', pixels[:, ::-1])[1].tobytes())
        self.wrist.publish(self.stamped(packed))


def until(executor, condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'not reached'
        executor.spin_once(timeout_sec=0.02)


@pytest.fixture
def live_and_bag(graph, tmp_path):
    """Return the observations that the live path built, and the bag our recorder wrote."""
    path = tmp_path / 'contract.yaml'
    path.write_text(yaml.safe_dump(CONTRACT))
    contract = load_contract(path)
    robot = Robot()
    listener = rclpy.create_node('listener', namespace='/lab', use_global_arguments=False)
    builder = ObservationBuilder(contract)
    inputs = Inputs(listener, contract, builder)
    recorder = RecordNode(
        namespace='/lab', use_global_arguments=False,
        parameter_overrides=[Parameter('contract', value=str(path)),
                             Parameter('bag', value=str(tmp_path / 'bag')),
                             Parameter('min_free_mb', value=0)])
    nodes, executor = (robot.node, listener, recorder), SingleThreadedExecutor()
    for node in nodes:
        executor.add_node(node)
    try:
        recorder.trigger_configure()
        recorder.trigger_activate()
        publishers = (robot.front, robot.wrist, robot.joints, robot.force, robot.instruction)
        until(executor, lambda: all(p.get_subscription_count() >= 2 for p in publishers))
        seen = [look(i, robot, builder, recorder, executor) for i in range(MOMENTS)]
        recorder.stop_recording()
    finally:
        inputs.destroy()
        recorder.tear_down()
        for node in nodes:
            executor.remove_node(node)
            node.destroy_node()
    return contract, seen, tmp_path / 'bag'


def look(i, robot, builder, recorder, executor):
    """Send one of everything and return the observation once both sides have it."""
    def recorded():
        counts = recorder._recording.report.messages
        return sum(count for topic, count in counts.items() if topic.startswith('/lab/'))

    images, before = dict(builder._cameras), recorded()
    states, pictures = 3 if i % 8 == 0 else 2, 2
    robot.send_state(i)
    until(executor, lambda: recorded() >= before + states)
    until(executor, lambda: builder.joint_positions() is not None
          and builder.joint_positions()[0][1] == np.sin(0.1 * i)
          and builder.instruction == f'put cup {i - i % 8} away'
          and builder._vectors['force'][0][2] == float(i))
    robot.send_pictures(i)
    until(executor, lambda: recorded() >= before + states + pictures)
    until(executor, lambda: set(builder._cameras) == {'front', 'wrist'} and all(
        builder._cameras[name] is not images.get(name) for name in builder._cameras))
    return builder.build()


def test_observation_of_a_bag_is_the_live_one_to_the_byte(live_and_bag):
    contract, live, bag = live_and_bag
    recorded = list(observations(bag, contract))
    assert len(recorded) == len(live) == MOMENTS
    for one, other in zip(recorded, live, strict=True):
        assert one.image_stamps_ns == other.image_stamps_ns
        assert one.joint_stamp_ns == other.joint_stamp_ns
        assert one.instruction == other.instruction
        assert one.joint_positions.tobytes() == other.joint_positions.tobytes()
        assert one.vectors['force'].tobytes() == other.vectors['force'].tobytes()
        for name in contract.camera_names:
            assert one.images[name].dtype == other.images[name].dtype
            assert one.images[name].tobytes() == other.images[name].tobytes()
    assert frames_digest([recorded]) == frames_digest([live])
