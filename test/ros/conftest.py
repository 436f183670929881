# SPDX-License-Identifier: Apache-2.0
"""A domain of its own for each run, and a policy node with a robot over real DDS."""

import os

os.environ['ROS_DOMAIN_ID'] = str(1 + os.getpid() % 100)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'

import pytest  # noqa: E402

rclpy = pytest.importorskip('rclpy', reason='rclpy is not on this machine')

from fault_policies import SweepPolicy  # noqa: E402
from robot import Robot, healthy  # noqa: E402
from served import Served, make_contract  # noqa: E402

from quantvla_ros.policies.base import POLICIES  # noqa: E402

POLICIES.setdefault('sweep', 'fault_policies:SweepPolicy')

@pytest.fixture(scope='session')
def graph():
    rclpy.init(args=[])
    yield
    rclpy.try_shutdown()


@pytest.fixture
def contract_path(tmp_path, controller_kind):
    return make_contract(tmp_path, controller_kind)


@pytest.fixture
def controller_kind():
    return 'forward_command'


@pytest.fixture
def robot(graph, controller_kind):
    SweepPolicy.mode = 'good'
    SweepPolicy.released.clear()
    made = Robot(controller_kind).start()
    yield made
    made.stop()


@pytest.fixture
def serve(robot, contract_path):
    """Make a policy node for the robot; everything made is closed."""
    made = []

    def make(**values):
        made.append(Served(contract_path, **values))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture(scope='module')
def shared(graph, tmp_path_factory):
    """One robot and one node, up, for the many tests that break something and mend it."""
    SweepPolicy.mode = 'good'
    SweepPolicy.released.clear()
    robot = Robot().start()
    served = Served(make_contract(tmp_path_factory.mktemp('c'), 'forward_command')).up()
    yield robot, served
    served.close()
    robot.stop()


@pytest.fixture
def moving(shared):
    """The shared robot, healthy and moving."""
    robot, served = shared
    robot.faults = healthy()
    SweepPolicy.mode = 'good'
    SweepPolicy.released.set()
    guard = served.node.serving.guard
    if guard.state.value != 'running':
        robot.wait(lambda: guard.at_rest and not served.node.serving.problems(), 'inputs fresh')
        answer = robot.call('enable')
        assert answer.success, answer.message
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks, 'a chunk')
    robot.wait(lambda: robot.status['state'] == 'running', 'running')
    return robot, served
