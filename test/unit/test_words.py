# SPDX-License-Identifier: Apache-2.0
"""Observation and ActionChunk: immutable, checked at the door, exact in time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.action import ActionChunk
from quantvla_ros.observation import Observation


def observation(**changes):
    fields = {
        'images': {'front': np.zeros((4, 6, 3), np.uint8)},
        'image_stamps_ns': {'front': 30},
        'joint_names': ('a', 'b'),
        'joint_positions': np.array([0.1, 0.2]),
        'joint_stamp_ns': 10,
        'instruction': 'pick',
    }
    return Observation(**{**fields, **changes})


def test_observation_cannot_be_changed_by_a_reader():
    seen = observation()
    with pytest.raises(ValueError, match='read-only'):
        seen.images['front'][0, 0, 0] = 1
    with pytest.raises(ValueError, match='read-only'):
        seen.joint_positions[0] = 1.0


def test_observation_does_not_copy_pixels():
    frame = np.zeros((480, 640, 3), np.uint8)
    assert np.shares_memory(observation(images={'front': frame}).images['front'], frame)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'images': {'front': np.zeros((4, 6), np.uint8)}}, 'front'),
        ({'images': {'front': np.zeros((4, 6, 3), np.float32)}}, 'float32'),
        ({'image_stamps_ns': {}}, 'stamp'),
        ({'joint_positions': np.zeros(3)}, '2 joint names'),
    ],
)
def test_observation_refuses_what_does_not_fit(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        observation(**change)


def test_observation_starts_at_the_joint_stamp_and_knows_its_spread():
    assert observation().stamp_ns == 10
    assert observation().spread_ns() == 20


@pytest.mark.parametrize(
    ('positions', 'dt'),
    [
        (np.zeros((2, 3)), 0.1),
        (np.zeros(2), 0.1),
        (np.zeros((0, 2)), 0.1),
        (np.zeros((1, 2)), 0.0),
    ],
)
def test_chunk_refuses_wrong_shapes_and_steps(positions, dt):
    with pytest.raises(ValueError):
        ActionChunk(('a', 'b'), positions, 0, dt)


def test_chunk_cannot_be_changed_by_a_reader():
    chunk = ActionChunk(('a',), np.zeros((2, 1)), 0, 0.05)
    with pytest.raises(ValueError, match='read-only'):
        chunk.positions[0, 0] = 1.0


@given(
    stamp=st.integers(0, 2**62),
    horizon=st.integers(1, 400),
    rate=st.floats(1.0, 1000.0),
)
def test_step_stamps_do_not_drift(stamp, horizon, rate):
    chunk = ActionChunk(('a',), np.zeros((horizon, 1)), stamp, 1.0 / rate)
    exact = (horizon - 1) * chunk.step_dt_s * 1e9
    assert abs(chunk.end_ns - stamp - exact) <= 1.0
    assert chunk.step_stamp_ns(0) == stamp
