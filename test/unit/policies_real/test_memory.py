# SPDX-License-Identifier: Apache-2.0
"""The papers' memory tables, recounted to a hundredth of a GiB, and what is really held."""

import functools

import pytest

from quantvla_ros.cli import main
from quantvla_ros.policies.full_size import STEPS, full_size, served
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.layout import FULL_STACK
from quantvla_ros.quant.memory import GIB, MIB, PLANS, PUBLISHED, find_plan, held, published_counts
from quantvla_ros.quant.recipe_memory import recipe_memory
from quantvla_ros.quant.recipes import RECIPES
from quantvla_ros.quant.scheme import parse_scheme
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
    whole = sum(held(sites, rest, PUBLISHED).values())
    on_disk = sum(held(sites, rest, PLANS['float']).values())
    numbers = (sum(s.parameters for s in sites.linears) + rest.others + rest.tables + rest.cache
               + rest.embedding[0] * rest.embedding[1])
    assert whole == 2 * numbers
    assert whole - on_disk == 2 * rest.embedding[0] * rest.embedding[1]


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


@pytest.fixture(scope='module')
def recipes():
    """family -> name -> both ways of counting it at w4a8."""

    @functools.cache
    def of(family):
        whole, (sites, rest, _) = policy_sites(full_size(family)), served(family)
        return {name: recipe_memory(family, recipe, parse_scheme('w4a8'), whole, sites, rest,
                                    STEPS[family]) for name, recipe in RECIPES.items()}

    return of


@pytest.mark.parametrize(('family', 'name', 'gib'), [
    ('pi05', 'quantvla', 1.28), ('groot_n15', 'quantvla', 0.90), ('pi05', 'omega_qvla', 1.19),
])
def test_a_recipe_is_counted_as_its_paper_does(recipes, family, name, gib):
    assert round(recipes(family)[name].papers / GIB, 2) == gib


@pytest.mark.parametrize('family', ['pi05', 'groot_n15', 'smolvla'])
def test_what_a_recipe_holds_is_more_than_papers_count(recipes, family):
    """Papers leave out vision, projector, heads and tables, whatever the recipe."""
    for found in recipes(family).values():
        assert found.total > found.papers > 0
        assert found.held['codes and bias'] > 0


def test_rotations_cost_what_their_blocks_hold(recipes):
    plain, rotated = recipes('pi05')['rtn'], recipes('pi05')['omega_qvla']
    sites = served('pi05')[0].in_groups(FULL_STACK)
    expected = sum(4 * s.in_features * 64 + 8 * s.in_features for s in sites)
    assert plain.held['transforms'] == 0
    assert rotated.held['transforms'] == expected


def test_the_command_prints_both_ways_for_a_recipe(capsys):
    assert main(['memory', 'pi05', '--recipe', 'onboard']) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.split('\n') if line.strip().startswith('onboard'))
    assert len(line.split()) == 3
    assert 'as papers count' in said and 'held in all' in said


def test_an_unknown_name_is_refused_with_the_recipes_too(capsys):
    assert main(['memory', 'pi05', '--recipe', 'magic']) == 2
    assert 'onboard' in capsys.readouterr().err
