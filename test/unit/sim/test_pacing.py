# SPDX-License-Identifier: Apache-2.0
"""The pace of the physics loop, on a clock moved by hand."""

import pytest

from quantvla_ros.control.clock import ManualClock
from quantvla_ros.sim.pacing import Pacer


def make(**options):
    clock = ManualClock()
    return Pacer(0.01, clock.steady_ns, **options), clock


def run(pacer, clock, periods, cost_s):
    for _ in range(periods):
        clock.advance(pacer.wait_s() + cost_s)
        pacer.done()


def test_a_loop_in_time_runs_at_factor_one():
    pacer, clock = make(window_s=1.0)
    run(pacer, clock, 300, 0.004)
    assert pacer.real_time_factor() == pytest.approx(1.0, abs=0.02)


def test_a_loop_twice_too_slow_says_so():
    pacer, clock = make(window_s=1.0)
    run(pacer, clock, 300, 0.02)
    assert pacer.real_time_factor() == pytest.approx(0.5, abs=0.02)


def test_a_short_lag_is_caught_up():
    pacer, clock = make()
    clock.advance(0.05)
    waits = []
    for _ in range(5):
        waits.append(pacer.wait_s())
        pacer.done()
    assert waits == [0.0] * 5
    assert pacer.wait_s() == pytest.approx(0.01)


def test_a_long_pause_is_given_up_and_counted():
    pacer, clock = make()
    clock.advance(5.0)
    pacer.done()
    assert pacer.given_up_ns > 4.9e9
    clock.advance(0.001)
    pacer.done()
    assert pacer.wait_s() > 0.0


def test_nothing_is_claimed_before_a_window_has_passed():
    pacer, _ = make()
    assert pacer.real_time_factor() is None
