# SPDX-License-Identifier: Apache-2.0
"""A model folder is whole or refused, with every reason."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vla import TINY, random_net, tiny_checkpoint

from quantvla_ros.policies.libero_checkpoint import (
    CheckpointError,
    read_checkpoint,
    write_checkpoint,
)


def rewrite(folder, change):
    """Change the weights and make the hash true again, so that only the change is wrong."""
    path = folder / 'model.safetensors'
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    settings = json.loads((folder / 'policy.json').read_text())
    settings['weights']['sha256'] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / 'policy.json').write_text(json.dumps(settings))


def test_what_was_written_is_read_back(folder):
    checkpoint, net = read_checkpoint(folder)
    original = random_net()
    assert checkpoint.config == TINY
    assert checkpoint.vocabulary.words == tiny_checkpoint().vocabulary.words
    statistics = tiny_checkpoint().statistics
    assert np.array_equal(checkpoint.statistics.action_std, statistics.action_std)
    for name, value in net.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, original.state_dict()[name].half().float()), name


def test_changed_weights_are_refused_by_their_hash(folder):
    path = folder / 'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match='its sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}'):
        read_checkpoint(folder)


def test_every_wrong_weight_is_listed_at_once(folder):
    def spoil(weights):
        del weights['backbone.norm.weight']
        weights['stranger'] = torch.zeros(3).half()
        weights['action.leave.bias'] = torch.zeros(9).half()
        weights['action.enter.bias'] = weights['action.enter.bias'].float()
        weights['vision.norm.weight'][0] = float('nan')

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(folder)
    for sentence in (
        'backbone.norm.weight is missing',
        'stranger is not part of the architecture',
        'action.leave.bias has shape (9,); expected (8,)',
        'action.enter.bias is torch.float32; expected torch.float16',
        'vision.norm.weight holds a value that is not finite',
    ):
        assert sentence in str(refusal.value)


def test_weights_that_are_no_safetensors_are_refused(folder):
    path = folder / 'model.safetensors'
    path.write_bytes(b'not weights')
    settings = json.loads((folder / 'policy.json').read_text())
    settings['weights']['sha256'] = hashlib.sha256(b'not weights').hexdigest()
    (folder / 'policy.json').write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match='not a safetensors file'):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda s: s.update(format=2), 'format is 2; this package reads 1'),
        (lambda s: s['architecture'].update(width=100), 'width is 100; expected a multiple of 64'),
        (lambda s: s['architecture'].update(colour=1), "unexpected keyword argument 'colour'"),
        (lambda s: s['architecture'].update(vocabulary=2), 'the architecture embeds 2'),
        (lambda s: s['statistics'].update(state_std=[1.0]), r'state_std has shape \(1,\)'),
        (lambda s: s['statistics'].update(state_std=[0.0] * 9), 'not positive'),
        (lambda s: s['statistics'].update(state_mean=[float('nan')] * 9), 'not finite'),
        (lambda s: s['statistics'].pop('action_mean'), 'action_mean'),
        (lambda s: s.pop('contract'), 'contract'),
    ],
)
def test_wrong_settings_are_refused_with_a_reason(folder, change, sentence):
    settings = json.loads((folder / 'policy.json').read_text())
    change(settings)
    (folder / 'policy.json').write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(folder)


@pytest.mark.parametrize('name', ['policy.json', 'model.safetensors'])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name} is missing'):
        read_checkpoint(folder)


def test_weights_too_large_for_float16_are_not_written(tmp_path):
    net = random_net()
    net.action.enter.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match='action.enter.weight is not finite in float16'):
        write_checkpoint(tmp_path, net, tiny_checkpoint())
    assert list(tmp_path.iterdir()) == []
