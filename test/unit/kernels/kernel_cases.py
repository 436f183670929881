# SPDX-License-Identifier: Apache-2.0
"""Generated layers for the tests of every path."""

import torch
from hypothesis import strategies as st

from quantvla_ros.kernels import reference, weights

# 32-bit sums are turned into floats once per group: below 2**24 that is exact, bit for bit
EXACT = 2**24


@st.composite
def shapes(draw):
    """(tokens, N, K, bits, group) that every kernel serves; seeds torch: a case repeats."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    group = draw(st.sampled_from([0, 0, 32, 64, 128]))
    columns = draw(st.integers(1, 6)) * group if group else draw(st.integers(1, 300))
    return (draw(st.integers(1, 20)), draw(st.integers(1, 150)), columns,
            draw(st.sampled_from([2, 4, 8])), group)


def integers(rows, columns, bits):
    low, high = weights.RANGES[bits]
    q = torch.randint(low, high + 1, (rows, columns))
    q[0, :] = low  # the corners must be there: they are where 16-bit sums would overflow
    q[-1, :] = high
    return q


def packed(rows, columns, bits, group=0, scale=None):
    count = columns // group if group else 1
    scales = torch.rand(rows, count) + 0.1 if scale is None else torch.full((rows, count), scale)
    if bits == 16:
        return weights.keep(torch.randn(rows, columns))
    return weights.pack(integers(rows, columns, bits), scales, bits, group)


def far(a, b):
    """Largest difference relative to the largest value of b."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def summed(x, weight, bias, act_bits):
    """What float32 adds up for each output, by magnitude: (M, N) float64, of tokens x (M, K).

    The sum of a group is an exact integer; it meets its scale, the other groups and the bias as a
    float, and an error is a share of these magnitudes, not of what is left where they cancel.
    """
    q, scales = reference.quantize_activations(x, act_bits)
    groups = reference.accumulate(q, weight).double().abs() * weight.scales.double()
    return groups.sum(-1) * scales.double() + bias.double().abs()
