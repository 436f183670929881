# SPDX-License-Identifier: Apache-2.0
"""Precision changed on a node over real DDS: in every state, and with every fault on the way."""

import gc
import weakref

import pytest
from precise_policy import PrecisePolicy
from swapping import assert_no_gap, settle, value
from swapping import model as model  # fixtures
from swapping import moving as moving
from swapping import pair as pair
from swapping import robot as robot
from swapping import served as served

from quantvla_ros.quant.artifact import TENSOR_NAME

pytestmark = pytest.mark.ros


def test_precision_changes_under_way_and_the_old_one_is_freed(robot, moving):
    old = weakref.ref(moving.node.serving.policy)
    assert robot.set_parameters(precision='coarse').successful
    settle(robot, moving, 'coarse', 'active')
    robot.wait(lambda: old() is None, 'the old policy is freed without a collection')
    assert_no_gap(robot, moving)


def test_parameter_and_status_tell_what_runs_while_another_one_loads(robot, moving):
    PrecisePolicy.gate.clear()
    assert robot.set_parameters(precision='coarse').successful
    robot.wait(lambda: robot.swap('stage') == 'loading', 'loading')
    assert value(moving) == 'fine'
    assert robot.status['precision'] == 'fine'
    assert robot.swap('requested') == 'coarse'
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks + 1, 'the running one makes chunks meanwhile')
    PrecisePolicy.gate.set()
    settle(robot, moving, 'coarse', 'active')


@pytest.mark.parametrize(('values', 'words'), [
    ({'precision': 'nowhere', 'model': 'x'}, 'model can only change before configure'),
    ({'precision': 'inaccurate'}, 'mean action error is 9.00 mrad'),
    ({'precision': 'good', 'gate__needs_evidence': True}, 'nobody measured'),
    ({'precision': 'coarse', 'calibration': 'x'}, 'takes no calibration'),
])
def test_wish_that_cannot_come_true_is_refused_at_once(robot, moving, values, words):
    refusal = robot.set_parameters(**values)
    assert not refusal.successful
    assert words in refusal.reason
    assert value(moving) == 'fine'
    assert value(moving, 'gate.needs_evidence') is False, 'a set is taken whole or not at all'
    assert moving.node.serving.values['gate.needs_evidence'] is False
    assert PrecisePolicy.loads == []


def test_gate_is_overridden_by_name_and_the_status_shows_it(robot, moving):
    assert robot.set_parameters(precision='inaccurate', gate__override=True).successful
    settle(robot, moving, 'inaccurate', 'active')
    assert 'mean action error is 9.00 mrad' in robot.status['gate']
    robot.set_parameters(precision='good')
    settle(robot, moving, 'good', 'active')
    assert robot.status['gate'] == ''


def test_gate_also_holds_at_configure(robot, served):
    assert robot.set_parameters(precision='inaccurate').successful, 'nothing runs yet'
    assert served.do(served.node.trigger_configure).name == 'FAILURE'


def test_missing_artifact_is_put_back_with_its_reason(robot, moving):
    assert robot.set_parameters(precision='nowhere').successful, 'this policy cannot tell before'
    last = settle(robot, moving, 'fine', 'refused')
    assert 'nowhere holds no artifact.json' in last['sentence']
    assert_no_gap(robot, moving)


@pytest.mark.parametrize('precision', ['broken', 'torn'])
def test_artifact_damaged_before_or_while_it_is_read_is_refused(robot, moving, model, precision):
    PrecisePolicy.gate.clear()
    assert robot.set_parameters(precision=precision).successful
    robot.wait(lambda: precision in PrecisePolicy.loads, 'loading')
    path = model / precision / TENSOR_NAME
    data = bytearray(path.read_bytes())
    data[-8] ^= 0xff
    path.write_bytes(data)
    PrecisePolicy.gate.set()
    last = settle(robot, moving, 'fine', 'refused')
    assert 'was changed' in last['sentence']
    assert_no_gap(robot, moving)


def test_answer_too_far_from_the_running_one_is_refused(robot, moving):
    robot.set_parameters(precision='far')
    last = settle(robot, moving, 'fine', 'refused')
    assert last['kind'] == 'difference'
    assert 'differs by 0.6000' in last['sentence']
    assert_no_gap(robot, moving)


@pytest.mark.parametrize(('precision', 'kind', 'words'), [
    ('raises', 'policy_raised', 'illegal instruction'),
    ('nan', 'non_finite', 'not finite'),
    ('huge', 'huge_step', 'in one step'),
    ('slow', 'latency', 'longer than the 0.600 s'),
])
def test_policy_that_breaks_at_its_first_chunk_is_rolled_back(robot, moving, precision, kind,
                                                              words):
    robot.set_parameters(precision=precision)
    last = settle(robot, moving, 'fine', 'rolled_back')
    assert last['kind'] == kind
    assert words in last['sentence']
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks, 'the old one goes on')
    assert_no_gap(robot, moving)


def test_storm_of_wishes_settles_on_the_last(robot, moving):
    for turn in range(12):
        assert robot.set_parameters(precision=('coarse', 'good', 'fine')[turn % 3]).successful
    robot.set_parameters(precision='good')
    settle(robot, moving, 'good', 'active')
    swap = moving.node.serving.exchange.swap
    robot.wait(lambda: swap.settled, 'settled')
    assert value(moving) == 'good'
    assert_no_gap(robot, moving)


def test_swap_while_the_estop_is_latched_moves_nothing(robot, moving):
    robot.call('estop')
    robot.wait(lambda: robot.status['state'] == 'silent', 'silence')
    commands = len(robot.commands)
    assert robot.set_parameters(precision='coarse').successful
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it is loaded')
    robot.set_parameters(precision='good')  # its proof is skipped: no chunk will come
    robot.wait(lambda: robot.status['precision'] == 'good', 'the next one')
    assert robot.status['state'] == 'silent'
    assert len(robot.commands) <= commands + 1
    assert robot.status['estop']
    while not robot.call('reset').success:
        pass
    assert robot.call('enable').success
    settle(robot, moving, 'good', 'active')


def test_swap_while_inactive_is_ready_for_activate(robot, served):
    assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    robot.set_parameters(precision='coarse')
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it is loaded')
    assert value(served) == 'coarse'
    assert served.do(served.node.trigger_activate).name == 'SUCCESS'
    robot.wait(lambda: (robot.swap('counts') or {}).get('active'), 'it has proved itself')


def test_precision_of_an_unconfigured_node_is_what_configure_takes(robot, served):
    assert robot.set_parameters(precision='coarse').successful
    assert value(served) == 'coarse'
    PrecisePolicy.loads.clear()
    served.up()
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it runs')
    assert PrecisePolicy.loads == ['coarse']


def test_deactivate_while_loading_goes_on_and_commands_nothing(robot, moving):
    PrecisePolicy.gate.clear()
    robot.set_parameters(precision='coarse')
    robot.wait(lambda: 'coarse' in PrecisePolicy.loads, 'loading')
    assert moving.do(moving.node.trigger_deactivate).name == 'SUCCESS'
    PrecisePolicy.gate.set()
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it is loaded')
    assert robot.status['state'] == 'silent' or robot.status['state'] == 'holding'


def test_cleanup_while_loading_gives_everything_back(robot, moving):
    PrecisePolicy.gate.clear()
    robot.set_parameters(precision='coarse')
    robot.wait(lambda: 'coarse' in PrecisePolicy.loads, 'loading')
    old = weakref.ref(moving.node.serving.policy)
    loader = moving.node.serving.exchange.beside.thread._thread
    assert moving.do(moving.node.trigger_deactivate).name == 'SUCCESS'
    assert moving.do(moving.node.trigger_cleanup).name == 'SUCCESS'
    PrecisePolicy.gate.set()
    loader.join(20.0)
    assert not loader.is_alive()
    gc.collect()
    assert old() is None
    assert value(moving) == 'fine', 'the wish is gone with what should have fulfilled it'
    moving.up()


def test_without_room_for_two_it_says_so_and_hold_does_it(robot, moving):
    PrecisePolicy.needs = 10**15
    refusal = robot.set_parameters(precision='coarse')
    assert 'coarse needs about 1000000000 MB beside the running one' in refusal.reason
    assert 'set swap.mode to hold' in refusal.reason
    old = weakref.ref(moving.node.serving.policy)
    PrecisePolicy.gate.clear()
    assert robot.set_parameters(precision='coarse', swap__mode='hold').successful
    robot.wait(lambda: robot.swap('stage') == 'loading', 'loading')
    assert old() is None, 'the old one is freed first'
    assert robot.status['cause']['kind'] == 'swap'
    assert value(moving) == '', 'nothing runs'
    assert 'no policy is loaded: coarse is on its way' in robot.call('enable').message
    PrecisePolicy.gate.set()
    settle(robot, moving, 'coarse', 'active')
    robot.wait(lambda: robot.status['state'] == 'running', 'it goes on by itself')


def test_hold_that_fails_brings_the_old_one_back(robot, moving):
    robot.set_parameters(precision='far', swap__mode='hold')
    last = settle(robot, moving, 'fine', 'refused')
    assert last['kind'] == 'difference'
    robot.wait(lambda: robot.status['state'] == 'running', 'it goes on by itself')


@pytest.mark.parametrize('service', ['estop', 'disable'])
def test_stop_during_a_hold_is_obeyed_after_it(robot, moving, service):
    PrecisePolicy.gate.clear()
    robot.set_parameters(precision='coarse', swap__mode='hold')
    robot.wait(lambda: robot.swap('stage') == 'loading', 'loading')
    if service == 'estop':
        robot.call('estop')
        while not robot.call('reset').success:
            pass
    else:
        robot.call('enable', on=False)
    PrecisePolicy.gate.set()
    settle(robot, moving, 'coarse', 'active')
    control = moving.node.serving.control
    ticks = control.ticks
    robot.wait(lambda: control.ticks > ticks + 20, 'ticks')
    assert moving.node.serving.guard.state.value in ('holding', 'silent')
