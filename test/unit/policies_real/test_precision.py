# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint on integer kernels: an artifact beside it is served by its name."""

import shutil

import numpy as np
import pytest

from quantvla_ros.bench.parity_case import CASES, SEED, relative_error
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.embedding import Int8Embedding
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import Provenance, write_artifact
from quantvla_ros.quant.convert import quantize_net
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme


@pytest.mark.parametrize('name', ['pi05_lerobot', 'groot_n15_isaac'])
def test_an_artifact_beside_a_checkpoint_is_served_by_its_name(name, folders, tmp_path):
    folder = shutil.copytree(folders(name), tmp_path / name)
    case = CASES[name]
    observation = case.observation()
    student = make_policy(case.policy, case.contract(), PolicySettings(model=str(folder)))
    exact = student.denoise(student.prepare(observation), SEED).positions
    layers = quantize_net(
        student.model, policy_sites(student.model), find_recipe('rtn'), parse_scheme('w8a8'),
        lambda: student.denoise(student.prepare(observation), SEED), blockwise=False,
    )
    student.model.embedding = Int8Embedding(student.model.embedding)  # as it is served
    expected = student.denoise(student.prepare(observation), SEED).positions
    write_artifact(folder / 'w8a8', layers, Provenance('', 'rtn', 'w8a8'))
    served = make_policy(case.policy, case.contract(),
                         PolicySettings(model=str(folder), precision='w8a8'))
    chunk = served.denoise(served.prepare(observation), SEED).positions
    count = sum(isinstance(module, QuantLinear) for module in served.model.modules())
    assert count == len(layers) > 20
    assert np.array_equal(chunk, expected)
    assert 0 < relative_error(chunk, exact) < 0.2


def test_a_precision_that_is_not_there_is_refused_with_those_that_are(folders):
    case = CASES['pi05_lerobot']
    with pytest.raises(ValueError, match='not one of float, bfloat16'):
        make_policy('pi05', case.contract(),
                    PolicySettings(model=str(folders('pi05_lerobot')), precision='w2a2'))
