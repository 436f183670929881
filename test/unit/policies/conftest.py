# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the policy tests: a tiny model folder and the shipped contract."""

import pytest
from tiny_vla import random_net, tiny_checkpoint

from quantvla_ros.contract import load_contract
from quantvla_ros.policies.libero_checkpoint import write_checkpoint


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, random_net(), tiny_checkpoint())
    return tmp_path


@pytest.fixture(scope='session')
def contract():
    return load_contract('libero_panda')
