# SPDX-License-Identifier: Apache-2.0
"""A policy in a process of its own on a node over real DDS."""

import os
import signal
import threading
from pathlib import Path

import pytest

from quantvla_ros.nodes import serving
from quantvla_ros.nodes.isolated import IsolatedPolicy
from quantvla_ros.policies.base import POLICIES

pytestmark = pytest.mark.ros
ISOLATED = {'policy': 'precise', 'precision': 'fine', 'policy_process': True, 'model': '/nowhere',
            'freshness.camera_max_silence_s': 10.0, 'freshness.joints_max_silence_s': 10.0,
            'freshness.camera_max_age_s': 10.0, 'freshness.joints_max_age_s': 10.0,
            'swap.good_chunks': 1, 'inference.timeout_s': 20.0}


@pytest.fixture
def moving(robot, serve, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(POLICIES, 'precise', 'precise_policy:PrecisePolicy')
    served = serve(**ISOLATED).up()
    robot.wait(lambda: robot.chunks, 'a chunk')
    return served


def process_of(served):
    """The process of the policy that makes the next chunk."""
    policy = served.node.serving.policy
    assert isinstance(policy, IsolatedPolicy)
    return int(Path(f'/proc/self/fdinfo/{policy._pidfd}').read_text().split('Pid:')[1].split()[0])


def test_precision_changes_to_another_process_and_the_old_one_ends(robot, moving):
    old = process_of(moving)
    assert robot.set_parameters(precision='coarse').successful
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it runs')
    robot.wait(lambda: (robot.swap('counts') or {}).get('active'), 'it has proved itself')
    assert process_of(moving) != old
    robot.wait(lambda: not Path(f'/proc/{old}').exists(), 'the old one has ended')
    assert robot.status['state'] == 'running'


def test_killed_policy_stops_the_arm_with_its_cause_and_another_precision_goes_on(robot, moving):
    os.kill(process_of(moving), signal.SIGKILL)
    robot.wait(lambda: robot.status['cause'], 'a stop')
    assert robot.status['cause']['kind'] == 'policy_raised'
    assert 'the process of the policy has ended' in robot.status['cause']['sentence']
    assert robot.set_parameters(precision='coarse').successful
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it is loaded')
    robot.wait(lambda: moving.node.serving.guard.at_rest, 'rest')
    assert robot.call('enable').success
    robot.wait(lambda: (robot.swap('counts') or {}).get('active'), 'it makes chunks')


def test_policy_killed_while_it_proves_itself_is_rolled_back(robot, moving):
    assert robot.set_parameters(swap__good_chunks=1000, precision='coarse').successful
    robot.wait(lambda: robot.status['precision'] == 'coarse', 'it runs')
    os.kill(process_of(moving), signal.SIGKILL)
    robot.wait(lambda: robot.status['precision'] == 'fine', 'the old one is back')
    assert robot.swap('last')['result'] == 'rolled_back'
    assert robot.status['state'] == 'running'


def test_cleanup_leaves_no_process(robot, moving):
    pids = [process_of(moving), moving.node.serving._maker._popen.pid]
    assert moving.do(moving.node.trigger_deactivate).name == 'SUCCESS'
    assert moving.do(moving.node.trigger_cleanup).name == 'SUCCESS'
    robot.wait(lambda: not any(Path(f'/proc/{pid}').exists() for pid in pids), 'they have ended')


def test_threads_that_hold_the_interpreter_ask_for_their_core_while_commands_flow(
    robot, moving, monkeypatch
):
    asked = []
    monkeypatch.setattr(serving, 'set_thread_realtime', lambda priority: asked.append(
        (threading.current_thread().name.startswith('inference'), priority)))
    assert moving.do(moving.node.trigger_deactivate).name == 'SUCCESS'
    assert moving.do(moving.node.trigger_activate).name == 'SUCCESS'
    robot.wait(lambda: len(asked) == 8, 'four threads twice')
    assert sorted(priority for inference, priority in asked if inference) == [0, 0, 0, 1, 1, 1]
    assert [priority for inference, priority in asked if not inference] == [0, 1]
