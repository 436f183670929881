# SPDX-License-Identifier: Apache-2.0
"""Every injected fault stops the arm with its cause on record, and mending it recovers."""

import threading

import numpy as np
import pytest
from fault_policies import SweepPolicy
from robot import LIMITS, healthy
from std_msgs.msg import Float64MultiArray

pytestmark = pytest.mark.ros
SENTINEL = [99.0, 99.0]


def vectors(robot):
    return np.array([list(message.data) for message in robot.commands])


def wait_for_stop(robot, kind):
    """Wait for the recorded cause and for rest; return the cause."""
    robot.wait(lambda: robot.status['cause'] is not None, f'a stop because of {kind}')
    cause = robot.status['cause']
    assert cause['kind'] == kind, cause
    robot.wait(lambda: robot.status['state'] == 'silent', 'silence')
    robot.wait(lambda: robot.active[-1] is False, '~/is_active false')
    assert robot.status['cause'] == cause, 'the first cause stays'
    return cause


def assert_silent_and_at_rest(robot, served):
    """After a stop: the last commands are equal, and none comes before a sentinel."""
    control = served.node.serving.control
    before, ticks = len(robot.commands), control.ticks
    robot.wait(lambda: control.ticks > ticks + 20, 'more ticks')
    served.node.serving.commands.publisher.publish(Float64MultiArray(data=SENTINEL))
    robot.wait(lambda: list(robot.commands[-1].data) == SENTINEL, 'the sentinel')
    late = [list(m.data) for m in robot.commands[before:-1]]
    with robot.changed:
        robot.commands.pop()
        robot.positions.update(zip(('elbow', 'shoulder'), robot.commands[-1].data, strict=True))
    assert len(late) <= 1, f'{len(late)} commands after silence'  # one may be on its way
    tail = vectors(robot)[-3:]
    assert np.ptp(tail, axis=0).max() == 0.0, 'the arm rests'


def assert_commands_are_sound(robot):
    found = vectors(robot)
    assert np.isfinite(found).all()
    for column, name in enumerate(('elbow', 'shoulder')):
        lower, upper, _ = LIMITS[name]
        assert found[:, column].min() >= lower
        assert found[:, column].max() <= upper


def assert_recovers(robot, served):
    """~/enable starts again from where the arm is, once inputs are fresh."""
    robot.wait(lambda: not served.node.serving.problems(), 'fresh inputs')
    count, chunks = len(robot.commands), len(robot.chunks)
    at = vectors(robot)[-1]
    answer = robot.call('enable')
    assert answer.success, answer.message
    robot.wait(lambda: len(robot.commands) > count + 5, 'commands')
    robot.wait(lambda: len(robot.chunks) > chunks, 'a chunk')
    first = np.array(robot.commands[count].data)
    assert np.abs(first - at).max() < 0.05, 'the first command is the measured pose'
    assert robot.status['cause'] is None
    robot.wait(lambda: robot.active[-1] is True, '~/is_active true')


INPUT_FAULTS = {
    'camera silent': ({'camera': False}, 'silent', 'camera front'),
    'camera frozen': ({'frozen': True}, 'frozen', 'camera front'),
    'camera stamps going back': ({'back_s': 0.3}, 'backwards', 'camera front'),
    'camera of wrong size': ({'size': (9, 6)}, 'size', '9x6; the contract says 8x6'),
    'camera of wrong encoding': ({'encoding': 'bgr8'}, 'encoding', "'bgr8'"),
    'depth camera': ({'encoding': '16UC1'}, 'encoding', 'depth'),
    'joint states silent': ({'joints': False}, 'silent', 'joint_states'),
    'joints renamed': ({'names': ('gripper', 'elbow', 'arm_1')}, 'names', 'shoulder is missing'),
    'joint named twice': ({'names': ('elbow', 'elbow', 'shoulder')}, 'names', 'more than once'),
    'joint states NaN': ({'nan': True}, 'not_finite', 'not finite'),
    'clock of the robot jumps': ({'stamp_s': 5.0}, 'future', 'ahead of this clock'),
    'clock of the robot lags': ({'stamp_s': -5.0}, 'backwards', 'went back'),
}


# Nothing moves after the stop, so a still picture proves nothing; and stamps that went back once
# are in order again.
PASSING_FAULTS = ('camera frozen', 'camera stamps going back')


@pytest.mark.parametrize('name', INPUT_FAULTS)
def test_input_fault_stops_with_its_cause_and_recovers(moving, name):
    robot, served = moving
    changes, kind, words = INPUT_FAULTS[name]
    vars(robot.faults).update(changes)
    cause = wait_for_stop(robot, kind)
    assert words in cause['sentence']
    assert_silent_and_at_rest(robot, served)
    if name not in PASSING_FAULTS:
        refusal = robot.call('enable')
        assert not refusal.success, 'a start on bad data'
    robot.faults = healthy()
    assert_recovers(robot, served)
    assert_commands_are_sound(robot)


def test_reordered_joint_states_are_no_fault(moving):
    robot, served = moving
    starts = served.node.serving.guard.counts['starts']
    for names in (('shoulder', 'elbow', 'gripper'), ('elbow', 'shoulder'), ('shoulder', 'elbow')):
        robot.faults.names = names
        chunks = len(robot.chunks)
        robot.wait(lambda n=chunks: len(robot.chunks) > n + 1, 'chunks go on')
    assert served.node.serving.guard.state.value == 'running'
    assert served.node.serving.guard.counts['starts'] == starts


POLICY_FAULTS = {
    'raising': ('raise', 'policy_raised', 'RuntimeError: the weights caught fire'),
    'refusing': ('refuse', 'policy_refused', "no word of 'sweep' is known"),
    'hanging': ('hang', 'inference_timeout', 'inference.timeout_s allows 1 s'),
    'returning NaN': ('nan', 'non_finite', 'nan'),
    'of wrong width': ('width', 'wrong_width', '1 joints; expected 2'),
    'of a huge step': ('huge', 'huge_step', 'in one step'),
}


@pytest.mark.parametrize('name', POLICY_FAULTS)
def test_policy_fault_stops_with_its_cause_and_recovers(moving, name):
    robot, served = moving
    mode, kind, words = POLICY_FAULTS[name]
    SweepPolicy.released.clear()
    SweepPolicy.mode = mode
    cause = wait_for_stop(robot, kind)
    assert words in cause['sentence']
    assert_silent_and_at_rest(robot, served)
    if mode == 'hang':
        refusal = robot.call('enable')
        assert 'clean up and configure again' in refusal.message
    SweepPolicy.mode = 'good'
    SweepPolicy.released.set()
    robot.wait(lambda: served.node.serving.inference.idle(), 'the inference thread is free')
    assert_recovers(robot, served)
    assert_commands_are_sound(robot)


def test_controller_that_vanishes_stops_the_arm(moving):
    robot, served = moving
    robot.disconnect_controller()
    robot.wait(lambda: robot.status['cause'] is not None, 'a stop')
    cause = robot.status['cause']
    assert cause['kind'] == 'controller_absent'
    assert "no controller subscribes to '/robot/arm/commands'" in cause['sentence']
    refusal = robot.call('enable')
    assert not refusal.success
    robot.connect_controller()
    robot.wait(lambda: served.node.serving.controller_listens(), 'the controller is back')
    robot.wait(lambda: served.node.serving.guard.at_rest, 'rest')
    assert_recovers(robot, served)


def test_jump_of_our_own_clock_stops_the_arm(moving, monkeypatch):
    robot, served = moving
    clock = served.node.serving.clock
    jumped = threading.Event()
    real = clock.now_ns
    monkeypatch.setattr(
        clock, 'now_ns', lambda: real() + (10 * 10**9 if jumped.is_set() else 0), raising=True)
    jumped.set()
    robot.wait(lambda: robot.status['cause'] is not None, 'a stop')
    assert robot.status['cause']['kind'] == 'clock_jump'
    jumped.clear()
    robot.wait(lambda: served.node.serving.guard.at_rest, 'rest')
    robot.wait(lambda: robot.status['state'] == 'silent', 'silence')
    assert_recovers(robot, served)


def test_estop_latches_until_reset(moving):
    robot, served = moving
    assert robot.call('estop').success
    cause = wait_for_stop(robot, 'estop')
    assert 'pressed' in cause['sentence']
    assert_silent_and_at_rest(robot, served)
    refusal = robot.call('enable')
    assert not refusal.success
    assert 'e-stop is latched' in refusal.message
    while not robot.call('reset').success:  # refused until the cooldown is over
        pass
    assert served.node.serving.guard.state.value == 'silent', 'reset moves nothing'
    assert_recovers(robot, served)


def test_disable_stops_and_enable_starts(moving):
    robot, served = moving
    assert robot.call('enable', on=False).success
    wait_for_stop(robot, 'disabled')
    assert_silent_and_at_rest(robot, served)
    assert_recovers(robot, served)


def test_a_picture_that_comes_is_told_to_the_inference_of_an_arm_that_moves(moving, monkeypatch):
    robot, served = moving
    serving, pokers = served.node.serving, set()
    inference = serving.inference
    poke = inference.poke
    monkeypatch.setattr(inference, 'poke', lambda now_ns: (
        pokers.add(threading.current_thread().name), poke(now_ns)))
    robot.wait(lambda: len(pokers) > 1, 'a poke by the executor beside that of the control thread')
    assert 'control' in pokers
