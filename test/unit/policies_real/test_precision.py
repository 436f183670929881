# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints on integer kernels: rounded while they are read, or from an artifact."""

import shutil

import numpy as np
import pytest
import torch

from quantvla_ros.bench.parity_case import CASES, SEED, relative_error
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.rtc import prefix_guidance
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.artifact import ArtifactError, Provenance, write_artifact
from quantvla_ros.quant.convert import quantize_net
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme

FLOWS = ['pi05_lerobot', 'pi0_lerobot', 'groot_n15_isaac', 'smolvla_lerobot']


@pytest.fixture
def served(folders):
    """name, precision, folder -> the policy."""

    def make(name, precision='float', folder=None):
        case = CASES[name]
        settings = PolicySettings(model=str(folder or folders(name)), precision=precision)
        return make_policy(case.policy, case.contract(), settings)

    return make


def chunk(policy, name, prefix=None):
    return policy.denoise(policy.prepare(CASES[name].observation()), SEED, prefix)


@pytest.mark.parametrize('precision', ['w8a8', 'w4a8'])
@pytest.mark.parametrize('name', CASES)
def test_without_an_artifact_a_scheme_is_rounded_to_nearest_while_it_is_read(
        name, precision, served):
    """The same chunk, bit for bit, as rounding the float network that lies in memory."""
    student = served(name)
    run = lambda: chunk(student, name)  # noqa: E731
    layers = quantize_net(student.model, policy_sites(student.model), find_recipe('rtn'),
                          parse_scheme(precision), run, blockwise=False)
    policy = served(name, precision)
    count = sum(isinstance(module, QuantLinear) for module in policy.model.modules())
    assert count == len(layers) > 20
    assert policy.origin == 'rounded to nearest while it was read'
    assert np.array_equal(chunk(policy, name).positions, run().positions)


@pytest.mark.parametrize('name', [*FLOWS, 'openvla_oft'])  # OpenVLA's words may flip
def test_eight_bits_stay_close_to_float(name, served):
    exact = chunk(served(name), name).positions
    assert relative_error(chunk(served(name, 'w8a8'), name).positions, exact) < 0.2


@pytest.mark.parametrize('name', FLOWS)
def test_guidance_holds_the_chunk_to_what_is_executed_on_integers_too(name, served):
    """Closed form, so no kernel needs a gradient: frozen steps end on the running chunk."""
    policy = served(name, 'w8a8')
    free = chunk(policy, name)
    moved = free.positions + 0.3
    prefix = type(free)(free.joint_names, moved, free.stamp_ns, free.step_dt_s)
    guided = chunk(policy, name, prefix)
    case = CASES[name]
    weights = prefix_guidance(prefix, 0, case.contract().action, len(moved),
                              lambda targets: targets).weights
    frozen = int((weights == 1).sum())
    apart = np.abs(guided.positions - moved)[:frozen].max()
    assert frozen >= 3
    assert apart < 0.2 * np.abs(free.positions - moved)[:frozen].max()
    assert np.array_equal(guided.positions, chunk(policy, name, prefix).positions)


def test_an_artifact_of_other_weights_is_refused(folders, served, tmp_path):
    folder = shutil.copytree(folders('pi05_lerobot'), tmp_path / 'pi05')
    write_artifact(folder / 'w8a8', {}, Provenance('0' * 64, 'rtn', 'w8a8'))
    with pytest.raises(ArtifactError, match='made for checkpoint 000000000000'):
        served('pi05_lerobot', 'w8a8', folder)


def test_a_precision_that_is_not_there_is_refused_with_those_that_are(served):
    with pytest.raises(ValueError, match='not one of float, bfloat16'):
        served('pi05_lerobot', 'w2a2')


@pytest.mark.parametrize('name', CASES)
def test_no_float_weight_of_a_quantized_layer_is_held(name, served):
    policy = served(name, 'w8a8')
    quantized = {name for name, m in policy.model.named_modules() if isinstance(m, QuantLinear)}
    held = {n.rpartition('.')[0] for n, p in policy.model.named_parameters() if p.ndim == 2}
    assert not quantized & held
    assert 'embedding' not in held
    assert not any(p.is_meta for p in policy.model.parameters())
    assert all(p.dtype == torch.float32 for p in policy.model.parameters())
