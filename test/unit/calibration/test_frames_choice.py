# SPDX-License-Identifier: Apache-2.0
"""Chosen frames cover time and motion, repeat nothing, and judge by other times than they fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.calibration.frames import FrameSettings, Thinning
from quantvla_ros.calibration.frames_choice import (
    CELLS,
    Candidate,
    candidate_of,
    distinct,
    draw_evenly,
    part_by_time,
)
from quantvla_ros.observation import Observation

GREY = np.zeros(CELLS * CELLS, np.float32)


def candidates(times, joints, greys=None, words='go'):
    return [Candidate(i, float(t), np.atleast_1d(np.asarray(q, float)),
                      GREY if greys is None else greys[i], words)
            for i, (t, q) in enumerate(zip(times, joints, strict=True))]


@st.composite
def walks(draw):
    """A recording: rising times with pauses, joints that walk."""
    count = draw(st.integers(2, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    times = np.cumsum(rng.exponential(0.1, count))
    joints = np.cumsum(rng.normal(0, 0.1, (count, 3)) * rng.integers(0, 2, (count, 1)), axis=0)
    return candidates(times, joints)


@settings(max_examples=100, deadline=None)
@given(walks(), st.floats(0.05, 0.5), st.floats(0, 2), st.integers(1, 4))
def test_parts_are_apart_in_time_by_the_gap(found, share, gap_s, spans):
    fit, held = part_by_time(found, share, gap_s, spans)
    assert not {one.number for one in fit} & {one.number for one in held}
    if fit and held:
        times = np.array([one.time_s for one in held])
        nearest = min(np.abs(times - one.time_s).min() for one in fit)
        assert nearest >= gap_s * (1 - 1e-9) - 1e-9


@settings(max_examples=100, deadline=None)
@given(walks(), st.data())
def test_a_draw_has_the_count_in_order_and_without_repetition(found, data):
    count, seed = data.draw(st.integers(1, len(found))), data.draw(st.integers(0, 99))
    numbers = [one.number for one in draw_evenly(found, count, seed)]
    assert len(numbers) == count
    assert numbers == sorted(set(numbers))
    assert numbers == [one.number for one in draw_evenly(found, count, seed)]


def test_a_draw_of_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match='3 frames were asked for, 2 are there'):
        draw_evenly(candidates([0, 1], [0, 1]), 3, 0)


def test_a_draw_covers_time_and_motion():
    """The arm rests for half of the time: half of the draw is spread over time, half over way."""
    times = np.linspace(0, 100, 1001)
    way = np.where(times < 50, 0.001 * times, times - 50)
    drawn = draw_evenly(candidates(times, way), 40, 0)
    at = np.array([one.time_s for one in drawn])
    counts = np.histogram(at, np.linspace(0, 100, 11))[0]
    assert (counts >= 1).all()
    assert (at > 50).sum() == pytest.approx(30, abs=2)  # a quarter by time, the way's half, too
    gone = np.array([one.joints[0] for one in drawn])
    assert (np.histogram(gone, np.linspace(0, 50, 11))[0] >= 2).all()


def test_frames_that_repeat_the_one_before_are_dropped():
    joints = [0.0, 0.005, 0.02, 0.02, 0.02, 0.5]
    kept = distinct(candidates(range(6), joints), 0.01, 4.0)
    assert [one.number for one in kept] == [0, 2, 5]


def test_a_picture_that_changes_while_the_arm_rests_is_kept():
    greys = [GREY, GREY + 1, GREY.copy(), GREY]
    greys[2][7] = 30  # something moves in one part of the picture
    kept = distinct(candidates(range(4), [0.0] * 4, greys), 0.01, 4.0)
    assert [one.number for one in kept] == [0, 2, 3]


def test_a_new_instruction_makes_a_new_frame():
    found = candidates([0], [0.0]) + candidates([1], [0.0], words='stop')
    assert len(distinct(found, 0.01, 4.0)) == 2


def test_noise_of_a_sensor_does_not_make_frames_different():
    rng = np.random.default_rng(0)
    def look(i):
        image = (100 + rng.normal(0, 10, (128, 128, 3))).clip(0, 255).astype(np.uint8)
        return Observation({'a': image}, {'a': i}, ('j',), np.zeros(1), i, 'go')

    seen = [candidate_of(i, float(i), look(i)) for i in range(50)]
    assert len(distinct(seen, 0.01, 4.0)) == 1


@pytest.mark.parametrize('shape', [(64, 64), (48, 64), (50, 37), (8, 8)])
def test_cells_are_the_means_of_their_pixels(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    one = Observation({'a': image}, {'a': 1}, ('j',), np.zeros(1), 1, 'go')
    found = candidate_of(0, 0.0, one).greys
    assert found.shape == (CELLS * CELLS,)
    assert found.mean() == pytest.approx(image.mean(), abs=4.0)
    assert found[0] == pytest.approx(image[: shape[0] // CELLS, : shape[1] // CELLS].mean(), 1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3000), st.integers(4, 64))
def test_thinning_keeps_an_even_spread_whatever_the_length(count, most):
    thinning = Thinning(most)
    for number in range(count):
        if thinning.wants(number):
            thinning.put(Candidate(number, float(number), np.zeros(1), GREY, 'go'))
    numbers = [one.number for one in thinning.kept]
    assert len(numbers) <= most
    assert len(numbers) >= min(count, most // 2)
    assert len(set(np.diff(numbers))) <= 1


@pytest.mark.parametrize('given', [{'count': 0}, {'held_out': 0}, {'candidates': 300}])
def test_settings_that_cannot_work_are_refused(given):
    with pytest.raises(ValueError, match='expected at least|at least one'):
        FrameSettings(**given)
