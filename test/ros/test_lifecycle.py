# SPDX-License-Identifier: Apache-2.0
"""Transitions over real DDS: what each refuses, with which sentence, and what it leaves behind."""

import json
import threading
import time

import numpy as np
import pytest
from fault_policies import SweepPolicy
from robot import PATIENCE_S, URDF
from served import Served
from std_msgs.msg import Float64MultiArray, String

from quantvla_ros.policies.base import POLICIES

pytestmark = pytest.mark.ros


@pytest.fixture
def said(monkeypatch):
    """Every sentence of a refused transition."""
    from quantvla_ros.nodes.lifecycle import ManagedNode

    heard = []
    monkeypatch.setattr(ManagedNode, '_say_once', lambda self, text: heard.append(text))
    return heard


def refused(served, transition):
    return served.do(getattr(served.node, f'trigger_{transition}')).name


def test_node_goes_up_and_down_again_and_leaves_no_thread(robot, serve):
    served = serve()
    before = threading.active_count()
    for _ in range(3):
        served.up()
        chunks = len(robot.chunks)
        robot.wait(lambda n=chunks: len(robot.chunks) > n, 'a chunk')
        assert served.do(served.node.trigger_deactivate).name == 'SUCCESS'
        assert served.do(served.node.trigger_cleanup).name == 'SUCCESS'
        assert served.node.state_label == 'unconfigured'
        assert threading.active_count() == before
        assert robot.node.count_publishers('/robot/arm/commands') == 0


def test_destroyed_node_leaves_no_service_that_nobody_serves(robot, contract_path):
    served = Served(contract_path)
    ours = '/robot/policy_node/change_state'

    def names():
        return [name for name, _ in robot.node.get_service_names_and_types()]

    while ours not in names():
        pass
    served.close()
    deadline = time.monotonic() + PATIENCE_S
    while ours in names():
        assert time.monotonic() < deadline, 'the service is still on the graph'


def test_configure_without_robot_description_names_its_topic(robot, serve, said):
    served = serve(**{'limits.description_timeout_s': 0.2})
    served.node._on_description(String(data=''))
    served.node.destroy_subscription(served.node._listener)
    served.node._listener = served.node.create_subscription(
        String, 'nobody', served.node._on_description, 1)
    assert refused(served, 'configure') == 'FAILURE'
    assert 'no robot description on' in said[-1]
    assert served.node.state_label == 'unconfigured'


@pytest.mark.parametrize(('urdf', 'sentence'), [
    (URDF.replace('velocity="2.0"', '', 1), "joint 'shoulder' has no velocity limit"),
    (URDF.replace('name="elbow"', 'name="wrist"'), "joint 'elbow' is not in the robot descript"),
    ('<robot', 'not XML'),
])
def test_configure_refuses_a_robot_without_limits(robot, serve, said, urdf, sentence):
    robot.describe(urdf)
    served = serve()
    assert refused(served, 'configure') == 'FAILURE'
    assert sentence in said[-1]


def test_unlimited_joints_can_be_allowed_by_name(robot, serve):
    robot.describe(URDF.replace('velocity="2.0"', '', 1))
    served = serve(**{'limits.allow_unlimited': True})
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'


@pytest.mark.parametrize(('values', 'sentence'), [
    ({'policy': 'nobody'}, "policy 'nobody' is unknown; known are"),
    ({'contract': '/nowhere/at/all.yaml'}, 'all.yaml'),
    ({'player.blend_s': 1.0}, 'expected 0 < blend_s <= max_blend_s'),
])
def test_configure_refuses_what_the_user_can_mend(robot, serve, said, values, sentence):
    served = serve(**values)
    assert refused(served, 'configure') == 'FAILURE'
    assert sentence in said[-1]
    assert served.node.serving is None


def test_bug_in_a_policy_is_an_error_with_its_traceback(robot, serve, monkeypatch, capfd):
    class Broken(SweepPolicy):
        def __init__(self, contract, settings):
            raise KeyError('layer 7')

    monkeypatch.setattr('fault_policies.Broken', Broken, raising=False)
    monkeypatch.setitem(POLICIES, 'sweep', 'fault_policies:Broken')
    served = serve()
    assert refused(served, 'configure') == 'ERROR'
    assert served.node.state_label == 'unconfigured'
    err = capfd.readouterr().err
    assert 'Traceback' in err
    assert "KeyError: 'layer 7'" in err


def test_activate_names_every_input_that_is_missing(robot, serve, said):
    robot.faults.camera = robot.faults.joints = False
    served = serve(**{'freshness.wait_s': 0.3})
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    served.node.serving.builder.clear()
    assert refused(served, 'activate') == 'FAILURE'
    assert "nothing from camera 'front' on 'front/image'" in said[-1]
    assert "nothing from joint states on 'joint_states'" in said[-1]
    assert served.node.state_label == 'inactive'
    robot.faults.camera = robot.faults.joints = True
    assert served.do(served.node.trigger_activate).name == 'SUCCESS'


def test_activate_without_controller_is_refused_with_the_topic(robot, serve, said):
    robot.disconnect_controller()
    served = serve(**{'freshness.wait_s': 1.0})
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    assert refused(served, 'activate') == 'FAILURE'
    assert any("no controller subscribes to '/robot/arm/commands'" in text for text in said) or (
        'inputs are not fresh' in said[-1])
    assert served.node.state_label == 'inactive'


def test_first_command_is_the_measured_pose(robot, serve):
    robot.positions.update(shoulder=0.4, elbow=-0.3)
    serve().up()
    robot.wait(lambda: len(robot.commands) > 0, 'a command')
    np.testing.assert_allclose(robot.commands[0].data, [-0.3, 0.4], atol=1e-6)


def test_nothing_moves_before_enable_when_told_so(robot, serve):
    served = serve(enable_on_activate=False).up()
    control = served.node.serving.control
    robot.wait(lambda: control.ticks > 30, 'ticks')
    served.node.serving.commands.publisher.publish(Float64MultiArray(data=[9.0, 9.0]))
    robot.wait(lambda: len(robot.commands) > 0, 'the sentinel')
    assert list(robot.commands[0].data) == [9.0, 9.0], 'nothing came before the sentinel'
    robot.positions.update(shoulder=0.0, elbow=0.0)
    robot.wait(lambda: not served.node.serving.problems(), 'fresh inputs')
    assert robot.call('enable').success
    robot.wait(lambda: len(robot.commands) > 1, 'a command')


def test_dry_run_does_everything_but_command(robot, serve):
    served = serve(dry_run=True).up()
    control = served.node.serving.control
    robot.wait(lambda: len(robot.chunks) >= 4, 'chunks')
    assert control.ticks > 30
    assert served.node.serving.guard.state.value == 'running'
    served.node.serving.commands.publisher.publish(Float64MultiArray(data=[9.0, 9.0]))
    robot.wait(lambda: len(robot.commands) > 0, 'the sentinel')
    assert list(robot.commands[0].data) == [9.0, 9.0], 'nothing came before the sentinel'
    assert robot.active[-1] is False
    assert robot.status['dry_run'] is True


def test_deactivate_brings_the_arm_to_rest_and_then_is_silent(robot, serve):
    served = serve().up()
    robot.wait(lambda: len(robot.chunks) >= 2, 'chunks')
    assert served.do(served.node.trigger_deactivate).name == 'SUCCESS'
    sentinel = [9.0, 9.0]
    served.node.serving.commands.publisher.publish(Float64MultiArray(data=sentinel))
    robot.wait(lambda: list(robot.commands[-1].data) == sentinel, 'the sentinel')
    found = np.array([list(m.data) for m in robot.commands[:-1]])
    assert np.abs(np.diff(found[-2:], axis=0)).max() < 1e-3, 'slow at the end'
    robot.wait(lambda: robot.status['lifecycle'] == 'inactive', 'inactive')
    assert robot.status['cause']['kind'] == 'deactivated'


def test_autostart_waits_for_a_robot_that_comes_late(robot, serve):
    robot.faults.camera = False
    serve(autostart=True, **{'freshness.wait_s': 0.2})
    robot.wait(lambda: any(s['lifecycle'] == 'inactive' for s in robot.statuses), 'configured')
    robot.faults.camera = True
    robot.wait(lambda: robot.active and robot.active[-1] is True, 'active by itself')


def set_parameters(robot, **values):
    return robot.set_parameters(**values)


def test_speed_scale_changes_at_once_and_the_rest_only_before_configure(robot, serve):
    served = serve().up()
    assert set_parameters(robot, limits__speed_scale=0.5).successful
    assert served.node.serving.limiter.speed_scale == 0.5
    refusal = set_parameters(robot, limits__speed_scale=0.7, seed=3)
    assert not refusal.successful
    assert refusal.reason == 'seed can only change before configure; clean the node up first'
    assert served.node.serving.limiter.speed_scale == 0.5, 'a set is taken whole or not at all'
    refusal = set_parameters(robot, limits__speed_scale=1.5)
    assert not refusal.successful
    assert 'speed_scale' in refusal.reason


@pytest.mark.parametrize(('values', 'word'), [
    ({'steps': -1}, 'steps'), ({'device': 'toaster'}, 'device is'), ({'seed': 'x'}, 'type'),
    ({'contract': 'other'}, 'contract'),
])
def test_bad_parameter_is_refused_with_its_name(robot, serve, values, word):
    serve()
    refusal = set_parameters(robot, **values)
    assert not refusal.successful
    assert word in refusal.reason.lower() or 'read-only' in refusal.reason


def test_second_publisher_on_the_command_topic_is_told(robot, serve):
    rival = robot.node.create_publisher(Float64MultiArray, 'arm/commands', 1)
    serve().up()
    robot.wait(lambda: robot.status['rivals'] == 1, 'the rival')
    robot.node.destroy_publisher(rival)
    robot.wait(lambda: robot.status['rivals'] == 0, 'the rival is gone')


def test_instruction_changes_while_running(robot, serve):
    served = serve().up()
    robot.instruction.publish(String(data='sweep slowly'))
    robot.wait(lambda: robot.status['instruction'] == 'sweep slowly', 'the instruction')
    assert served.node.serving.builder.build().instruction == 'sweep slowly'


def test_instruction_is_also_heard_from_a_publisher_that_is_not_latched(robot, serve):
    serve().up()
    plain = robot.node.create_publisher(String, 'instruction', 1)
    while plain.get_subscription_count() < 1:
        pass
    plain.publish(String(data='plain'))
    robot.wait(lambda: robot.status['instruction'] == 'plain', 'the instruction')


def test_services_answer_in_every_state(robot, serve):
    serve()
    for on in (True, False):
        answer = robot.call('enable', on=on)
        assert not answer.success
        assert 'configure it first' in answer.message
    assert robot.call('estop').success
    assert robot.call('reset').success


def test_estop_before_configure_stays_latched(robot, serve):
    served = serve(enable_on_activate=False)
    robot.call('estop')
    served.up()
    refusal = robot.call('enable')
    assert not refusal.success
    assert 'e-stop is latched' in refusal.message


def test_diagnostics_tell_rates_latencies_and_the_cause(robot, serve):
    from diagnostic_msgs.msg import DiagnosticArray

    heard = robot.diagnostics
    robot.node.create_subscription(
        DiagnosticArray, '/diagnostics', lambda m: robot._keep(heard, m), 20)
    serve().up()
    found = {}

    def complete():
        for array in heard:
            found.update({item.name.partition(': ')[2]: item for item in array.status})
        return 'inference' in found and any(
            kv.key == 'count' and int(kv.value) > 2 for kv in found['inference'].values)

    robot.wait(complete, 'inference figures on /diagnostics')
    assert set(found) == {
        'policy', 'camera front', 'joint_states', 'inference', 'commands', 'quantization'}
    assert {'p50_ms', 'p95_ms', 'p99_ms', 'overruns'} <= {
        kv.key for kv in found['inference'].values}
    assert found['camera front'].hardware_id == 'two_joints'
    robot.call('enable', on=False)
    robot.wait(lambda: complete() and 'stopped' in found['commands'].message, 'the cause')


def test_status_is_latched_json(robot, serve):
    serve().up()
    robot.wait(lambda: robot.active and robot.active[-1], 'active')
    late, got = [], threading.Event()

    def keep(message):
        late.append(json.loads(message.data))
        got.set()

    from quantvla_ros.nodes.names import LATCHED

    robot.node.create_subscription(String, 'policy_node/status', keep, LATCHED)
    assert got.wait(PATIENCE_S)
    assert {'state', 'cause', 'precision', 'instruction', 'inference', 'commands'} <= set(late[0])


def test_node_uses_the_simulated_clock_for_stamps(robot, serve):
    from rosgraph_msgs.msg import Clock

    served = serve(use_sim_time=True)
    clock = robot.node.create_publisher(Clock, '/clock', 1)
    message = Clock()
    message.clock.sec = 1234
    while served.node.get_clock().now().nanoseconds != 1234 * 10**9:
        clock.publish(message)
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    serving = served.node.serving
    assert serving.clock.now_ns() == 1234 * 10**9
    first = serving.clock.steady_ns()
    assert serving.clock.steady_ns() > first, 'watchdogs run on although /clock stands still'
    assert serving.simulated_time
