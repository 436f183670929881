# SPDX-License-Identifier: Apache-2.0
"""The random checkpoint that memory is measured on is a published one in all but its values."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from quantvla_ros.bench.full_checkpoint import CONTRACTS, SHAPES, Drawn, write_checkpoint
from quantvla_ros.bench.parity_case import CAMERAS, CASES, COMMANDED, MEASURED
from quantvla_ros.cli import main
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.checkpoints import DictSource
from quantvla_ros.policies.folders import Folder
from quantvla_ros.policies.networks import network

FORMATS = {'pi05': 'lerobot', 'groot_n15': 'groot'}
POOLING_HEAD = 15238352  # of GR00T's vision tower: stored, never built, left out here


@pytest.mark.parametrize(('family', 'millions'), [('pi05', 4143.4), ('groot_n15', 2413.5)])
def test_it_has_the_tensors_of_the_published_checkpoint(family, millions):
    shapes = SHAPES[family]()
    empty = {name: torch.empty(shape, device='meta') for name, shape in shapes.items()}
    network(Folder(Path(), family, FORMATS[family], {}, DictSource(empty)))  # refuses otherwise
    count = sum(math.prod(shape) for shape in shapes.values())
    count += POOLING_HEAD if family == 'groot_n15' else 0
    assert round(count / 1e6, 1) == millions
    assert load_contract(CONTRACTS[family]).policy == family


def test_its_values_are_finite_random_and_scaled_by_fan_in():
    drawn = Drawn({'m': (300, 400), 'v': (50,)})
    matrix = drawn.read('m')
    assert matrix.dtype == torch.bfloat16
    assert abs(float(matrix.float().std()) * 20 - 1) < 0.05
    assert torch.equal(matrix, Drawn({'m': (300, 400)}).read('m'))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=10**9))
    with pytest.raises(ValueError, match='GB are needed'):
        write_checkpoint('pi05', tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_measuring_tells_what_the_whole_process_held(folders, tmp_path, capfd):
    case = CASES['pi05_lerobot']
    contract = tmp_path / 'contract.yaml'
    contract.write_text(yaml.safe_dump({
        'contract': 1, 'robot': 'r', 'policy': 'pi05',
        'instruction': {'topic': 'instruction', 'default': 'pick up'},
        'cameras': {name: {'topic': name, 'width': 28, 'height': 28} for name in CAMERAS},
        'joints': {'names': list(MEASURED)},
        'action': {'kind': 'absolute', 'joints': list(COMMANDED), 'horizon': 10, 'rate_hz': 20.0},
        'controller': {'kind': 'forward_command', 'topic': 'c', 'joints': list(COMMANDED)},
        'model': {key: dict(value) for key, value in case.model.items()},
    }))
    assert main(['memory', 'pi05', '--measure', '--folder', str(folders('pi05_lerobot')),
                 '--contract', str(contract)]) == 0
    said = capfd.readouterr().out
    assert 'peak memory of the whole process' in said  # of quantizing
    assert 'served one chunk at w4a8: peak of the whole process 0.' in said
    assert 'goal: at most 2.1 GiB held in all: met' in said
