# SPDX-License-Identifier: Apache-2.0
"""Full-size networks on the meta device: parameters and layers of the published checkpoints."""

from collections import Counter

import pytest
import torch

from quantvla_ros.policies.groot_n15 import GrootConfig, GrootN15
from quantvla_ros.policies.pi0 import Pi0, Pi0Config
from quantvla_ros.policies.pi05 import Pi05, Pi05Config
from quantvla_ros.policies.savings import drop_unused
from quantvla_ros.policies.sites import policy_sites


def on_meta(make, config):
    with torch.device('meta'):
        return make(config)


@pytest.fixture(scope='module')
def pi05():
    return on_meta(Pi05, Pi05Config())


@pytest.fixture(scope='module')
def groot():
    return on_meta(GrootN15, GrootConfig())


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def groups(model):
    """group -> (linears, weights without biases)."""
    linears = policy_sites(model).linears
    sizes = Counter()
    for site in linears:
        sizes[site.group] += site.in_features * site.out_features
    return {g: (sum(s.group == g for s in linears), n) for g, n in sizes.items()}


def shapes(model, group):
    return Counter((s.out_features, s.in_features) for s in policy_sites(model).in_groups([group]))


def test_pi05_has_the_published_parameters_without_its_heads_over_words(pi05):
    heads_over_words = 257152 * (2048 + 1024)
    assert count(pi05) == 3353433872
    assert round((count(pi05) + heads_over_words) / 1e6, 1) == 4143.4
    assert round(count(pi05) * 2 / 2**30, 3) == 6.246


def test_pi05_has_the_published_layers(pi05):
    found = groups(pi05)
    assert found['backbone_attention'] == (72, 169869312)
    assert found['backbone_mlp'] == (54, 1811939328)
    assert found['action_attention'] == (72, 84934656)
    assert found['action_mlp'] == (54, 226492416)
    assert found['modulation'] == (37, 37 * 3072 * 1024)
    assert found['vision'][0] == 162
    assert found['projector'] == (1, 2048 * 1152)
    assert shapes(pi05, 'backbone_mlp') == {(16384, 2048): 36, (2048, 16384): 18}
    assert shapes(pi05, 'action_attention') == {
        (2048, 1024): 18, (256, 1024): 36, (1024, 2048): 18}


def test_the_vision_tower_has_the_published_parameters(pi05):
    assert round(count(pi05.vision) / 1e6, 2) == 412.44


def test_pi0_has_the_published_parameters():
    assert round(count(on_meta(Pi0, Pi0Config())) / 1e6, 1) == 3238.0
    assert round(count(on_meta(Pi0, Pi0Config())) * 2 / 2**30, 3) == 6.031


def test_groot_has_the_published_parameters(groot):
    one = sum(count(getattr(groot, part))
              for part in ('state_encoder', 'action_encoder', 'action_decoder'))
    pooling_head = 1152 + 4 * (1152 * 1152 + 1152) + 2 * 1152 + 2 * 1152 * 4304 + 4304 + 1152
    assert round(one / 1e6, 1) == 9.9
    assert round((count(groot) + 31 * one + pooling_head) / 1e6, 1) == 2413.5


def test_groot_has_the_published_layers(groot):
    found = groups(groot)
    assert found['backbone_attention'] == (48, 150994944)
    assert found['backbone_mlp'] == (36, 452984832)
    assert (found['action_attention'][0], found['action_mlp'][0]) == (64, 32)
    assert round(found['action_attention'][1] / 1e6, 2) == 163.58
    assert round(found['action_mlp'][1] / 1e6, 2) == 301.99
    assert found['modulation'][0] == 16
    assert shapes(groot, 'action_attention') == {(1536, 1536): 48, (1536, 2048): 16}


def test_quantvla_finds_its_180_and_116_layers(pi05, groot):
    targets = ['backbone_attention', 'backbone_mlp', 'action_mlp']
    assert len(policy_sites(pi05).in_groups(targets)) == 180
    assert len(policy_sites(groot).in_groups(targets)) == 116


def test_omega_finds_its_252_and_180_layers(pi05, groot):
    targets = ['backbone_attention', 'backbone_mlp', 'action_attention', 'action_mlp']
    assert len(policy_sites(pi05).in_groups(targets)) == 252
    assert len(policy_sites(groot).in_groups(targets)) == 180


def test_pi05_folds_alpha_only_in_the_rows_of_the_experts_queries(pi05):
    sites = policy_sites(pi05).attentions
    assert len(sites) == 18
    assert all(site.q.startswith('expert.layers.') and site.alpha_foldable for site in sites)
    assert {(site.heads, site.head_dim) for site in sites} == {(8, 256)}


def test_nothing_folds_where_heads_are_normed(groot):
    normed = [s for s in policy_sites(groot).attentions if s.name.startswith('backbone')]
    acting = [s for s in policy_sites(groot).attentions if s.name.startswith('blocks')]
    assert len(normed) == 12
    assert not any(s.alpha_foldable or s.beta_foldable for s in normed)
    assert len(acting) == 16
    assert all(s.alpha_foldable and s.beta_foldable for s in acting)


def test_blocks_stand_in_the_order_of_the_flow(pi05, groot):
    blocks = policy_sites(pi05).blocks
    assert len(blocks) == 27 + 18 + 18
    assert blocks[0] == 'vision.layers.0'
    assert blocks[-1] == 'expert.layers.17'
    assert len(policy_sites(groot).blocks) == 27 + 12 + 4 + 16


def test_dropped_layers_are_not_sites():
    model = on_meta(Pi05, Pi05Config())
    savings = drop_unused(model, steps=10)
    sites = policy_sites(model)
    assert sites.in_groups(['modulation']) == ()
    assert len(sites.in_groups(['backbone_mlp'])) == 51
    assert sum(s.parameters for s in savings) == 3353433872 - count(model)
