# SPDX-License-Identifier: Apache-2.0
"""A tiny model folder, frames that fit it, and the shipped contract."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / 'policies'))

from tiny_vla import observe, random_net, tiny_checkpoint  # noqa: E402

from quantvla_ros.calibration.frames_file import write_frames  # noqa: E402
from quantvla_ros.contract import load_contract  # noqa: E402
from quantvla_ros.policies.base import PolicySettings  # noqa: E402
from quantvla_ros.policies.libero_checkpoint import write_checkpoint  # noqa: E402
from quantvla_ros.policies.libero_panda import LiberoVla  # noqa: E402


@pytest.fixture(scope='session')
def contract():
    return load_contract('libero_panda')


@pytest.fixture(scope='session')
def observations(contract):
    return [observe(contract, seed=seed) for seed in range(12)]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / 'model'
    write_checkpoint(folder, random_net(), tiny_checkpoint())
    return folder


@pytest.fixture
def frames_path(tmp_path, observations):
    write_frames(tmp_path / 'frames.npz', observations)
    return tmp_path / 'frames.npz'


@pytest.fixture
def make_policy(model, contract):
    """Make a fresh policy of the tiny model, at any precision."""
    def make(**settings):
        settings.setdefault('model', str(model))
        return LiberoVla(contract, PolicySettings(**settings))

    return make
