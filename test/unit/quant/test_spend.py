# SPDX-License-Identifier: Apache-2.0
"""A budget of bytes goes to the layers that the action feels, and is never exceeded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.quant.convert import STORED, recipe_layout
from quantvla_ros.quant.layout import layout_bytes, override
from quantvla_ros.quant.recipes import RECIPES
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.sites import LinearSite, PolicySites
from quantvla_ros.quant.spend import (
    WIDTHS,
    spend_bytes,
    spend_ms,
    spent_ms,
    uniform_bytes,
    units_of,
)

NAMES = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def sites():
    linears = [
        LinearSite(f'b.{i}.{name}', 'backbone_mlp', 256 if name == 'down_proj' else 128,
                   256 if name in ('gate_proj', 'up_proj') else 128, False)
        for i in range(3) for name in NAMES
    ]
    return PolicySites((*linears, LinearSite('time', 'modulation', 128, 512, True)), (), ())


def errors(sizes):
    """Errors that fall by 4 for each bit; one size for each layer, in order."""
    found = {}
    for site, size in zip(sites().linears[:-1], sizes, strict=True):
        rows = torch.full((site.out_features,), float(size) / site.out_features)
        found[site.name] = {b: rows / 4.0**b for b in WIDTHS}
    return found


def spent(sizes, precision='w4a4', budget_mb=0.0):
    scheme = parse_scheme(precision)
    layout = recipe_layout(RECIPES['onboard'], sites(), scheme)
    layout = override(layout, {'time': STORED})
    return spend_bytes(sites(), layout, errors(sizes), scheme, budget_mb)


def held(layout):
    """Bytes of all layers, and of a diagonal for each that is quantized."""
    return layout_bytes(sites(), layout) + 2 * sum(s.in_features for s in sites().linears[:-1])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 100), min_size=21, max_size=21),
       st.sampled_from(['w8a8', 'w4a8', 'w3a4']))
def test_by_default_no_more_bytes_are_spent_than_by_equal_widths(sizes, precision):
    layout = spent(sizes, precision)
    assert held(layout) <= uniform_bytes(sites(), parse_scheme(precision))
    base = parse_scheme(precision).weight_bits
    assert all(layout[s.name].weight_bits in (base, 8) for s in sites().linears[:-1])


def test_the_layers_that_hurt_most_get_the_bytes():
    sizes = [1.0] * 21
    sizes[10] = 1000.0  # b.1.o_proj
    layout = spent(sizes)
    assert layout['b.1.o_proj'].weight_bits == 8
    assert layout['b.0.down_proj'].weight_bits == 4


def test_layers_that_read_one_input_have_one_width():
    sizes = [1.0] * 21
    sizes[1] = 500.0  # b.0.k_proj
    layout = spent(sizes)
    assert {layout[f'b.0.{name}'].weight_bits for name in NAMES[:3]} == {8}


def test_a_larger_budget_widens_and_a_smaller_one_narrows():
    sizes = [float(i) for i in range(21)]
    equal = uniform_bytes(sites(), parse_scheme('w4a4')) / 1e6
    bits = [
        sum(scheme.weight_bits for scheme in spent(sizes, budget_mb=share * equal).values())
        for share in (0.8, 1.0, 1.2)
    ]
    assert bits[0] < bits[1] < bits[2]
    assert held(spent(sizes, budget_mb=0.8 * equal)) <= 0.8 * equal * 1e6


def test_without_anything_saved_every_layer_keeps_its_own_width():
    scheme = parse_scheme('w4a4')
    layout = recipe_layout(RECIPES['onboard'], sites(), scheme)  # the time layer stays float
    found = spend_bytes(sites(), layout, errors([1.0] * 21), scheme)
    assert found == layout


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(ValueError, match='even at width 2'):
        spent([1.0] * 21, budget_mb=0.01)


def test_layers_that_run_once_are_left_as_they_are_stored():
    assert spent([1.0] * 21)['time'] == parse_scheme('w8a16')


def timed(wide, narrow):
    """Times of every unit at 8 and at 4 bits; 2 bits are as fast as 4."""
    names = [site.name for site in sites().linears[:-1]]
    return {unit: {2: narrow, 4: narrow, 8: wide} for unit in units_of(sites(), names)}


def in_time(sizes, ms, budget_ms=0.0):
    scheme = parse_scheme('w4a4')
    layout = override(recipe_layout(RECIPES['onboard'], sites(), scheme), {'time': STORED})
    return spend_ms(sites(), layout, errors(sizes), scheme, ms, budget_ms)


def test_where_wide_weights_are_as_fast_they_are_taken():
    layout = in_time([1.0] * 21, timed(wide=1.0, narrow=1.0))
    assert {layout[site.name].weight_bits for site in sites().linears[:-1]} == {8}


def test_a_larger_time_goes_to_the_layers_that_hurt_most():
    sizes = [1.0] * 21
    sizes[10] = 1000.0  # b.1.o_proj
    ms = timed(wide=3.0, narrow=1.0)
    assert spent_ms(sites(), in_time(sizes, ms), ms) == len(ms)  # equal widths, nothing to spend
    layout = in_time(sizes, ms, budget_ms=len(ms) + 2.5)
    assert spent_ms(sites(), layout, ms) == len(ms) + 2.0
    assert layout['b.1.o_proj'].weight_bits == 8


def test_time_below_that_of_equal_widths_is_refused_where_nothing_is_faster():
    ms = timed(wide=3.0, narrow=1.0)
    with pytest.raises(ValueError, match='budget is'):
        in_time([1.0] * 21, ms, budget_ms=0.9 * len(ms))
    with pytest.raises(ValueError, match='other layers'):
        in_time([1.0] * 21, dict(list(ms.items())[1:]))
