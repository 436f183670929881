# SPDX-License-Identifier: Apache-2.0
"""Model folders in their real formats, rebuilt from stored comparisons."""

from pathlib import Path

import pytest
import torch

from quantvla_ros.bench.random_weights import read_fixture, rebuild

FIXTURES = Path(__file__).parents[2] / 'fixtures' / 'policies'


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """Threads that wait for each other on a busy machine cost more than small networks do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """name -> folder; made once, not to be changed by a test."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            rebuild(read_fixture(FIXTURES / f'{name}.json'), made[name])
        return made[name]

    return folder


@pytest.fixture
def stored():
    """name -> the stored comparison."""
    return lambda name: read_fixture(FIXTURES / f'{name}.json')
