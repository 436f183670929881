# SPDX-License-Identifier: Apache-2.0
"""What a swap makes is frozen where the rest is, and nothing walks through what is frozen."""

import gc

import pytest

from quantvla_ros.nodes.collector import Collector


@pytest.fixture(autouse=True)
def as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_while_objects_are_made():
    with Collector().paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_is_made_beside_a_moving_arm_is_frozen_too():
    collector = Collector()
    collector.freeze()
    with collector.paused():
        made = [[] for _ in range(5000)]
    assert gc.get_freeze_count() > len(made)
    assert not any(found is made[-1] for found in gc.get_objects())


def test_what_is_made_after_a_deactivate_can_be_collected():
    collector = Collector()
    collector.freeze()
    collector.unfreeze()
    with collector.paused():
        made = [[]]
    assert gc.get_freeze_count() == 0
    assert any(found is made for found in gc.get_objects())


def test_frozen_objects_are_not_counted(monkeypatch):
    """Counting them walks through them all with the interpreter held."""
    def walked():
        raise AssertionError('walked through everything')

    monkeypatch.setattr(gc, 'get_freeze_count', walked)
    collector = Collector()
    collector.freeze()
    with collector.paused():
        pass
