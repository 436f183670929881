# SPDX-License-Identifier: Apache-2.0
"""What the controllers get, and controllers that are not the ones of the contract."""

import importlib.util

import pytest
import rclpy
from robot import CONTRACT
from served import Spun
from std_msgs.msg import Float64MultiArray

pytestmark = pytest.mark.ros


def times_ns(message):
    return [p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in message.points]


@pytest.mark.parametrize('controller_kind', ['joint_trajectory'])
def test_every_trajectory_is_one_that_a_released_controller_takes(robot, serve):
    served = serve().up()
    robot.wait(lambda: len(robot.chunks) >= 3, 'chunks')
    assert served.do(served.node.trigger_deactivate).name == 'SUCCESS'
    assert len(robot.commands) > 30
    for message in robot.commands:
        times = times_ns(message)
        assert message.joint_names == ['elbow', 'shoulder']
        assert times[0] == 20_000_000, 'never at time 0'
        assert all(a < b for a, b in zip(times, times[1:], strict=False))
        assert list(message.points[-1].velocities) == [0.0, 0.0]
        assert message.header.stamp.sec == 0, 'start when it arrives'
    assert max(len(message.points) for message in robot.commands) > 1, 'it moved'


@pytest.mark.parametrize('controller_kind', ['joint_trajectory'])
def test_lead_shorter_than_a_control_period_is_refused(robot, serve):
    served = serve(**{'trajectory.lead_s': 0.005})
    assert served.do(served.node.trigger_configure).name == 'FAILURE'


class Controller(Spun):
    """The parameters of a controller; rclpy serves them as ros2_control does."""

    def __init__(self, **values):
        node = rclpy.create_node('arm', namespace='/robot', use_global_arguments=False)
        for name, value in values.items():
            node.declare_parameter(name, value)
        super().__init__(node)

    def close(self):
        self.end()
        self.executor.remove_node(self.node)
        self.node.destroy_node()


@pytest.fixture
def controller(robot):
    made = []

    def make(**values):
        made.append(Controller(**values))
        return made[-1]

    yield make
    for item in made:
        item.close()


@pytest.fixture
def said(monkeypatch):
    from quantvla_ros.nodes.lifecycle import ManagedNode

    heard = []
    monkeypatch.setattr(ManagedNode, '_say_once', lambda self, text: heard.append(text))
    return heard


def configured(robot, serve):
    """A configured node that sees the controller's parameter service."""
    served = serve()
    client_side = served.node
    while not any('get_parameters' in name and '/robot/arm/' in name
                  for name, _ in client_side.get_service_names_and_types()):
        pass
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    return served


def test_forward_controller_of_another_joint_order_is_refused(robot, serve, controller, said):
    controller(joints=['shoulder', 'elbow'])
    served = configured(robot, serve)
    assert served.do(served.node.trigger_activate).name == 'FAILURE'
    assert 'moves shoulder, elbow' in said[-1]
    assert 'their order counts' in said[-1]


def test_forward_controller_of_the_contract_is_taken(robot, serve, controller):
    controller(joints=['elbow', 'shoulder'])
    served = configured(robot, serve)
    assert served.do(served.node.trigger_activate).name == 'SUCCESS'


@pytest.mark.parametrize('controller_kind', ['joint_trajectory'])
def test_trajectory_controller_that_restarts_from_the_measured_pose_is_told(
    robot, serve, controller, capfd
):
    controller(joints=['shoulder', 'elbow'], interpolate_from_desired_state=False)
    served = configured(robot, serve)
    assert served.do(served.node.trigger_activate).name == 'SUCCESS'
    assert 'interpolate_from_desired_state' in capfd.readouterr().err


GRIPPER = """
gripper: {kind: KIND, joint: elbow, topic: gripper/commands, open_position: 0.2,
          closed_position: -0.2}
"""


def gripper_contract(tmp_path, kind):
    path = tmp_path / 'gripper.yaml'
    text = CONTRACT.replace('KIND', 'forward_command').replace(
        'joints: [elbow, shoulder]', 'joints: [shoulder]')
    path.write_text(text + GRIPPER.replace('KIND', kind))
    return path


def test_gripper_on_a_topic_of_its_own_gets_its_joint(robot, serve, tmp_path):
    heard = []
    robot.node.create_subscription(
        Float64MultiArray, 'gripper/commands', lambda m: robot._keep(heard, m), 50)
    robot.disconnect_controller()
    arm = []
    robot.node.create_subscription(
        Float64MultiArray, 'arm/commands', lambda m: robot._keep(arm, m), 50)
    serve(contract=str(gripper_contract(tmp_path, 'topic'))).up()
    robot.wait(lambda: len(heard) > 10 and len(arm) > 10, 'both')
    assert {len(m.data) for m in heard} == {1}
    assert {len(m.data) for m in arm} == {1}


@pytest.mark.skipif(
    importlib.util.find_spec('control_msgs') is not None,
    reason='this machine has control_msgs, so nothing is missing',
)
def test_gripper_action_without_control_msgs_is_refused_with_what_to_install(
    robot, serve, said, tmp_path
):
    served = serve(contract=str(gripper_contract(tmp_path, 'action')))
    assert served.do(served.node.trigger_configure).name == 'FAILURE'
    assert 'needs control_msgs; install' in said[-1]
    assert robot.node.count_publishers('/robot/arm/commands') == 0, 'nothing is left behind'
