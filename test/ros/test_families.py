# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints over real DDS: a folder named in `model`, and the node serves it.

Full architectures at small dimensions with random weights, from their real folder formats.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from robot import Body, Robot, describe
from served import Served

from quantvla_ros.bench.parity_case import CAMERAS, CASES, COMMANDED, MEASURED
from quantvla_ros.bench.random_weights import read_fixture, rebuild
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.quant.linear import QuantLinear

pytestmark = pytest.mark.ros

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'policies'
CHUNKS = 2
STEPS = 3  # of denoising
PATIENT = {'inference.timeout_s': 30.0, 'player.seam': 'prefix', 'warmup': 1, 'steps': STEPS}


@pytest.fixture(scope='module', params=['pi05_lerobot', 'groot_n15_isaac', 'smolvla_lerobot'])
def family(request, graph, tmp_path_factory):
    """The folder of a checkpoint, the contract of its robot, and that robot."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    rebuild(read_fixture(FIXTURES / f'{request.param}.json'), folder / 'model')
    joints = list(COMMANDED)
    # the checkpoint's numbers taken for degrees: random targets then lie close together
    model = {**{key: dict(value) for key, value in case.model.items()}}
    model['action'] = {**model.get('action', {}), 'units': 'deg'}
    contract = folder / 'contract.yaml'
    contract.write_text(yaml.safe_dump({
        'contract': 1, 'robot': 'family', 'policy': case.policy,
        'instruction': {'topic': 'instruction', 'default': 'pick up the black bowl'},
        'cameras': {name: {'topic': f'{name}/image', 'width': case.image, 'height': case.image,
                           'max_age_s': 30.0, 'max_silence_s': 30.0} for name in CAMERAS},
        'joints': {'topic': 'joint_states', 'names': list(MEASURED), 'max_age_s': 30.0,
                   'max_silence_s': 30.0},
        'action': {'kind': 'absolute', 'joints': joints, 'horizon': case.horizon, 'execute': 1,
                   'rate_hz': 2.0},
        'controller': {'kind': 'forward_command', 'topic': 'arm/commands', 'joints': joints,
                       'rate_hz': 50.0},
        'model': model,
    }))
    body = Body(MEASURED, COMMANDED, CAMERAS, (case.image, case.image),
                describe(dict.fromkeys(MEASURED, (-3.0, 3.0, 3.0))))
    robot = Robot(body=body).start()
    yield folder / 'model', contract, robot
    robot.stop()


def record(policy, kept):
    """Keep what the node asks of its policy: observation, seed, prefix."""
    prepare, denoise = policy.prepare, policy.denoise

    def prepared(observation):
        kept.append([observation])
        return prepare(observation)

    def denoised(context, seed, prefix=None):
        kept[-1] += [seed, prefix]
        return denoise(context, seed, prefix)

    policy.prepare, policy.denoise = prepared, denoised


@pytest.mark.parametrize('precision', ['float', 'w8a8', 'w4a8'])
def test_node_serves_a_folder_and_its_chunks_are_the_policys_own(family, precision):
    folder, contract_path, robot = family
    contract = load_contract(contract_path)
    served = Served(contract_path, model=str(folder), precision=precision, **PATIENT)
    kept, first = [], len(robot.chunks)
    try:
        assert served.do(served.node.trigger_configure).name == 'SUCCESS'
        policy = served.node.serving.policy
        integer = sum(isinstance(module, QuantLinear) for module in policy.model.modules())
        assert (integer > 20) == (precision != 'float')
        record(policy, kept)
        assert served.do(served.node.trigger_activate).name == 'SUCCESS'
        robot.wait(lambda: len(robot.chunks) >= first + CHUNKS, 'chunks of the policy')
    finally:
        served.close()
    settings = PolicySettings(model=str(folder), precision=precision, steps=STEPS)
    own = make_policy(contract.policy, contract, settings)
    asked = [entry for entry in kept if len(entry) == 3]
    expected = {own.denoise(own.prepare(o), seed, prefix).positions.tobytes()
                for o, seed, prefix in asked}
    heard = [np.array([point.positions for point in message.points])
             for message in robot.chunks[first:]]
    assert len({chunk.tobytes() for chunk in heard}) >= CHUNKS
    assert all(chunk.tobytes() in expected for chunk in heard)
    assert any(prefix is not None for _, _, prefix in asked), 'no chunk was guided'


def test_chunks_depend_on_what_the_node_was_given(family):
    """A comparison with a policy that ignores its inputs would prove nothing."""
    folder, contract_path, _ = family
    contract = load_contract(contract_path)
    policy = make_policy(contract.policy, contract, PolicySettings(model=str(folder)))
    case = next(case for case in CASES.values() if case.policy == contract.policy)
    observation = case.observation()
    moved = replace(observation, joint_positions=observation.joint_positions + 0.2)
    one, same, other = (
        policy.denoise(policy.prepare(o), 0).positions for o in (observation, observation, moved))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, policy.denoise(policy.prepare(observation), 1).positions)


def test_an_incomplete_folder_is_refused_at_configure(family, monkeypatch, tmp_path):
    from quantvla_ros.nodes.lifecycle import ManagedNode

    folder, contract_path, _ = family
    said = []
    monkeypatch.setattr(ManagedNode, '_say_once', lambda self, text: said.append(text))
    for path in folder.iterdir():
        if path.suffix != '.safetensors' and path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    served = Served(contract_path, model=str(tmp_path), **PATIENT)
    try:
        assert served.do(served.node.trigger_configure).name == 'FAILURE'
    finally:
        served.close()
    assert 'model.safetensors' in said[-1] or 'lacks model-' in said[-1]
