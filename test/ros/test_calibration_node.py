# SPDX-License-Identifier: Apache-2.0
"""The calibration node over DDS: answers at once, tells its progress, and yields to the arm."""

import json
import os
import sys
import threading
import time

import pytest

rclpy = pytest.importorskip('rclpy', reason='rclpy is not installed')

from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.qos import DurabilityPolicy, QoSProfile  # noqa: E402
from std_msgs.msg import Bool, String  # noqa: E402
from std_srvs.srv import Trigger  # noqa: E402

from quantvla_ros.nodes import calibrating  # noqa: E402
from quantvla_ros.nodes.calibration_node import CalibrationNode  # noqa: E402
from quantvla_ros.nodes.signals import StopRequest  # noqa: E402

pytestmark = pytest.mark.ros
LATCHED = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
PATIENCE_S = 60.0
SAYS = 'import json,sys\nsay = lambda **d: print(json.dumps(d), flush=True)\n'
WORKS = SAYS + 'say(stage="side by side", share=0.5, left_s=3.0)\nsys.stdin.read()\n'
SUCCEEDS = SAYS + ('e = {"before": {"mean_rad": 0.002}, "after": {"mean_rad": 0.001}}\n'
                   'say(stage="writing", share=1.0, left_s=0.0)\n'
                   'say(result={"folder": "f", "evidence": e})\n')


class Bench:
    """A calibration node and one that listens to it, each spun by a thread of its own."""

    def __init__(self):
        self.node = CalibrationNode(
            namespace='/robot', use_global_arguments=False, stop=StopRequest(),
            parameter_overrides=[Parameter('bag', value='bags/monday')])
        self.other = rclpy.create_node('other', namespace='/robot', use_global_arguments=False)
        self.told, self.diagnostics = [], []
        self.changed = threading.Condition()
        self.other.create_subscription(
            String, 'calibration_node/progress',
            lambda m: self.keep(self.told, json.loads(m.data)), LATCHED)
        self.other.create_subscription(
            DiagnosticArray, '/diagnostics', lambda m: self.keep(self.diagnostics, m), 5)
        self.arm = None
        self.clients = {name: self.other.create_client(Trigger, f'calibration_node/{name}')
                        for name in ('calibrate', 'cancel')}
        self.end = threading.Event()
        self.threads = []
        for node in (self.node, self.other):
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            self.threads.append(threading.Thread(target=self.spin, args=(executor,)))
            self.threads[-1].start()

    def spin(self, executor):
        while not self.end.is_set():
            executor.spin_once(timeout_sec=0.02)

    def keep(self, where, what):
        with self.changed:
            where.append(what)
            self.changed.notify_all()

    def wait(self, ready, what):
        with self.changed:
            assert self.changed.wait_for(ready, PATIENCE_S), f'never {what}: {self.told[-3:]}'

    def state(self, name):
        self.wait(lambda: self.told and self.told[-1]['state'] == name, name)
        return self.told[-1]

    def call(self, name):
        client = self.clients[name]
        assert client.wait_for_service(PATIENCE_S)
        done = threading.Event()
        future = client.call_async(Trigger.Request())
        future.add_done_callback(lambda _: done.set())
        assert done.wait(PATIENCE_S), f'no answer from {name}'
        return future.result()

    def arm_moves(self, moves):
        if self.arm is None:
            self.arm = self.other.create_publisher(Bool, 'policy_node/is_active', LATCHED)
        self.arm.publish(Bool(data=moves))
        self.until(lambda: self.node._arm_moves == moves)

    def until(self, ready):
        end = time.monotonic() + PATIENCE_S
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.01)

    def set(self, **values):
        return self.node.set_parameters(
            [Parameter(name, value=value) for name, value in values.items()])

    def close(self):
        self.end.set()
        for thread in self.threads:
            thread.join()
        self.node.tear_down()
        for node in (self.node, self.other):
            node.destroy_node()


@pytest.fixture(scope='module')
def made(graph):
    bench = Bench()
    bench.node.trigger_configure()
    bench.node.trigger_activate()
    yield bench
    bench.close()


@pytest.fixture
def bench(made, monkeypatch):
    """The node, idle, the arm at rest; `does` says what its child process is."""
    def does(script):
        words = [sys.executable, '-c', script]
        monkeypatch.setattr(calibrating, 'command', lambda values: words)

    made.does = does
    does(WORKS)
    made.set(beside_active=False)
    if made.arm is not None:
        made.arm_moves(False)
    yield made
    made.call('cancel')
    made.until(lambda: made.node._work is None or not made.node._work.running)


def running(bench):
    assert bench.call('calibrate').success
    bench.wait(lambda: bench.told[-1]['stage'] == 'side by side', 'side by side')


def test_it_answers_at_once_and_tells_its_progress_and_result(bench):
    running(bench)
    assert bench.told[-1]['share'] == 0.5 and bench.told[-1]['left_s'] == 3.0
    bench.wait(lambda: any('50 %: side by side' in s.message
                           for m in bench.diagnostics for s in m.status), 'diagnosed')
    bench.call('cancel')
    bench.state('cancelled')
    bench.does(SUCCEEDS)
    answer = bench.call('calibrate')
    assert answer.success and 'bags/monday' in answer.message
    told = bench.state('done')
    assert told['share'] == 1.0 and told['result']['folder'] == 'f'


def test_a_cancel_takes_effect_within_a_second(bench):
    running(bench)
    began = time.monotonic()
    assert bench.call('cancel').success
    told = bench.state('cancelled')
    assert time.monotonic() - began < 1.0
    assert 'nothing was written' in told['sentence']
    assert not bench.call('cancel').success


def test_one_calibration_at_a_time(bench):
    running(bench)
    answer = bench.call('calibrate')
    assert not answer.success and 'calibrating already' in answer.message


def test_it_refuses_beside_a_moving_arm_unless_told_to(bench):
    bench.arm_moves(True)
    answer = bench.call('calibrate')
    assert not answer.success and 'the arm moves' in answer.message
    bench.set(beside_active=True)
    running(bench)


def test_it_yields_to_an_arm_that_begins_to_move(bench):
    running(bench)
    bench.arm_moves(True)
    assert 'the arm began to move' in bench.state('cancelled')['sentence']


def test_a_killed_child_is_told_and_the_next_run_is_fine(bench):
    running(bench)
    os.kill(bench.node._work._popen.pid, 9)
    assert 'SIGKILL' in bench.state('failed')['sentence']
    bench.wait(lambda: any(s.level == b'\x02' and 'SIGKILL' in s.message
                           for m in bench.diagnostics for s in m.status), 'an error')
    bench.does(SUCCEEDS)
    assert bench.call('calibrate').success
    bench.state('done')


def test_a_parameter_out_of_range_is_refused_with_the_reason(bench):
    (answer,) = bench.set(frames=0)
    assert not answer.successful
    (answer,) = bench.set(confidence=0.9)
    assert answer.successful


def test_deactivating_ends_the_work_and_refuses_more(bench):
    running(bench)
    bench.node.trigger_deactivate()
    bench.state('cancelled')
    answer = bench.call('calibrate')
    assert not answer.success and 'not active' in answer.message
    bench.node.trigger_activate()
