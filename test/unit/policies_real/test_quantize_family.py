# SPDX-License-Identifier: Apache-2.0
"""From a published folder to an artifact beside it: streamed, bound, repeatable."""

import json
import shutil

import numpy as np
import pytest
import yaml

from quantvla_ros.bench.parity_case import CAMERAS, CASES, COMMANDED, MEASURED, SEED, TASK
from quantvla_ros.calibration import family
from quantvla_ros.calibration.frames_file import read_frames, write_frames
from quantvla_ros.cli import main
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant import stream
from quantvla_ros.quant.artifact import (
    ArtifactError,
    Provenance,
    read_artifact,
    read_provenance,
    write_artifact,
)
from quantvla_ros.quant.convert import quantize_net
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme

WEIGHTS = ('layers.safetensors', 'artifact.json')


def contract_file(name, folder):
    case = CASES[name]
    joints = list(COMMANDED[: case.commanded])
    path = folder / f'{name}.yaml'
    path.write_text(yaml.safe_dump({
        'contract': 1, 'robot': 'parity', 'policy': case.policy,
        'cameras': {camera: {'topic': camera, 'width': case.image, 'height': case.image}
                    for camera in CAMERAS},
        'joints': {'names': list(MEASURED)},
        'action': {'kind': 'absolute', 'joints': joints, 'horizon': case.horizon,
                   'rate_hz': 20.0},
        'controller': {'kind': 'forward_command', 'topic': 'commands', 'joints': joints},
        'model': json.loads(json.dumps(dict(case.model))),
    }))
    return path


def frames_file(name, folder, count=2):
    case, rng = CASES[name], np.random.default_rng(1)
    size = (case.image, case.image, 3)
    path = folder / f'{name}.npz'
    write_frames(path, [
        Observation({c: rng.integers(0, 256, size, dtype=np.uint8) for c in CAMERAS},
                    dict.fromkeys(CAMERAS, i), MEASURED, rng.normal(size=9), i, TASK)
        for i in range(count)
    ])
    return path


@pytest.fixture
def place(folders, tmp_path):
    """name -> (copy of the folder, its contract, some frames of its robot)."""

    def make(name):
        folder = shutil.copytree(folders(name), tmp_path / name)
        return folder, contract_file(name, tmp_path), frames_file(name, tmp_path)

    return make


def quantize(folder, *more):
    return main(['quantize', str(folder), *map(str, more)])


def served(name, folder, precision):
    case = CASES[name]
    settings = PolicySettings(model=str(folder), precision=precision)
    policy = make_policy(case.policy, case.contract(), settings)
    return policy, policy.denoise(policy.prepare(case.observation()), SEED).positions


@pytest.mark.parametrize('name', CASES)
def test_every_family_is_quantized_from_its_folder_and_served_by_the_artifact(name, place, capsys):
    folder, _, _ = place(name)
    assert quantize(folder, '--recipe', 'rtn', '--precision', 'w4a8') == 0
    said = capsys.readouterr().out
    assert 'peak memory of the whole process' in said
    assert 'GiB' in said
    policy, chunk = served(name, folder, 'rtn-w4a8')
    _, rounded = served(name, folder, 'w4a8')
    assert policy.origin == 'artifact rtn-w4a8'
    assert np.array_equal(chunk, rounded)


@pytest.mark.parametrize(('name', 'recipe'), [
    ('pi05_lerobot', 'onboard'), ('pi05_lerobot', 'quantvla'), ('groot_n15_isaac', 'gptq'),
    ('groot_n15_isaac', 'omega_qvla'), ('smolvla_lerobot', 'smoothquant'), ('openvla_hf', 'gptq'),
])
def test_frames_of_the_robot_calibrate_any_recipe_that_works_block_by_block(
        name, recipe, place, capsys):
    folder, contract, frames = place(name)
    assert quantize(folder, '--recipe', recipe, '--precision', 'w8a8', '--frames', frames,
                    '--contract', contract, '--out', folder / 'mine') == 0
    assert 'action error on held-out frames' in capsys.readouterr().out
    found = read_provenance(folder / 'mine')
    assert found.frames == read_frames(frames).sha256
    policy, chunk = served(name, folder, 'mine')
    _, exact = served(name, folder, 'float')
    assert sum(isinstance(m, QuantLinear) for m in policy.model.modules()) > 10
    assert np.abs(chunk - exact).max() < 0.4 * np.abs(exact).max()


@pytest.mark.parametrize('name', ['pi05_lerobot', 'groot_n15_isaac'])
def test_streaming_gives_the_layers_of_a_network_that_lies_in_memory(name, place):
    folder, contract, frames = place(name)
    quantize(folder, '--recipe', 'gptq', '--precision', 'w4a8', '--frames', frames,
             '--contract', contract, '--out', folder / 'streamed')
    case = CASES[name]
    whole = make_policy(case.policy, case.contract(), PolicySettings(model=str(folder)))
    fitted, _ = read_frames(frames).halves()

    def run():
        for index, observation in enumerate(fitted):
            whole.denoise(whole.prepare(observation), index)

    layers = quantize_net(whole.model, policy_sites(whole.model), find_recipe('gptq'),
                          parse_scheme('w4a8'), run)
    streamed = read_artifact(folder / 'streamed').layers
    assert set(streamed) == set(layers)
    for layer, other in ((streamed[name], layers[name]) for name in layers):
        assert layer.weight.data.equal(other.weight.data)
        assert layer.weight.scales.equal(other.weight.scales)


def test_the_same_folder_frames_and_seed_give_the_same_bytes(place):
    folder, contract, frames = place('pi05_lerobot')
    for out in ('a', 'b'):
        quantize(folder, '--recipe', 'gptq', '--frames', frames, '--contract', contract,
                 '--out', folder / out)
    for name in WEIGHTS:
        assert (folder / 'a' / name).read_bytes() == (folder / 'b' / name).read_bytes()


def test_at_no_time_are_two_blocks_in_float(place, monkeypatch):
    """Counted each time a finished layer is handed over: weights of linears that lie in memory."""
    folder, contract, frames = place('pi05_lerobot')
    held, sizes = [], []
    kept = stream.quantize_streamed

    def counting(net, sites, recipe, precision, take, frames, **more):
        sizes.extend(sum(s.parameters for s in sites.in_block(block)) for block in sites.blocks)
        def counted(name, layer):
            floats = [m for m in net.modules() if isinstance(m, stream.nn.Linear)
                      and not m.weight.is_meta]
            held.append(sum(m.weight.numel() for m in floats))
            take(name, layer)

        kept(net, sites, recipe, precision, counted, frames, **more)

    monkeypatch.setattr(family, 'quantize_streamed', counting)
    quantize(folder, '--recipe', 'gptq', '--frames', frames, '--contract', contract)
    assert 0 < max(held) <= max(sizes) < sum(sizes) / 4


def test_one_changed_shard_unbinds_the_artifact(place):
    folder, _, _ = place('groot_n15_isaac')
    quantize(folder, '--recipe', 'rtn', '--precision', 'w8a8')
    served('groot_n15_isaac', folder, 'rtn-w8a8')
    shard = sorted(folder.glob('model-*.safetensors'))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match='quantize this model again'):
        served('groot_n15_isaac', folder, 'rtn-w8a8')


def test_interruption_leaves_what_was_there(place, monkeypatch, capsys):
    folder, _, _ = place('smolvla_lerobot')
    quantize(folder, '--recipe', 'rtn', '--precision', 'w8a8')
    before = {p.name: p.read_bytes() for p in (folder / 'rtn-w8a8').iterdir()}
    names = sorted(p.name for p in folder.iterdir())
    original = stream.nearest_layer
    calls = iter(range(1000))

    def interrupted(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(stream, 'nearest_layer', interrupted)
    assert quantize(folder, '--recipe', 'rtn', '--precision', 'w8a8') == 130
    assert 'is as it was' in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (folder / 'rtn-w8a8').iterdir()} == before
    assert sorted(p.name for p in folder.iterdir()) == names


def test_what_a_killed_run_left_is_removed_by_the_next(place):
    folder, _, _ = place('smolvla_lerobot')
    dead = folder / '.rtn-w8a8.99999999'
    dead.mkdir()
    quantize(folder, '--recipe', 'rtn', '--precision', 'w8a8')
    assert not dead.exists()


@pytest.mark.parametrize(('more', 'sentence'), [
    (['--recipe', 'gptq'], 'needs calibration frames'),
    (['--recipe', 'qvla'], 'asks what the action feels'),
    (['--recipe', 'magic'], 'known are'),
    (['--recipe', 'rtn', '--precision', 'float'], 'leaves nothing to quantize'),
])
def test_what_cannot_be_done_is_refused_with_a_sentence(more, sentence, place, capsys):
    folder, _, _ = place('pi05_lerobot')
    assert quantize(folder, *more) == 2
    assert sentence in capsys.readouterr().err


def test_frames_without_a_contract_are_refused(place, capsys):
    folder, _, frames = place('pi05_lerobot')
    assert quantize(folder, '--recipe', 'gptq', '--frames', frames) == 2
    assert '--contract' in capsys.readouterr().err


def test_an_artifact_that_names_a_layer_the_network_has_not_is_refused(place):
    folder, _, _ = place('pi05_lerobot')
    quantize(folder, '--recipe', 'rtn', '--precision', 'w8a8')
    made = read_artifact(folder / 'rtn-w8a8')
    layers = {f'nowhere.{name}': layer for name, layer in made.layers.items()}
    write_artifact(folder / 'odd', layers, Provenance(made.provenance.checkpoint, 'rtn', 'w8a8'))
    with pytest.raises(ArtifactError, match='not a linear of this policy'):
        served('pi05_lerobot', folder, 'odd')


