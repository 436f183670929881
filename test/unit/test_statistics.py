# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests against published and hand-counted values."""

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.sim.statistics import mcnemar_exact, paired_difference, wilson


@pytest.mark.parametrize(
    ('successes', 'trials', 'low', 'high'),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_agrees_with_newcombes_table(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(trials=st.integers(1, 500), data=st.data())
def test_wilson_contains_the_rate_and_stays_between_zero_and_one(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert 0.0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1.0


@given(trials=st.integers(1, 200), data=st.data())
def test_wilson_treats_failures_as_it_treats_successes(trials, data):
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    assert wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_nothing_tried_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_more_successes_than_trials_are_refused():
    with pytest.raises(ValueError, match='5 successes of 4 trials'):
        wilson(5, 4)


@pytest.mark.parametrize(
    ('first', 'second', 'p'),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 32),
        (6, 1, 2 * (1 + 7) / 128),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_agrees_with_counting_coins(first, second, p):
    assert mcnemar_exact(first, second) == pytest.approx(p)
    assert mcnemar_exact(second, first) == pytest.approx(p)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match='cannot be negative'):
        mcnemar_exact(-1, 2)


@pytest.mark.parametrize(('first', 'second'), [(0.03, 0.03), (0.1, 0.02), (0.2, 0.2)])
def test_paired_interval_holds_the_true_difference_as_often_as_it_says(first, second):
    pairs, held = 60, 0.0
    for b in range(pairs + 1):
        for c in range(pairs + 1 - b):
            ways = comb(pairs, b) * comb(pairs - b, c)
            rest = (1 - first - second) ** (pairs - b - c)
            low, high = paired_difference(b, c, pairs)
            if low <= second - first <= high:
                held += ways * first**b * second**c * rest
    assert 0.94 <= held <= 0.99


def test_sides_that_change_places_change_the_sign():
    low, high = paired_difference(7, 2, 100)
    assert low < -0.05 < high
    assert paired_difference(2, 7, 100) == pytest.approx((-high, -low))
    assert paired_difference(0, 0, 0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match='disagree'):
        paired_difference(3, 3, 5)
