# SPDX-License-Identifier: Apache-2.0
"""Drift: what counts as outside the calibrated range, when it is told, how rarely one looks."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from quantvla_ros.nodes.drift import Drift, DriftSettings, Range, ranges_of

RANGES = {f'layer{i}': Range(1.0, 2.0) for i in range(10)}


@pytest.fixture
def drift():
    return Drift(DriftSettings(every=3, share=0.2, margin=0.1, excess=1.5), RANGES)


def looks(drift, count=5, **values):
    for _ in range(count):
        drift.note({**dict.fromkeys(RANGES, 1.5), **values})


def test_inside_the_range_nothing_is_told(drift):
    looks(drift)
    assert drift.warning == ''
    assert drift.status()['share'] == 0.0


def test_one_layer_a_little_outside_is_chance_and_many_are_drift(drift):
    looks(drift, layer3=2.4)
    assert drift.warning == ''
    assert drift.status()['worst_layer'] == 'layer3'
    looks(drift, 10, layer1=2.3, layer2=2.3, layer3=2.4)
    assert 'recalibrate: ' in drift.warning
    assert 'worst layer3 by ' in drift.warning


def test_one_layer_that_stays_far_outside_is_drift_and_one_that_leaps_is_not(drift):
    looks(drift, 5)
    looks(drift, 1, layer3=4.0)
    assert drift.warning == ''
    looks(drift, 10, layer3=4.0)
    assert 'worst layer3 by ' in drift.warning


def test_warning_ends_when_the_scene_comes_back(drift):
    far = dict.fromkeys(RANGES, 9.0)
    looks(drift, 4, **far)
    assert '100 % of the layers' in drift.warning
    looks(drift, 16)
    assert drift.warning == ''


def test_too_small_is_outside_too_unless_it_was_seen_in_part(drift):
    dark = dict.fromkeys(RANGES, 0.5)
    for _ in range(4):
        drift.note(dark, frozenset(RANGES))
    assert drift.warning == ''
    looks(drift, 6, **dark)
    assert 'recalibrate' in drift.warning


def test_first_looks_claim_nothing(drift):
    looks(drift, 2, **dict.fromkeys(RANGES, 9.0))
    assert drift.warning == ''


def test_margin_belongs_to_the_range():
    assert Range(1.0, 2.0).excess(2.19, 0.1, partial=False) < 1
    assert Range(1.0, 2.0).excess(2.21, 0.1, partial=False) > 1
    assert Range(1.0, 2.0).excess(0.91, 0.1, partial=False) < 1
    assert Range(1.0, 2.0).excess(0.89, 0.1, partial=False) > 1


class Watched:
    """A policy that can be looked into."""

    def __init__(self):
        self.turns = []

    @contextlib.contextmanager
    def watching(self, turn):
        self.turns.append(turn)
        yield SimpleNamespace(inputs={'layer0': 1.5}, spreads={}, partial=frozenset())


def test_only_every_nth_chunk_is_looked_into_at_another_step_each_time(drift):
    policy = Watched()
    for _ in range(10):
        with drift.looking(policy):
            pass
    assert policy.turns == [0, 1, 2]


@pytest.mark.parametrize(('settings', 'ranges', 'policy'), [
    (DriftSettings(every=0), RANGES, Watched()), (DriftSettings(every=1), {}, Watched()),
    (DriftSettings(every=1), RANGES, object()),
])
def test_nobody_looks_without_ranges_or_a_policy_that_can_be_seen(settings, ranges, policy):
    drift = Drift(settings, ranges)
    with drift.looking(policy):
        pass
    assert drift.status()['looks'] == 0


def test_ranges_are_those_of_the_calibration():
    calibration = SimpleNamespace(activations={'a': torch.tensor([1.0, 2.0, 3.0])},
                                  logits={'b': torch.tensor([0.1, 0.2, 0.3])})
    found = ranges_of(SimpleNamespace(calibration=calibration))
    assert found['a'] == Range(1.0, 3.0)
    assert set(found) == {'a', 'b'}
    assert ranges_of(SimpleNamespace()) == {}
