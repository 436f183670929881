# SPDX-License-Identifier: Apache-2.0
"""A domain of its own for each run, and a policy node with a robot over real DDS."""

import os

os.environ['ROS_DOMAIN_ID'] = str(1 + os.getpid() % 100)
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'

import threading  # noqa: E402

import pytest  # noqa: E402

rclpy = pytest.importorskip('rclpy', reason='rclpy is not on this machine')

from fault_policies import SweepPolicy  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from robot import CONTRACT, PATIENCE_S, Robot, healthy  # noqa: E402

from quantvla_ros.nodes.policy_node import PolicyNode  # noqa: E402
from quantvla_ros.nodes.signals import StopRequest  # noqa: E402
from quantvla_ros.policies.base import POLICIES  # noqa: E402

POLICIES.setdefault('sweep', 'fault_policies:SweepPolicy')

# Wide enough for a machine that does much else; each test narrows what it claims.
CALM = {
    'guard.max_tick_gap_s': 2.0, 'guard.hold_s': 0.2, 'guard.start_ramp_s': 0.2,
    'guard.start_speed': 0.5, 'freshness.clock_jump_s': 0.5, 'freshness.wait_s': 20.0,
    'guard.estop_cooldown_s': 0.05, 'inference.timeout_s': 1.0, 'policy_process': False,
}


class Served:
    """A policy node in a thread of its own executor."""

    def __init__(self, contract_path, **values):
        overrides = {**CALM, 'contract': str(contract_path), **values}
        self.stop_request = StopRequest()
        self.node = PolicyNode(
            namespace='/robot', use_global_arguments=False, stop=self.stop_request,
            parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()],
        )
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self):
        while not self._end.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def do(self, work):
        """Run work on the executor's thread, as a service does, and return what it returns."""
        done, kept = threading.Event(), []

        def task():
            kept.append(work())
            done.set()

        self.executor.create_task(task)
        assert done.wait(PATIENCE_S), 'the executor is stuck'
        return kept[0]

    def up(self):
        """Configure and activate."""
        assert self.do(self.node.trigger_configure).name == 'SUCCESS'
        assert self.do(self.node.trigger_activate).name == 'SUCCESS'
        return self

    def close(self):
        SweepPolicy.released.set()
        self._end.set()
        self._thread.join(PATIENCE_S)
        self.node.tear_down()
        self.executor.remove_node(self.node)
        self.node.destroy_node()


@pytest.fixture(scope='session')
def graph():
    rclpy.init(args=[])
    yield
    rclpy.try_shutdown()


def make_contract(folder, kind):
    path = folder / f'{kind}.yaml'
    path.write_text(CONTRACT.replace('KIND', kind))
    return path


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
