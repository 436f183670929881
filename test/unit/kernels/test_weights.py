# SPDX-License-Identifier: Apache-2.0
"""The canonical layout: there and back, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import integers, packed

from quantvla_ros.kernels import weights


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([2, 4, 8]))
def test_unpacking_returns_the_integers_that_were_packed(rows, columns, bits):
    q = integers(rows, columns, bits)
    again = weights.unpack_integers(weights.pack_integers(q, bits), bits, columns)
    assert torch.equal(again.long(), q)


def test_four_bits_take_half_a_byte_and_the_low_nibble_comes_first():
    data = weights.pack_integers(torch.tensor([[-8, 7, 1]]), 4)
    assert data.tolist() == [[0xF0, 0x09]]


def test_dequantized_groups_use_their_own_scale():
    q = torch.ones(1, 64, dtype=torch.int64)
    weight = weights.pack(q, torch.tensor([[2.0, 3.0]]), 4, 32)
    assert weights.dequantize(weight).tolist() == [[2.0] * 32 + [3.0] * 32]


def test_mixed_rows_return_to_their_places_and_pruned_ones_are_zero():
    order = torch.randperm(20)
    parts = [(packed(5, 12, 2), order[:5]), (packed(8, 12, 4), order[5:13]),
             (packed(4, 12, 16), order[13:17])]
    whole = weights.dequantize(weights.mix(parts, 20))
    for part, rows in parts:
        assert torch.equal(whole[rows], weights.dequantize(part))
    assert not whole[order[17:]].any()


def test_stacked_layers_keep_their_rows():
    a, b = packed(3, 64, 4, 32), packed(5, 64, 4, 32)
    both = torch.cat([weights.dequantize(a), weights.dequantize(b)])
    assert torch.equal(weights.dequantize(weights.stack([a, b])), both)


@pytest.mark.parametrize('change, words', [
    (dict(bits=3), '2, 4, 8 or 16'),
    (dict(group=48), 'one of'),
    (dict(group=128), 'multiple of the group'),
    (dict(shape=(4, 1 << 20)), '32-bit sums'),
    (dict(data=torch.zeros(4, 32, dtype=torch.int8)), 'expected torch.uint8'),
    (dict(scales=torch.zeros(4, 1, dtype=torch.float64)), 'expected torch.float32'),
    (dict(scales=torch.full((4, 1), torch.nan)), 'not finite'),
    (dict(layout='other'), 'layout'),
])
def test_what_no_kernel_could_serve_is_refused_with_a_sentence(change, words):
    good = dict(bits=4, shape=(4, 64), group=0, data=torch.zeros(4, 32, dtype=torch.uint8),
                scales=torch.ones(4, 1))
    weights.PackedWeight(**good)
    with pytest.raises(ValueError, match=words):
        weights.PackedWeight(**{**good, **change})


def test_integers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='4 bits hold -8 to 7'):
        weights.pack_integers(torch.tensor([[8]]), 4)
    with pytest.raises(ValueError, match='8 bits hold -127 to 127'):
        weights.pack_integers(torch.tensor([[-128]]), 8)


def test_an_order_that_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match='permutation'):
        weights.MixedWeight((packed(2, 8, 4),), torch.tensor([0, 0, 1]))
