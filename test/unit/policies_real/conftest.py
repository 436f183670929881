# SPDX-License-Identifier: Apache-2.0
"""Model folders in their real formats, rebuilt from stored comparisons."""

from pathlib import Path

import pytest

from quantvla_ros.bench.random_weights import read_fixture, rebuild

FIXTURES = Path(__file__).parents[2] / 'fixtures' / 'policies'


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
