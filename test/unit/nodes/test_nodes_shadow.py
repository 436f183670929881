# SPDX-License-Identifier: Apache-2.0
"""A shadow: what it tells, when it is skipped, and that its faults stay its own."""

from types import SimpleNamespace

import numpy as np
import pytest
from test_nodes_handover import Answers, kept
from test_nodes_handover import limiter as limiter  # a fixture

from quantvla_ros.nodes.shadow import Shadow


class Clock:
    """Each reading is a tenth of a second later."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.1
        return self.now


def shadow(limiter, policy, told=lambda *_: None):
    return Shadow('w4a8', policy, limiter, 0.1, told, Clock())


def test_differences_are_told_by_joint_with_the_stamp_of_the_chunk(limiter):
    told = []
    made = shadow(limiter, Answers([0.02, -0.003, 0.0]), lambda *found: told.append(found))
    made.compare(kept())
    made.compare(kept([0.01, 0.0, 0.0]))
    figures = made.figures()
    assert figures['compared'] == 2
    assert figures['worst'] == {'turn': 0.02, 'slide': 0.003, 'grip': 0.0}
    assert figures['mean']['turn'] == pytest.approx(0.015)
    (found, stamp_ns), _ = told
    np.testing.assert_allclose(found.steps[0], [0.02, -0.003, 0.0])
    assert stamp_ns == 1


def test_shadow_is_skipped_when_the_next_chunk_is_due_soon(limiter):
    made = shadow(limiter, Answers())
    assert made.wants(0.16)
    assert not made.wants(0.14)
    assert made.figures()['skipped'] == 1


def test_slow_shadow_needs_more_time(limiter):
    made = shadow(limiter, Answers())
    made._clock = SimpleNamespace(now=0.0)
    times = iter([0.0, 0.5])
    made._clock = lambda: next(times)
    made.compare(kept())
    assert not made.wants(0.7)
    assert made.wants(0.8)


@pytest.mark.parametrize(('policy', 'words'), [
    (Answers(np.nan), 'not finite'), (SimpleNamespace(), 'it raised AttributeError'),
])
def test_fault_of_a_shadow_is_told_and_ends_it(limiter, policy, words):
    made = shadow(limiter, policy)
    made.compare(kept())
    assert words in made.error
    assert not made.wants(100.0)
    made.compare(kept())
    assert made.figures()['compared'] == 0
