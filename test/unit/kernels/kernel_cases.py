# SPDX-License-Identifier: Apache-2.0
"""Generated layers for the tests of every path."""

import torch
from hypothesis import strategies as st

from quantvla_ros.kernels import weights

# 32-bit sums are turned into floats once per group: below 2**24 that is exact, bit for bit
EXACT = 2**24


@st.composite
def shapes(draw):
    """(tokens, N, K, bits, group) that every kernel serves."""
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
