# SPDX-License-Identifier: Apache-2.0
"""Latency figures that a cold start cannot spoil."""

import pytest

from quantvla_ros.control.latency import LatencyTracker


def test_warm_up_is_left_out_of_every_figure():
    tracker = LatencyTracker(warm_up=2, budget_s=0.1)
    for seconds in (9.0, 8.0, 0.01, 0.02):
        tracker.add(seconds)
    figures = tracker.figures()
    assert (figures.count, figures.worst_s, figures.overruns) == (2, 0.02, 0)


def test_percentiles_are_those_of_the_window():
    tracker = LatencyTracker(window=100, warm_up=0)
    for value in [5.0] * 50 + [i / 100 for i in range(1, 101)]:
        tracker.add(value)
    figures = tracker.figures()
    assert figures.p50_s == pytest.approx(0.505)
    assert figures.p95_s == pytest.approx(0.9505)
    assert figures.p99_s == pytest.approx(0.9901)
    assert figures.worst_s == 1.0 and figures.count == 150


def test_overruns_are_counted_beyond_the_window():
    tracker = LatencyTracker(window=2, warm_up=0, budget_s=0.1)
    for seconds in (0.2, 0.3, 0.05, 0.1, 0.05):
        tracker.add(seconds)
    assert tracker.figures().overruns == 2


def test_empty_window_gives_zeros():
    assert LatencyTracker().figures().p99_s == 0.0


@pytest.mark.parametrize('wrong', [{'window': 0}, {'warm_up': -1}, {'budget_s': -0.1}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match='expected'):
        LatencyTracker(**wrong)
