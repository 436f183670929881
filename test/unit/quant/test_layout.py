# SPDX-License-Identifier: Apache-2.0
"""Layouts name every linear; the allocation spends bits where the action feels them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.quant.layout import (
    FULL_STACK,
    SELECTIVE,
    lay_out,
    layout_bytes,
    override,
    raise_inputs,
    sensitive_sites,
    weight_bytes,
)
from quantvla_ros.quant.scheme import FLOAT, parse_scheme
from quantvla_ros.quant.sensitivity import (
    Unit,
    bit_costs,
    demote,
    mean_bits,
    sort_rows,
    total_error,
)
from quantvla_ros.quant.sites import AttentionSite, LinearSite, PolicySites

W4A4 = parse_scheme('w4a4')


def sites():
    return PolicySites(
        linears=(
            LinearSite('vit.0.fc2', 'vision', 256, 128, True),
            LinearSite('llm.0.q', 'backbone_attention', 128, 128, False),
            LinearSite('llm.0.o', 'backbone_attention', 128, 128, False),
            LinearSite('llm.0.down', 'backbone_mlp', 256, 128, False),
            LinearSite('act.0.q', 'action_attention', 128, 128, True),
            LinearSite('act.0.o', 'action_attention', 128, 128, True),
            LinearSite('act.0.up', 'action_mlp', 128, 256, False),
            LinearSite('out', 'head', 128, 8, True),
        ),
        attentions=(
            AttentionSite('llm.0', 'llm.0.q', 'llm.0.o', 2, 64, False, False, 'not measured'),
            AttentionSite('act.0', 'act.0.q', 'act.0.o', 2, 64, True, True),
        ),
        blocks=('llm.0', 'act.0'),
    )


def quantized(layout):
    return {name for name, scheme in layout.items() if not scheme.is_float}


def test_the_selective_layout_leaves_action_attention_in_float():
    assert quantized(lay_out(sites(), SELECTIVE, W4A4)) == {
        'llm.0.q', 'llm.0.o', 'llm.0.down', 'act.0.up',
    }


def test_the_full_stack_leaves_vision_and_heads_in_float():
    layout = lay_out(sites(), FULL_STACK, W4A4)
    assert set(layout) == {site.name for site in sites().linears}
    assert layout['vit.0.fc2'] == layout['out'] == FLOAT


def test_sensitive_sites_are_outputs_and_downs():
    assert sensitive_sites(sites()) == (
        'vit.0.fc2', 'llm.0.o', 'llm.0.down', 'act.0.o',
    )


def test_raised_inputs_go_one_width_up_and_floats_stay():
    layout = raise_inputs(lay_out(sites(), FULL_STACK, W4A4), ['llm.0.o', 'out'])
    assert layout['llm.0.o'].act_bits == 8 and layout['llm.0.q'].act_bits == 4
    assert layout['out'] == FLOAT


def test_an_override_of_an_unknown_linear_is_refused():
    with pytest.raises(ValueError, match='no linear named nowhere'):
        override(lay_out(sites(), SELECTIVE, W4A4), {'nowhere': FLOAT})


def test_bytes_count_codes_scales_and_bias():
    site = LinearSite('x', 'backbone_mlp', 128, 64, True)
    assert weight_bytes(site, FLOAT) == 2 * 64 * 128 + 2 * 64
    assert weight_bytes(site, W4A4) == 64 * 128 // 2 + 64 * 4 + 64 * 4
    assert weight_bytes(site, parse_scheme('w3a4')) == weight_bytes(site, W4A4)
    assert weight_bytes(site, parse_scheme('w4a8g64')) == 64 * 128 // 2 + 64 * 2 * 4 + 64 * 4
    everything = lay_out(sites(), FULL_STACK, W4A4)
    assert layout_bytes(sites(), everything) < layout_bytes(sites(), lay_out(sites(), (), W4A4))


WIDTHS = (2, 4, 8)
tables = st.lists(
    st.tuples(
        st.integers(1, 9), st.lists(st.floats(0.01, 100.0), min_size=3, max_size=3)
    ),
    min_size=1,
    max_size=5,
)


def as_problem(table):
    units = [Unit(f'u{i}', size) for i, (size, _) in enumerate(table)]
    errors = {
        f'u{i}': dict(zip(sorted(WIDTHS), sorted(values, reverse=True), strict=True))
        for i, (_, values) in enumerate(table)
    }
    return units, errors


@settings(max_examples=60, deadline=None)
@given(table=tables, share=st.floats(0.0, 1.0))
def test_demotion_meets_the_budget_and_is_near_the_best_allocation(table, share):
    units, errors = as_problem(table)
    low, high = (sum(u.size for u in units) * w for w in (2, 8))
    budget = low + share * (high - low)
    chosen = demote(bit_costs(units, WIDTHS), errors, WIDTHS, budget)
    held = sum(u.size * chosen[u.name] for u in units)
    assert held <= budget
    best = min(
        sum(errors[u.name][b] for u, b in zip(units, bits, strict=True))
        for bits in itertools.product(WIDTHS, repeat=len(units))
        if sum(u.size * b for u, b in zip(units, bits, strict=True)) <= budget
    )
    # greedy overshoots the budget by at most one demotion of one unit
    worst_step = max(errors[u.name][2] - errors[u.name][8] for u in units)
    assert total_error(errors, chosen) <= best + worst_step + 1e-9


def test_the_unit_that_hurts_most_keeps_its_bits():
    units = [Unit('sensitive', 10), Unit('dull', 10)]
    errors = {'sensitive': {2: 9.0, 4: 5.0, 8: 0.0}, 'dull': {2: 0.2, 4: 0.1, 8: 0.0}}
    chosen = demote(bit_costs(units, WIDTHS), errors, WIDTHS, 100)
    assert chosen == {'sensitive': 8, 'dull': 2}
    assert mean_bits(units, chosen) == 5.0


def test_a_narrow_width_that_costs_more_than_a_wide_one_is_never_taken():
    costs = {'slow at 4': {2: 3.0, 4: 5.0, 8: 4.0}, 'slow at 2': {2: 2.0, 4: 1.0, 8: 3.0}}
    errors = {name: {2: 3.0, 4: 2.0, 8: 0.0} for name in costs}
    assert demote(costs, errors, WIDTHS, 7.0) == {'slow at 4': 8, 'slow at 2': 8}
    assert demote(costs, errors, WIDTHS, 5.0) == {'slow at 4': 8, 'slow at 2': 4}
    assert demote(costs, errors, WIDTHS, 4.0) == {'slow at 4': 2, 'slow at 2': 4}
    with pytest.raises(ValueError, match='budget is 3.9'):
        demote(costs, errors, WIDTHS, 3.9)


def test_a_budget_below_the_narrowest_width_is_refused():
    with pytest.raises(ValueError, match='even at width 2'):
        demote(bit_costs([Unit('a', 10)], WIDTHS), {'a': {2: 1, 4: 0, 8: 0}}, WIDTHS, 19)


@given(bits=st.lists(st.sampled_from([0, 2, 4, 8, 16]), min_size=1, max_size=40))
def test_sorted_rows_are_a_permutation_in_uniform_runs(bits):
    order, runs = sort_rows(bits)
    assert sorted(order) == list(range(len(bits)))
    assert [run[2] for run in runs] == sorted(set(bits), reverse=True)
    for first, last, width in runs:
        assert all(bits[order[place]] == width for place in range(first, last))
    assert runs[0][0] == 0 and runs[-1][1] == len(bits)
