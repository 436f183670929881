# SPDX-License-Identifier: Apache-2.0
"""The papers' memory tables, recounted to a hundredth of a GiB, and what is really held."""

import pytest

from quantvla_ros.policies.full_size import full_size, served
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.memory import GIB, MIB, PLANS, find_plan, held, published_counts
from quantvla_ros.quant.sites import LinearSite


@pytest.fixture(scope='module')
def counts():
    found = {}
    for family in ('pi05', 'groot_n15'):
        for count in published_counts(family, policy_sites(full_size(family))):
            found[family, count.name] = count
    return found


@pytest.mark.parametrize(('family', 'name', 'gib'), [
    ('pi05', 'QuantVLA, nothing (FP16)', 4.27),
    ('pi05', 'QuantVLA, LLM', 1.58),
    ('pi05', 'QuantVLA, LLM + DiT', 1.17),
    ('pi05', 'QuantVLA, LLM + DiT MLP', 1.28),
    ('groot_n15', 'QuantVLA, nothing (FP16)', 1.99),
    ('groot_n15', 'QuantVLA, LLM + DiT MLP', 0.90),
    ('groot_n15', 'QuantVLA, LLM + DiT', 0.72),
])
def test_quantvla_is_counted_to_a_hundredth(counts, family, name, gib):
    assert round(counts[family, name].counted / GIB, 2) == gib


def test_omega_is_counted_to_a_hundredth(counts):
    assert round(counts['pi05', 'Omega-QVLA, LLM + DiT'].counted / GIB, 2) == 1.19
    assert abs(counts['pi05', 'Omega-QVLA, LLM + DiT'].residual) < 0.01
    omega = counts['groot_n15', 'Omega-QVLA, LLM + DiT'].counted / MIB
    assert abs(omega - 586) < 1.5


def test_what_is_not_explained_is_stated(counts):
    assert round(counts['pi05', 'QuantVLA, DiT'].residual, 3) == 0.013
    assert round(counts['groot_n15', 'QuantVLA, nothing (FP16)'].residual, 3) == -0.027


def test_pi05_with_everything_quantized_stays_below_the_goal():
    sites, rest, _ = served('pi05')
    for name in ('w4a8', 'w4a4', 'w4a8-vision8'):
        assert sum(held(sites, rest, find_plan(name)).values()) <= 2.1 * GIB


def test_nothing_is_left_out_of_what_is_held():
    sites, rest, _ = served('pi05')
    whole = sum(held(sites, rest, PLANS['float']).values())
    numbers = (sum(s.parameters for s in sites.linears) + rest.others + rest.tables + rest.cache
               + rest.embedding[0] * rest.embedding[1])
    assert whole == 2 * numbers


def test_one_layer_is_counted_by_hand():
    from quantvla_ros.quant.memory import layer_bytes, rotated_bytes

    site = LinearSite('x', 'vision', 256, 128, True)
    assert layer_bytes(site, 4, 128) == 128 * 128 + 4 * 128 * 2 + 2 * 128
    assert layer_bytes(site, 8, 0) == 128 * 256 + 4 * 128 + 2 * 128
    rotations = 4 * 64 * 64 * (4 + 2)
    assert rotated_bytes(site, 64, permuted=True) == (
        128 * 128 + 2 * 128 + rotations + 4 * 256 + 2 * 128)


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='known are float'):
        find_plan('w3a3')
