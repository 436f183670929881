# SPDX-License-Identifier: Apache-2.0
"""Alpha and beta are found where they are put in, folded into scales, and taken back."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_vla import random_net

from quantvla_ros.calibration.pipeline import quantize_policy
from quantvla_ros.calibration.policy_runs import batches, chunks
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.matching import Factors, fit_factors, fold, logits
from quantvla_ros.quant.recipes import RECIPES, Matching
from quantvla_ros.quant.scheme import parse_scheme


@pytest.fixture
def scaled(make_policy):
    """A float policy, and its network with one head's logits and one output made too small."""
    policy = make_policy()
    student = copy.deepcopy(policy.net)
    with torch.no_grad():
        student.action.blocks[1].attn.q_proj.weight[64:128] /= 1.25
        student.action.blocks[1].mlp.down_proj.weight.zero_()
        policy.net.action.blocks[1].mlp.down_proj.weight.zero_()
        student.action.blocks[1].cross.o_proj.weight /= 1.1
    return policy, student


def fit(policy, student, observations, **how):
    parts = batches(policy, observations, batch=2)
    return fit_factors(policy.net, student, libero_vla_sites(policy.net), parts, Matching(**how))


@pytest.mark.parametrize('how', ['ratio', 'least_squares'])
def test_factors_that_were_taken_out_are_found(scaled, observations, how):
    found = fit(*scaled, observations, fit=how)
    assert found['action.blocks.1.attn'].alpha.tolist() == pytest.approx([1.0, 1.25], rel=0.01)
    assert found['action.blocks.1.cross'].beta == pytest.approx(1.1, rel=0.03)
    assert found['action.blocks.0.attn'].neutral


def test_confirmed_factors_are_those_that_help_other_frames(scaled, observations):
    found = fit(*scaled, observations, fit='least_squares', check=True)
    assert found['action.blocks.1.attn'].alpha[1] == pytest.approx(1.25, rel=0.01)
    assert found['action.blocks.0.cross'].neutral


def test_each_factor_can_be_left_out(scaled, observations):
    only_beta = fit(*scaled, observations, alpha=False)
    assert bool((only_beta['action.blocks.1.attn'].alpha == 1).all())
    only_alpha = fit(*scaled, observations, beta=False)
    assert only_alpha['action.blocks.1.cross'].beta == 1.0


def test_logits_of_shared_keys_are_those_of_each_head():
    drawn = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=drawn), torch.randn(2, 2, 5, 8, generator=drawn)
    found = logits(q, k).view(2, 4, 3, 5)
    torch.testing.assert_close(found[1, 3], q[1, 3] @ k[1, 1].T / 8**0.5)


@pytest.mark.parametrize('recipe', ['rtn', 'quantvla'])
def test_fold_scales_logits_and_output_and_leaves_without_a_trace(
    make_policy, observations, recipe
):
    policy = make_policy()
    sites = libero_vla_sites(policy.net)
    plain = replace(RECIPES[recipe], matching=None)
    layers = quantize_policy(
        policy, plain, parse_scheme('w8a8'), observations[:4], blockwise=False).layers
    site = sites.attentions[0]
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(3, sites.linear(site.q).in_features, generator=drawn)
    before = policy.net.get_submodule(site.q)(x), policy.net.get_submodule(site.o)(x)
    alpha = torch.tensor([1.2, 0.8], dtype=torch.float64)
    folded = fold(policy.net, sites, layers, {site.name: Factors(alpha, 1.1)})
    q, o = policy.net.get_submodule(site.q), policy.net.get_submodule(site.o)
    assert isinstance(q, QuantLinear)
    expected = before[0] * alpha.repeat_interleave(64).float()
    torch.testing.assert_close(q(x), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(o(x), before[1] * 1.1, rtol=2e-2, atol=2e-2)
    if site.q in layers:
        again = replace(folded[site.q], fold=None)
        assert torch.equal(QuantLinear(again)(x), before[0])


def test_neutral_factors_change_no_layer(make_policy, observations):
    policy = make_policy()
    sites = libero_vla_sites(policy.net)
    neutral = {s.name: Factors(torch.ones(s.heads).double(), 1.0) for s in sites.attentions}
    before = chunks(policy, observations[:2])
    assert fold(policy.net, sites, {}, neutral) == {}
    assert (chunks(policy, observations[:2]) == before).all()


def test_quantvla_keeps_action_attention_in_float_but_for_its_factors(make_policy, observations):
    policy = make_policy()
    result = quantize_policy(
        policy, RECIPES['quantvla'], parse_scheme('w4a4'), observations[:6], blockwise=False)
    inside = [name for name in result.layers if '.attn.' in name and name.startswith('action.')]
    assert all(result.layers[name].scheme.is_float for name in inside)
    assert random_net().config.action_layers == len(policy.net.action.blocks)
