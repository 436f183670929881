# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that change what serves: one robot and one node, its commands tapped."""


import pytest
import torch
from fault_policies import SweepPolicy
from precise_policy import PrecisePolicy
from robot import Robot
from served import Served, make_contract

from quantvla_ros.bench.swap_node import Tap
from quantvla_ros.bench.wire_checker import WireChecker
from quantvla_ros.policies.base import POLICIES
from quantvla_ros.quant.artifact import Provenance, write_artifact
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.pack import absmax_scale, packed, quantize
from quantvla_ros.quant.scheme import parse_scheme

# Wide, for a machine that does much else: the robot of the tests may be late, the node may not.
PATIENT = {
    'freshness.camera_max_age_s': 10.0, 'freshness.camera_max_silence_s': 10.0,
    'freshness.joints_max_age_s': 10.0, 'freshness.joints_max_silence_s': 10.0,
    'freshness.frozen_s': 0.0, 'freshness.clock_jump_s': 0.0, 'inference.timeout_s': 20.0,
    'guard.max_tick_gap_s': 5.0, 'drift.every': 1,
}
DEFAULTS = {
    'swap__mode': 'beside', 'swap__good_chunks': 1, 'gate__override': False,
    'gate__needs_evidence': False, 'shadow': '', 'calibration': '',
}
SETTLED = 5  # commands after which a tap that came amidst a motion knows its speed
OUT_OF_BOUNDS = {'action_error_mrad': 9.0, 'other_seed_mrad': 1.0}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A model folder with a good, a damaged-to-be and an inaccurate artifact."""
    folder = tmp_path_factory.mktemp('model')
    for name, measured in (
            ('good', {}), ('broken', {}), ('torn', {}), ('inaccurate', OUT_OF_BOUNDS)):
        write_artifact(folder / name, {'a': make_layer()},
                       Provenance('', 'rtn', 'w8a8', measured=measured))
    return folder


def make_layer():
    scheme = parse_scheme('w8a8')
    x = torch.eye(64)
    scale = absmax_scale(x, 8, scheme.weight)
    codes = quantize(x, scale, 8, scheme.weight)
    return QuantizedLayer(scheme, packed(codes, scale, 8, scheme.weight))


@pytest.fixture(scope='module')
def pair(graph, tmp_path_factory, model):
    """One robot and one node for the whole module; no claim here rests on fresh inputs."""
    POLICIES.setdefault('precise', 'precise_policy:PrecisePolicy')
    SweepPolicy.mode = 'good'
    path = make_contract(tmp_path_factory.mktemp('c'), 'forward_command')
    path.write_text(path.read_text().replace('execute: 3', 'execute: 6'))
    robot = Robot().start()
    served = Served(path, policy='precise', model=str(model), precision='fine', **PATIENT)
    served.tap = None
    yield robot, served
    PrecisePolicy.gate.set()
    served.close()
    robot.stop()


def calm():
    """Policies break no more and need no room."""
    PrecisePolicy.gate.set()
    PrecisePolicy.loads.clear()
    PrecisePolicy.needs, PrecisePolicy.largest = 0, 1.0


@pytest.fixture
def robot(pair):
    calm()
    return pair[0]


@pytest.fixture
def served(robot, pair):
    """The node, unconfigured."""
    served = pair[1]
    for transition in ('deactivate', 'cleanup'):
        if served.node.state_label != 'unconfigured':
            served.do(getattr(served.node, f'trigger_{transition}'))
    assert robot.set_parameters(precision='fine', **DEFAULTS).successful
    return served


@pytest.fixture
def moving(robot, pair):
    """The node, up and moving at 'fine'."""
    served = pair[1]
    if served.node.state_label == 'unconfigured':
        robot.set_parameters(precision='fine', **DEFAULTS)
        assert served.do(served.node.trigger_configure).name == 'SUCCESS'
    if served.node.state_label == 'inactive':
        assert served.do(served.node.trigger_activate).name == 'SUCCESS'
    guard = served.node.serving.guard
    if guard.state.value != 'running':
        robot.wait(lambda: guard.at_rest, 'rest')
        assert robot.call('enable').success
    assert robot.set_parameters(precision='fine', **DEFAULTS).successful
    swap = served.node.serving.exchange.swap
    robot.wait(lambda: swap.settled and robot.status['precision'] == 'fine', 'fine')
    tap, chunks = tap_of(served), len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks and tap.count > SETTLED, 'a chunk')
    calm()
    served.since = tap.count, guard.counts['starts'], swap.counts.copy()
    return served


def tap_of(served):
    """Note every command of what serves now where it leaves: the robot may lose some."""
    serving = served.node.serving
    if served.tap is None or served.tap.serving is not serving:
        served.tap = Tap(serving)
        serving.send = served.tap.publish
    return served.tap


def value(served, name='precision'):
    return served.node.get_parameter(name).value


def settle(robot, served, precision, result):
    """Wait until a swap has come to its end, and return what ~/status says of it."""
    def done():
        swap = robot.status['swap']
        last = (swap or {}).get('last') or {}
        return (last.get('result') == result and swap['stage'] == 'active'
                and robot.status['precision'] == precision)

    counts = served.node.serving.exchange.swap.counts
    robot.wait(lambda: counts[result] > served.since[2][result] and done(),
               f'{result} and {precision} runs')
    robot.wait(lambda: value(served) == precision, 'the parameter says it')
    return robot.swap('last')


def assert_no_gap(robot, served):
    """The arm never stopped, and no command broke a limit of position, speed or acceleration."""
    guard, (first, starts, _) = served.node.serving.guard, served.since
    assert guard.state.value == 'running'
    assert guard.counts['starts'] == starts, 'the arm never stopped'
    tap, limiter = served.tap, served.node.serving.limiter
    checker = WireChecker(limiter.lower, limiter.upper, limiter.velocity, limiter.acceleration)
    count = tap.count
    broken = checker.judge(tap.times[:count], tap.positions[:count])[first:]
    assert broken, 'commands leave'
    assert not any(broken), 'no leap where commands leave for the wire'


