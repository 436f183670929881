# SPDX-License-Identifier: Apache-2.0
"""Chunks are executed by their stamps and pass into each other without a seam."""

import threading

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from quantvla_ros.action import ActionChunk
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.plan import slopes
from quantvla_ros.control.player import ChunkPlayer, PlayerSettings
from quantvla_ros.control.urdf import Limit

S = 1_000_000_000
MS = 1_000_000
NAMES = ('a', 'b')


def make_player(velocity=2.0, acceleration=10.0, snap=(), **settings_):
    limits = {name: Limit(-3, 3, velocity, acceleration) for name in NAMES}
    limiter = JointLimiter(limits, snap_joints=snap)
    return ChunkPlayer(limiter, PlayerSettings(**settings_)), limiter


def chunk_of(rows, stamp_ns=S, step_s=0.05, names=NAMES):
    rows = np.array(rows, dtype=float)
    if rows.ndim == 1:
        rows = np.stack([rows, -rows], axis=1)
    return ActionChunk(names, rows, stamp_ns, step_s)


def ramp(speed, count=17, start=0.0, step_s=0.05):
    return start + speed * step_s * np.arange(count)


def largest_jumps(player, start_ns, end_ns, step_ns=MS):
    """Largest step of position and of velocity per second along the plan."""
    times = range(start_ns, end_ns, step_ns)
    samples = [player.sample(t) for t in times]
    positions = np.array([s.positions for s in samples])
    velocities = np.array([s.velocities for s in samples])
    dt = step_ns / S
    return (
        np.abs(np.diff(positions, axis=0)).max() / dt,
        np.abs(np.diff(velocities, axis=0)).max() / dt,
    )


# -- one chunk -----------------------------------------------------------------------------


def test_without_a_chunk_there_is_no_sample():
    player, _ = make_player()
    assert player.sample(S) is None and player.remaining(S) is None


def test_every_step_is_reached_when_it_is_due():
    player, _ = make_player()
    chunk = chunk_of([0.0, 0.1, 0.05, 0.3, 0.3])
    player.merge(chunk, S)
    for row in range(4):
        sample = player.sample(chunk.step_stamp_ns(row))
        assert np.allclose(sample.positions, chunk.positions[row], atol=1e-12)


def test_first_chunk_starts_with_its_first_step_however_late_it_came():
    player, _ = make_player()
    assert player.merge(chunk_of(ramp(1.0)), S + 400 * MS) is None
    assert player.sample(S + 400 * MS).positions[0] == 0.0
    assert abs(player.sample(S + 450 * MS).positions[0] - 0.05) < 1e-12


def test_later_chunk_is_entered_where_its_time_is():
    player, _ = make_player()
    player.merge(chunk_of(ramp(1.0)), S)
    later = chunk_of(ramp(1.0, start=0.2), stamp_ns=S + 200 * MS)
    assert player.merge(later, S + 500 * MS) is None
    assert abs(player.sample(S + 650 * MS).positions[0] - 0.65) < 1e-9


@pytest.mark.parametrize('warm_up_s', [0.0, 0.7])
def test_a_slow_first_inference_does_not_make_later_chunks_skip(warm_up_s):
    player, _ = make_player()
    now = S + round(warm_up_s * S)
    player.merge(chunk_of(ramp(0.5), stamp_ns=S), now)
    at = player.sample(now + 300 * MS).positions[0]
    later = chunk_of(ramp(0.5, start=at), stamp_ns=now + 300 * MS)
    player.merge(later, now + 350 * MS)
    assert abs(player.sample(now + 600 * MS).positions[0] - (at + 0.15)) < 1e-9


@pytest.mark.parametrize('running', [True, False])
def test_chunk_wholly_in_the_past_is_refused_with_a_reason(running):
    player, _ = make_player()
    if running:
        player.merge(chunk_of(ramp(0.1), stamp_ns=5 * S), 5 * S)
    reason = player.merge(chunk_of([0.0, 0.1], stamp_ns=S), 5 * S)
    assert 'late' in reason and '3.950 s ago' in reason
    assert (player.sample(5 * S) is None) is not running


def test_chunk_for_other_joints_is_refused():
    player, _ = make_player()
    assert 'expected' in player.merge(chunk_of([0.0, 0.1], names=('b', 'a')), S)


def test_exhausted_plan_says_so_and_stands():
    player, _ = make_player()
    chunk = chunk_of([0.0, 0.1, 0.2])
    player.merge(chunk, S)
    before, at_end = player.sample(chunk.end_ns - 1), player.sample(chunk.end_ns)
    assert not before.exhausted and before.steps_left == 1
    assert at_end.exhausted and at_end.steps_left == 0
    assert np.array_equal(at_end.velocities, [0.0, 0.0])


def test_steps_left_counts_down():
    player, _ = make_player()
    player.merge(chunk_of(ramp(0.5, count=5)), S)
    left = [player.sample(S + t * MS).steps_left for t in (0, 1, 49, 50, 51, 149, 199)]
    assert left == [4, 4, 4, 3, 3, 2, 1]


def test_clear_forgets_the_plan():
    player, _ = make_player()
    player.merge(chunk_of(ramp(0.5)), S)
    player.clear()
    assert player.sample(S + MS) is None


def test_chunk_of_the_future_waits_for_its_stamp():
    player, _ = make_player()
    player.merge(chunk_of(ramp(1.0), stamp_ns=S + 300 * MS), S)
    sample = player.sample(S + 100 * MS)
    assert sample.positions[0] == 0.0 and sample.velocities[0] == 0.0 and not sample.exhausted


def test_chunk_of_the_future_leaves_the_running_one_alone_until_then():
    player, _ = make_player()
    player.merge(chunk_of([0.0, 0.05, 0.0, 0.08, 0.02, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1]), S)
    times = range(S + 20 * MS, S + 400 * MS, MS)
    before = [player.sample(t).positions[0] for t in times]
    assert player.merge(chunk_of(ramp(0.5, start=0.1), stamp_ns=S + 400 * MS), S + 20 * MS) is None
    after = [player.sample(t).positions[0] for t in times]
    assert np.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize('running', [True, False])
def test_chunk_of_one_future_step_is_reached_and_then_exhausted(running):
    player, _ = make_player()
    if running:
        player.merge(chunk_of(np.zeros(17)), S)
    assert player.merge(chunk_of([0.02], stamp_ns=S + 200 * MS), S + 100 * MS) is None
    assert not player.sample(S + 150 * MS).exhausted
    end = player.sample(S + 900 * MS)
    assert end.exhausted and abs(end.positions[0] - 0.02) < 1e-9


# -- shape between the steps ---------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=12))
def test_curve_stays_between_its_neighbouring_steps(rows):
    player, _ = make_player()
    chunk = chunk_of(rows)
    player.merge(chunk, S)
    for row in range(len(rows) - 1):
        low, high = sorted(rows[row : row + 2])
        for part in np.linspace(0, 0.999, 9):
            t = chunk.step_stamp_ns(row) + round(part * 0.05 * S)
            assert low - 1e-9 <= player.sample(t).positions[0] <= high + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_velocity_is_the_derivative_of_position(rows):
    player, _ = make_player()
    player.merge(chunk_of(rows), S)
    for t in range(S + MS, S + (len(rows) - 1) * 50 * MS - MS, 7 * MS):
        if (t - S) % (50 * MS) < 10 or (S - t) % (50 * MS) < 10:
            continue
        ahead, behind = player.sample(t + 1000), player.sample(t - 1000)
        slope = (ahead.positions - behind.positions) / 2e-6
        assert np.allclose(slope, player.sample(t).velocities, atol=1e-3)


def test_slopes_of_a_straight_line_are_its_slope():
    assert np.allclose(slopes(ramp(0.7)[:, None], 0.05), 0.7)


# -- the seam ------------------------------------------------------------------------------

walks = st.lists(st.floats(-0.04, 0.04), min_size=12, max_size=24).map(np.cumsum)


@settings(max_examples=120, deadline=None)
@given(walks, walks, st.integers(20, 500), st.integers(0, 300), st.floats(-0.05, 0.05),
       st.booleans())
def test_seam_of_random_chunks_is_continuous(first, second, now_ms, late_ms, offset, prefixed):
    player, _ = make_player()
    now = S + now_ms * MS
    player.merge(chunk_of(first), S)
    edge = player.sample(now)
    entry = int(late_ms // 50)
    second = second - second[entry] + edge.positions[0] + offset
    rows = np.stack([second, second - second[entry] + edge.positions[1]], axis=1)
    reason = player.merge(chunk_of(rows, stamp_ns=now - late_ms * MS), now, prefixed=prefixed)
    assume(reason is None)
    joined, just_before = player.sample(now), player.sample(now - 1000)
    assert np.allclose(joined.positions, edge.positions, atol=1e-9)
    assert np.allclose(joined.velocities, edge.velocities, atol=1e-6)
    assert np.allclose(just_before.positions, edge.positions, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-0.05, 0.05), st.integers(50, 300))
@example(0.5, -0.5, 0.0, 50)
@example(0.5, -0.5, 0.05, 50)
def test_seam_stays_within_the_limits_of_the_joint(speed1, speed2, gap, now_ms):
    player, limiter = make_player(velocity=2.0, acceleration=10.0)
    now = S + now_ms * MS
    player.merge(chunk_of(ramp(speed1)), S)
    edge = player.sample(now).positions[0]
    assert player.merge(chunk_of(ramp(speed2, 17, edge + gap), stamp_ns=now), now) is None
    velocity, acceleration = largest_jumps(player, now - 20 * MS, now + 700 * MS)
    assert velocity <= limiter.velocity[0]
    assert acceleration <= limiter.acceleration[0]


def test_merge_leaves_the_curve_before_it_untouched():
    player, _ = make_player()
    player.merge(chunk_of([0.0, 0.1, 0.02, 0.3, 0.1, 0.1, 0.1, 0.1]), S)
    now = S + 130 * MS
    times = range(now - 40 * MS, now, MS)
    before = [player.sample(t).positions for t in times]
    player.merge(chunk_of(ramp(0.1, start=0.2), stamp_ns=now), now)
    assert np.allclose(before, [player.sample(t).positions for t in times], atol=1e-9)


def test_new_chunk_is_exact_after_the_blend():
    player, _ = make_player(blend_s=0.1)
    player.merge(chunk_of(ramp(0.2)), S)
    now = S + 100 * MS
    chunk = chunk_of([0.02, 0.03, 0.05, 0.04, 0.06, 0.08, 0.06, 0.1, 0.12, 0.1], stamp_ns=now)
    player.merge(chunk, now)
    for row in range(8, 9):
        at = player.sample(chunk.step_stamp_ns(row)).positions
        assert np.allclose(at, chunk.positions[row], atol=1e-9)


def test_gap_that_no_blend_can_cross_is_refused_and_the_old_chunk_runs_on():
    player, _ = make_player()
    player.merge(chunk_of(ramp(0.1)), S)
    before = player.sample(S + 200 * MS).positions
    reason = player.merge(chunk_of(ramp(0.1, start=0.6), stamp_ns=S + 100 * MS), S + 100 * MS)
    assert "joint 'a'" in reason and 'blend of 0.5 s' in reason
    assert np.array_equal(player.sample(S + 200 * MS).positions, before)


def test_gap_of_a_snap_joint_is_no_reason_to_refuse():
    player, _ = make_player(snap=NAMES)
    player.merge(chunk_of(ramp(0.1)), S)
    assert player.merge(chunk_of(ramp(0.1, start=2.0), stamp_ns=S), S + 100 * MS) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(walks, min_size=3, max_size=8), st.integers(15, 60))
def test_many_merges_inside_each_others_blends_stay_continuous(walk_list, apart_ms):
    player, _ = make_player()
    now = S
    player.merge(chunk_of(walk_list[0]), now)
    for rows in walk_list[1:]:
        now += apart_ms * MS
        edge = player.sample(now)
        rows = rows - rows[0] + edge.positions[0]
        both = np.stack([rows, np.full_like(rows, edge.positions[1])], axis=1)
        assert player.merge(chunk_of(both, stamp_ns=now), now) is None
        joined = player.sample(now)
        assert np.allclose(joined.positions, edge.positions, atol=1e-9)
        assert np.allclose(joined.velocities, edge.velocities, atol=1e-6)


# -- real-time-chunking prefix -------------------------------------------------------------


def test_remaining_rows_are_due_with_the_rows_of_the_next_chunk():
    player, _ = make_player()
    player.merge(chunk_of([0.0, 0.1, 0.05, 0.3, 0.2, 0.1]), S)
    stamp = S + 70 * MS
    tail = player.remaining(stamp)
    assert tail.stamp_ns == stamp and tail.step_dt_s == 0.05 and tail.horizon == 4
    for row in range(tail.horizon):
        at = player.sample(tail.step_stamp_ns(row)).positions
        assert np.allclose(tail.positions[row], at, atol=1e-12)


def test_nothing_remains_of_an_exhausted_plan():
    player, _ = make_player()
    player.merge(chunk_of([0.0, 0.1]), S)
    assert player.remaining(S + 50 * MS) is None


def test_chunk_that_begins_with_its_prefix_is_followed_exactly_at_once():
    player, _ = make_player(blend_s=0.3)
    player.merge(chunk_of(ramp(0.4)), S)
    stamp, now = S + 100 * MS, S + 250 * MS
    prefix = player.remaining(stamp).positions
    rows = np.concatenate([prefix[:6], prefix[5] + np.zeros((6, 2))])
    chunk = chunk_of(rows, stamp_ns=stamp)
    player.merge(chunk, now, prefixed=True)
    for row in (4, 5, 6):
        at = player.sample(chunk.step_stamp_ns(row)).positions
        assert np.allclose(at, rows[row], atol=1e-6)


def test_prefix_that_does_not_fit_is_blended_after_all():
    player, _ = make_player(blend_s=0.3)
    player.merge(chunk_of(ramp(0.4)), S)
    now = S + 200 * MS
    player.merge(chunk_of(ramp(0.4, start=0.12), stamp_ns=now), now, prefixed=True)
    gap = 0.12 + 0.4 * 0.05 - player.sample(now + 50 * MS).positions[0]
    assert 0.02 < gap <= 0.04  # one step later most of the gap of 0.04 is still there


# -- speed scale ---------------------------------------------------------------------------


def test_speed_scale_stretches_time_and_keeps_the_path():
    player, limiter = make_player()
    limiter.speed_scale = 0.5
    rows = [0.0, 0.1, 0.05, 0.3, 0.2]
    player.merge(chunk_of(rows), S)
    for row, value in enumerate(rows[:-1]):
        assert abs(player.sample(S + row * 100 * MS).positions[0] - value) < 1e-12


def test_prefix_of_a_stretched_plan_keeps_the_step_of_the_policy():
    player, limiter = make_player()
    limiter.speed_scale = 0.5
    player.merge(chunk_of([0.0, 0.1, 0.05, 0.3, 0.2]), S)
    tail = player.remaining(S + 100 * MS)
    assert tail.step_dt_s == 0.05
    assert np.allclose(tail.positions[:, 0], [0.1, 0.05, 0.3, 0.2])


def test_speed_scale_zero_does_not_stretch_for_ever():
    player, limiter = make_player()
    limiter.speed_scale = 0.0
    player.merge(chunk_of([0.0, 0.1]), S)
    assert player.sample(S + S).exhausted


# -- settings and threads ------------------------------------------------------------------


@pytest.mark.parametrize(
    'wrong', [{'blend_s': 0.0}, {'blend_s': 0.6}, {'prefix_tolerance': -1.0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match='expected'):
        PlayerSettings(**wrong)


def test_sampling_while_another_thread_merges_sees_whole_plans_only():
    player, _ = make_player()
    player.merge(chunk_of(np.zeros(17)), S)
    stop, wrong = threading.Event(), []

    def look():
        while not stop.is_set():
            a, b = player.sample(S + 400 * MS).positions
            if abs(a + b) > 1e-12:  # the two joints mirror each other in every chunk
                wrong.append((a, b))

    thread = threading.Thread(target=look)
    thread.start()
    for turn in range(100):
        player.merge(chunk_of(ramp(0.1 * (-1) ** turn, start=0.0)), S + MS * (turn % 50))
    stop.set()
    thread.join(10)
    assert not thread.is_alive() and not wrong
