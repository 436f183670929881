# SPDX-License-Identifier: Apache-2.0
"""Scales, codes and nibbles: each primitive holds for any matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.kernels.weights import dequantize as kernel_dequantize
from quantvla_ros.quant.pack import (
    absmax_scale,
    dequantize,
    fake_quantize,
    packed,
    percentile_scale,
    quantize,
    search_scale,
)
from quantvla_ros.quant.scheme import (
    FLOAT,
    PerGroup,
    PerRow,
    PerStep,
    PerTensor,
    Scheme,
    parse_scheme,
    qmax,
)

GRANULARITIES = [PerTensor(), PerRow(), PerGroup(8)]
matrices = st.builds(
    lambda seed, rows, groups, spread: torch.randn(
        rows, 8 * groups, generator=torch.Generator().manual_seed(seed)
    )
    * 10.0**spread,
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(-6, 6),
)


@given(x=matrices, bits=st.sampled_from([2, 3, 4, 8]), granularity=st.sampled_from(GRANULARITIES))
def test_round_trip_error_is_at_most_half_a_scale(x, bits, granularity):
    scale = absmax_scale(x, bits, granularity)
    back = dequantize(quantize(x, scale, bits, granularity), scale, granularity)
    half = dequantize(torch.ones_like(x, dtype=torch.int8), scale, granularity) / 2
    assert bool((back - x).abs().le(half * (1 + 1e-5)).all())


@given(x=matrices, bits=st.sampled_from([2, 3, 4, 8]), granularity=st.sampled_from(GRANULARITIES))
def test_codes_are_symmetric_and_inside_the_range(x, bits, granularity):
    scale = absmax_scale(x, bits, granularity)
    codes = quantize(x, scale, bits, granularity)
    assert int(codes.abs().max()) <= qmax(bits)
    assert torch.equal(quantize(-x, scale, bits, granularity), -codes)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('choose', [absmax_scale, percentile_scale, search_scale])
def test_a_group_of_zeros_has_scale_one(choose, granularity):
    assert bool((choose(torch.zeros(3, 16), 4, granularity) == 1).all())


@given(x=matrices, bits=st.sampled_from([3, 4]))
def test_searched_scale_is_never_worse_than_absmax(x, bits):
    for granularity in GRANULARITIES:
        errors = []
        for choose in (absmax_scale, search_scale):
            scale = choose(x, bits, granularity)
            back = dequantize(quantize(x, scale, bits, granularity), scale, granularity)
            errors.append(float((back - x).double().pow(2).sum()))
        assert errors[1] <= errors[0] * (1 + 1e-6)


def test_importance_decides_which_inputs_keep_their_value():
    x = torch.tensor([[10.0, 1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.0]])
    care = torch.tensor([1e-6] + [1.0] * 7)
    plain = fake_quantize(x, 3, PerRow())
    scale = search_scale(x, 3, PerRow(), care)
    aware = dequantize(quantize(x, scale, 3, PerRow()), scale, PerRow())
    assert (aware - x)[0, 1:].abs().max() < (plain - x)[0, 1:].abs().max()


def test_percentile_clips_the_outlier():
    x = torch.ones(1, 1000)
    x[0, 0] = 100.0
    assert float(percentile_scale(x, 8, PerRow(), 99.0)) == pytest.approx(1 / 127)


@given(x=matrices, bits=st.sampled_from([2, 3, 4, 8]), granularity=st.sampled_from(GRANULARITIES))
def test_the_packed_weight_stands_for_the_same_values(x, bits, granularity):
    if granularity == PerGroup(8):
        x, granularity = x.repeat(1, 4), PerGroup(32)
    scale = absmax_scale(x, bits, granularity)
    codes = quantize(x, scale, bits, granularity)
    weight = packed(codes, scale, bits, granularity)
    assert weight.bits == (4 if bits == 3 else bits)
    assert torch.equal(kernel_dequantize(weight), dequantize(codes, scale, granularity))


def test_groups_must_divide_the_inputs():
    with pytest.raises(ValueError, match='groups of 8'):
        absmax_scale(torch.ones(2, 12), 4, PerGroup(8))


@pytest.mark.parametrize('name', ['w8a8', 'w4a8', 'w4a8g128', 'w4a4', 'w4a16', 'w3a3', 'float'])
def test_scheme_names_round_trip(name):
    assert parse_scheme(name).name == name


@pytest.mark.parametrize('name', ['w5a8', 'int4', 'w4', 'w4a8g'])
def test_an_unknown_scheme_is_refused_with_what_is_known(name):
    with pytest.raises(ValueError, match='expected float, or wXaY'):
        parse_scheme(name)


def test_a_scale_that_cannot_leave_the_sum_is_refused():
    with pytest.raises(ValueError, match='could not leave the sum'):
        Scheme(4, 8, PerRow(), PerGroup(64))
    with pytest.raises(ValueError, match='step'):
        Scheme(4, 8, PerStep())
    assert FLOAT.is_float
