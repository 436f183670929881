# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end the node in every lifecycle state: status 0, no traceback, no orphan."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import rclpy
from lifecycle_msgs.srv import ChangeState
from robot import PATIENCE_S

import quantvla_ros

pytestmark = pytest.mark.ros
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from quantvla_ros.nodes.signals import STOP
STOP.install()
from quantvla_ros.policies.base import POLICIES
POLICIES['sweep'] = 'fault_policies:SweepPolicy'
POLICIES['stuck'] = 'stuck_policy:StuckPolicy'
POLICIES['stuck_later'] = 'stuck_policy:StuckLaterPolicy'
from quantvla_ros.nodes.policy_node import main
print('ready', flush=True)
sys.exit(main())
"""


class Process:
    """The node in a process of its own; its output is kept for the verdict."""

    def __init__(self, contract, **values):
        given = {'contract': contract, 'guard.max_tick_gap_s': 2.0, 'guard.hold_s': 0.2,
                 'freshness.clock_jump_s': 0.5, **values}
        words = ['--ros-args', '-r', '__ns:=/robot']
        for name, value in given.items():
            text = str(value).lower() if isinstance(value, bool) else value
            words += ['-p', f'{name}:={text}']
        program = PROGRAM.format(tests=str(Path(__file__).parent))
        self.process = subprocess.Popen(
            [sys.executable, '-c', program, *words], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, cwd=Path(quantvla_ros.__file__).parents[1],
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def end(self, number, again=False):
        """Send a signal and return what the process printed; asserts a clean end.

        again: keep sending it until the process has ended, as an impatient user does.
        """
        self.process.send_signal(number)
        while again and self.process.poll() is None:
            self.process.send_signal(number)
            time.sleep(0.005)
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, out
        assert 'Traceback' not in out, out
        return out


@pytest.fixture
def process(contract_path):
    made = []

    def make(**values):
        made.append(Process(contract_path, **values))
        return made[-1]

    yield make
    for item in made:
        if item.process.poll() is None:
            item.process.kill()
        item.process.wait(PATIENCE_S)


def reach(robot, running, state):
    """Wait until the node says on ~/status that it is in a lifecycle state."""
    robot.wait(lambda: robot.status['lifecycle'] == state, state)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_while_unconfigured(robot, process, number):
    running = process()
    reach(robot, running, 'unconfigured')
    running.end(number, again=True)


def test_signal_while_it_starts(process):
    running = process()
    assert running.process.stdout.readline() == 'ready\n'
    running.end(signal.SIGINT)


def test_sigint_while_configure_waits_for_the_robot_description(graph, process):
    running = process(autostart=True, **{'limits.description_timeout_s': 100.0})
    assert running.process.stdout.readline() == 'ready\n'
    watcher = rclpy.create_node('watcher', use_global_arguments=False)
    try:
        while not watcher.count_publishers('/robot/policy_node/status'):
            assert running.process.poll() is None
            time.sleep(0.01)
    finally:
        watcher.destroy_node()
    running.end(signal.SIGINT)


@pytest.mark.parametrize('isolated', [True, False])
def test_sigint_while_the_policy_loads_and_never_ends(robot, process, isolated):
    running = process(autostart=True, policy='stuck', policy_process=isolated)
    for line in running.process.stdout:
        if 'loading for ever' in line:
            break
    out = running.end(signal.SIGINT)
    assert ('left behind' in out) is not isolated, 'what hangs in a process of its own is ended'


def test_sigint_while_inactive_and_activate_waits_for_inputs(robot, process):
    robot.faults.camera = False
    running = process(autostart=True, **{'freshness.wait_s': 100.0})
    for line in running.process.stdout:
        if 'configure: done' in line:
            break
    running.end(signal.SIGINT)


@pytest.mark.parametrize('state', ['inactive', 'finalized'])
def test_sigint_while(robot, process, state):
    running = process()
    client = robot.node.create_client(ChangeState, 'policy_node/change_state')
    assert client.wait_for_service(PATIENCE_S)
    reach(robot, running, 'unconfigured')
    request, answered = ChangeState.Request(), threading.Event()
    request.transition.label = {'inactive': 'configure', 'finalized': 'shutdown'}[state]
    client.call_async(request).add_done_callback(lambda _: answered.set())
    assert answered.wait(PATIENCE_S)
    reach(robot, running, state)
    running.end(signal.SIGINT)


@pytest.mark.parametrize('again', [False, True])
def test_sigint_while_active_brings_the_arm_to_rest(robot, process, again):
    running = process(autostart=True)
    robot.wait(lambda: robot.active and robot.active[-1], 'active')
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks + 1, 'moving')
    running.end(signal.SIGINT, again)
    first, last = list(robot.commands[-2].data), list(robot.commands[-1].data)
    assert max(abs(a - b) for a, b in zip(first, last, strict=True)) < 1e-3, 'slow at the end'


@pytest.mark.parametrize('isolated', [True, False])
def test_sigint_while_the_inference_hangs(robot, process, isolated):
    running = process(autostart=True, policy='stuck_later', policy_process=isolated,
                      **{'inference.timeout_s': 0.5})
    robot.wait(lambda: robot.status['cause'] is not None, 'the stop')
    assert robot.status['cause']['kind'] == 'inference_timeout'
    out = running.end(signal.SIGINT)
    assert ('left behind' in out) is not isolated, 'what hangs in a process of its own is ended'
