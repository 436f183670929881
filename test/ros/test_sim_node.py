# SPDX-License-Identifier: Apache-2.0
"""The simulated robot on real ROS 2 topics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger

import quantvla_ros
from quantvla_ros.contract import load_contract
from quantvla_ros.control.urdf import read_urdf_limits
from quantvla_ros.decode import decode_camera
from quantvla_ros.nodes.names import LATCHED
from quantvla_ros.sim.sim_node import STATE_SIZE, SimNode

pytestmark = [pytest.mark.ros, pytest.mark.sim]
DOMAIN = 1 + os.getpid() % 100
PATIENCE_S = 60.0
SCENE = {'suite': 'libero_10', 'task': 2}
CONTRACT = load_contract('libero_panda')
HELD = [0.0, -0.16, 0.0, -2.44, 0.0, 2.23, 0.785, 0.04]


class Client:
    """A node that keeps the last message of each topic and counts them."""

    def __init__(self, context, executor=None):
        self.node = rclpy.create_node('client', context=context, use_global_arguments=False)
        self.executor = executor or SingleThreadedExecutor(context=context)
        self.executor.add_node(self.node)
        self.last, self.counts = {}, {}

    def hear(self, kind, topic, qos=qos_profile_sensor_data):
        def keep(message):
            self.last[topic] = message
            self.counts[topic] = self.counts.get(topic, 0) + 1

        return self.node.create_subscription(kind, topic, keep, qos)

    def until(self, done):
        limit = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < limit, f'nothing came; heard {self.counts}'
            self.executor.spin_once(timeout_sec=0.1)

    def wait_for(self, topic, count=1):
        self.until(lambda: self.counts.get(topic, 0) >= count)
        return self.last[topic]

    def call(self, service):
        client = self.node.create_client(Trigger, service)
        self.until(client.service_is_ready)
        future = client.call_async(Trigger.Request())
        self.until(future.done)
        return future.result()


@pytest.fixture(scope='module')
def context():
    os.environ.setdefault('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
    made = rclpy.Context()
    rclpy.init(context=made, domain_id=DOMAIN)
    yield made
    rclpy.try_shutdown(context=made)


@pytest.fixture(scope='module')
def lockstep(context):
    """The node in lockstep and a client, in one executor: nothing depends on time."""
    overrides = [Parameter(name, value=value) for name, value in {
        **SCENE, 'mode': 'lockstep'}.items()]
    node = SimNode(context=context, parameter_overrides=overrides)
    client = Client(context)
    client.executor.add_node(node)
    for kind, topic in ((JointState, 'joint_states'), (Clock, '/clock'),
                        (Image, 'agentview/image_raw'),
                        (CompressedImage, 'wrist/image_raw/compressed'),
                        (Float64MultiArray, 'sim_node/state')):
        client.hear(kind, topic)
    for topic in ('robot_description', 'instruction', 'sim_node/episode'):
        client.hear(String, topic, LATCHED)
    client.commands = client.node.create_publisher(
        Float64MultiArray, CONTRACT.controller.topic, 10)
    node.start()
    client.sim = node
    client.until(lambda: client.commands.get_subscription_count() == 1)
    yield client
    node.stop()
    node.destroy_node()
    client.node.destroy_node()


def send(client, command):
    """Send one command and wait until it has moved time on."""
    periods = client.sim._periods
    client.commands.publish(Float64MultiArray(data=[float(v) for v in command]))
    client.until(lambda: client.sim._periods > periods)


def reset(client):
    answer = client.call('sim_node/reset')
    assert answer.success, answer.message
    return json.loads(answer.message)


def test_the_description_gives_the_limits_of_every_commanded_joint(lockstep):
    limits = read_urdf_limits(lockstep.wait_for('robot_description').data)
    assert set(CONTRACT.controller.joints) <= set(limits)


def test_the_instruction_of_the_task_is_latched(lockstep):
    assert lockstep.wait_for('instruction').data == (
        'turn on the stove and put the moka pot on it')


def test_in_lockstep_time_stands_still_and_moves_one_period_for_each_command(lockstep):
    reset(lockstep)
    before = lockstep.sim.now_ns()
    lockstep.wait_for('joint_states', lockstep.counts.get('joint_states', 0) + 3)
    assert lockstep.sim.now_ns() == before
    for _ in range(3):
        send(lockstep, HELD)
    assert lockstep.sim.now_ns() == before + 30_000_000
    lockstep.until(lambda: lockstep.last['/clock'].clock.nanosec == (before + 30_000_000) % 10**9)


def test_in_lockstep_the_same_commands_give_the_same_state_to_the_last_bit(lockstep):
    states = []
    for _ in range(2):
        reset(lockstep)
        for step in range(20):
            send(lockstep, [*(np.array(HELD[:7]) + 0.003 * step), 0.0])
        states.append(lockstep.sim.robot.snapshot(0).qpos)
    np.testing.assert_array_equal(*states)


def test_the_step_service_moves_time_without_a_command(lockstep):
    before = lockstep.sim.now_ns()
    assert lockstep.call('sim_node/step').success
    assert lockstep.sim.now_ns() == before + 10_000_000


def test_pictures_decode_by_the_contract(lockstep):
    message = lockstep.wait_for('agentview/image_raw')
    picture = decode_camera(message, CONTRACT.camera('agentview'))
    assert picture.shape == (128, 128, 3) and picture.std() > 20
    assert message.header.frame_id == 'agentview_optical_frame'


def test_a_compressed_picture_is_sent_beside_the_raw_one(lockstep):
    message = lockstep.wait_for('wrist/image_raw/compressed')
    assert bytes(message.data[:2]) == b'\xff\xd8' and 'jpeg' in message.format


def test_pictures_come_at_their_rate_in_simulated_time(lockstep):
    reset(lockstep)
    stamps = set()
    for _ in range(21):
        send(lockstep, HELD)
        stamps.add(lockstep.sim._last_camera_ns)
    assert len(stamps) in (5, 6)  # 20 Hz over 210 ms, the first one at the start


def test_state_carries_the_whole_qpos_in_ros_messages(lockstep):
    seen = lockstep.counts.get('sim_node/state', 0)
    for _ in range(10):
        send(lockstep, HELD)
    message = lockstep.wait_for('sim_node/state', seen + 1)
    used = lockstep.sim.robot.world.model.nq
    assert len(message.data) == STATE_SIZE > used
    assert any(message.data[:used]) and not any(message.data[used:])


def test_a_nan_on_the_wire_is_counted_in_the_episode(lockstep):
    reset(lockstep)
    send(lockstep, [float('nan'), *HELD[1:]])
    answer = lockstep.call('sim_node/success')
    assert not answer.success
    assert json.loads(answer.message)['violations'] == 1


def test_a_command_of_the_wrong_width_deactivates_the_controller_until_reset(lockstep):
    reset(lockstep)
    send(lockstep, HELD[:3])
    send(lockstep, HELD)
    assert json.loads(lockstep.call('sim_node/success').message)['refused_commands'] == 2
    assert reset(lockstep)['refused_commands'] == 0


def test_a_reset_starts_what_the_parameters_say_and_refuses_what_there_is_not(lockstep):
    sim = lockstep.sim
    assert not sim.set_parameters([Parameter('suite', value='libero_gaol')])[0].successful
    assert sim.set_parameters([Parameter('task', value=50)])[0].successful
    refused = lockstep.call('sim_node/reset')
    assert not refused.success and '0 to 9' in refused.message
    assert json.loads(lockstep.call('sim_node/success').message)['task'] == SCENE['task']
    for name, value in (('task', SCENE['task']), ('init', 7)):
        assert sim.set_parameters([Parameter(name, value=value)])[0].successful
    report = reset(lockstep)
    assert (report['init'], report['step'], report['success']) == (7, 0, False)
    lockstep.until(lambda: json.loads(lockstep.last['sim_node/episode'].data)['init'] == 7)


@pytest.fixture(scope='module')
def realtime():
    """The node as a process of its own, as a launch file starts it."""
    domain = 1 + (DOMAIN + 50) % 100
    arguments = [word for name, value in SCENE.items() for word in ('-p', f'{name}:={value}')]
    process = subprocess.Popen(
        [sys.executable, '-m', 'quantvla_ros.sim.sim_node', '--ros-args', *arguments],
        env={**os.environ, 'ROS_DOMAIN_ID': str(domain),
             'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST',
             'PYTHONPATH': str(Path(quantvla_ros.__file__).parents[1])},
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    client = Client(context)
    client.process = process
    yield client
    if process.poll() is None:
        process.kill()
    process.communicate()
    client.node.destroy_node()
    rclpy.try_shutdown(context=context)


def test_in_real_time_joint_states_pictures_and_the_pace_are_published(realtime):
    realtime.hear(JointState, 'joint_states')
    realtime.hear(Image, 'wrist/image_raw')
    realtime.hear(String, 'sim_node/episode', LATCHED)
    message = realtime.wait_for('joint_states', 100)
    assert set(CONTRACT.joints.names) == set(message.name)
    realtime.wait_for('wrist/image_raw', 3)
    realtime.until(lambda: json.loads(
        realtime.wait_for('sim_node/episode').data)['real_time_factor'] is not None)


def test_ctrl_c_twice_ends_it_cleanly(realtime):
    realtime.wait_for('joint_states')
    realtime.process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # the second one of a double Ctrl-C, not something to wait for
    realtime.process.send_signal(signal.SIGINT)
    _, errors = realtime.process.communicate(timeout=PATIENCE_S)
    assert realtime.process.returncode == 0, errors
    assert 'Traceback' not in errors
