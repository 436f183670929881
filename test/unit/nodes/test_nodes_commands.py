# SPDX-License-Identifier: Apache-2.0
"""commands.py: what a released controller accepts, and limits that hold between the points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Gripper, load_contract
from quantvla_ros.nodes.commands import (
    Bounds,
    CommandOrder,
    GripperSwitch,
    braking_trajectory,
    joint_order,
    make_chunk,
    make_forward,
    make_trajectory,
)

LEAD_S = 0.02


@st.composite
def motions(draw):
    """A setpoint within its limits, with any velocity: position, velocity, bounds."""
    joints = draw(st.integers(1, 8))
    speed = draw(st.one_of(st.floats(0.0, 3.0), st.floats(0.0, 1e-5)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    velocities = rng.uniform(-speed, speed, joints)
    velocities[rng.random(joints) < 0.2] = 0.0
    lower, upper = rng.uniform(-3, -1, joints), rng.uniform(1, 3, joints)
    positions = rng.uniform(lower, upper)
    at_limit = rng.random(joints)
    positions = np.where(at_limit < 0.2, upper, np.where(at_limit > 0.8, lower, positions))
    return positions, velocities, Bounds(lower, upper, rng.uniform(0.1, 20, joints))


def refused(message, joints):
    """Say why a released joint_trajectory_controller refuses a message, None when it does not."""
    times = [p.time_from_start.sec * 10**9 + p.time_from_start.nanosec for p in message.points]
    if not times:
        return 'empty trajectory'
    if list(message.joint_names) != list(joints):
        return 'joint names'
    if times[0] <= 0:
        return 'a first point at time 0 is a jump'
    if any(later <= sooner for sooner, later in zip(times, times[1:], strict=False)):
        return 'times do not increase'
    if any(value != 0.0 for value in message.points[-1].velocities):
        return 'velocity at the end'
    for point in message.points:
        if len(point.positions) != len(joints) or len(point.velocities) != len(joints):
            return 'width'
        if not np.isfinite([*point.positions, *point.velocities]).all():
            return 'not finite'
        if point.effort:
            return 'effort'
    return None


@given(motions())
@settings(max_examples=200, deadline=None)
def test_released_controller_accepts_every_trajectory(motion):
    joints = [f'j{i}' for i in range(len(motion[0]))]
    message = make_trajectory(joints, braking_trajectory(*motion, LEAD_S))
    assert refused(message, joints) is None


@pytest.mark.parametrize('times', [(), (0.0,), (0.1, 0.1)])
def test_the_check_above_can_fail(times):
    from quantvla_ros.nodes.commands import TrajectoryPoint

    points = [TrajectoryPoint(t, np.zeros(1), np.zeros(1)) for t in times]
    assert refused(make_trajectory(['a'], points), ['a'])


def cubics(points):
    """Coefficients of what the controller lays between two points, with their length in s."""
    for first, second in zip(points, points[1:], strict=False):
        length = second.time_s - first.time_s
        secant = (second.positions - first.positions) / length
        square = (3 * secant - 2 * first.velocities - second.velocities) / length
        cube = (first.velocities + second.velocities - 2 * secant) / length**2
        yield first, square, cube, length


@given(motions())
@settings(max_examples=300, deadline=None)
def test_all_three_limits_hold_between_the_points(motion):
    positions, velocities, bounds = motion
    for first, square, cube, length in cubics(
        braking_trajectory(positions, velocities, bounds, LEAD_S)
    ):
        for share in np.linspace(0, 1, 9):
            t = share * length
            where = first.positions + first.velocities * t + square * t * t + cube * t**3
            speed = first.velocities + 2 * square * t + 3 * cube * t * t
            change = 2 * square + 6 * cube * t
            assert (np.abs(change) <= bounds.acceleration * (1 + 1e-6) + 1e-6).all()
            assert (np.abs(speed) <= np.abs(velocities) * (1 + 1e-6) + 1e-9).all()
            assert (where <= bounds.upper + 1e-9).all()
            assert (where >= bounds.lower - 1e-9).all()


@given(motions())
@settings(max_examples=100, deadline=None)
def test_braking_takes_no_longer_than_it_must(motion):
    positions, velocities, bounds = motion
    last = braking_trajectory(positions, velocities, bounds, LEAD_S)[-1]
    needed = float((np.abs(velocities) / bounds.acceleration).max())
    assert last.time_s <= LEAD_S + needed + 0.001 + 1e-9
    assert not last.velocities.any()


def test_velocity_is_kept_where_there_is_room_and_given_up_at_a_limit():
    bounds = Bounds(np.full(2, -1.0), np.full(2, 1.0), np.full(2, 10.0))
    first = braking_trajectory(np.array([0.0, 1.0]), np.array([0.5, 0.5]), bounds, LEAD_S)[0]
    assert first.velocities.tolist() == [0.5, 0.0]


def test_setpoint_at_rest_is_one_point():
    bounds = Bounds(np.zeros(2), np.full(2, 2.0), np.ones(2))
    points = braking_trajectory(np.ones(2), np.zeros(2), bounds, LEAD_S)
    assert [point.time_s for point in points] == [LEAD_S]


def play(jitter_s, lead_s, seconds=2.0, period_s=0.01, speed=0.5, acceleration=5.0):
    """Desired velocities of a controller that forgets the old trajectory at each message."""
    rng = np.random.default_rng(1)
    position = velocity = 0.0
    speeds = []
    bounds = Bounds(np.array([-9.0]), np.array([9.0]), np.array([acceleration]))
    for index in range(round(seconds / period_s)):
        goal, rate = speed * (index + 1) * period_s, speed
        points = braking_trajectory(
            np.array([goal]), np.array([rate]), bounds, lead_s)
        lasts = period_s + rng.uniform(-jitter_s, jitter_s)
        knots = [(0.0, position, velocity)] + [
            (p.time_s, p.positions[0], p.velocities[0]) for p in points]
        for (t0, p0, v0), (t1, p1, v1) in zip(knots, knots[1:], strict=False):
            if t0 <= lasts <= t1:
                length, t = t1 - t0, lasts - t0
                secant = (p1 - p0) / length
                square, cube = (3 * secant - 2 * v0 - v1) / length, (v0 + v1 - 2 * secant)
                cube /= length**2
                position = p0 + v0 * t + square * t * t + cube * t**3
                velocity = v0 + 2 * square * t + 3 * cube * t * t
                break
        speeds.append(velocity)
    return np.array(speeds[20:])


def test_lead_of_two_periods_carries_a_stream_with_jitter():
    steady = play(jitter_s=0.0, lead_s=0.02)
    np.testing.assert_allclose(steady, 0.5, rtol=0.02)
    assert np.abs(play(jitter_s=0.004, lead_s=0.02) - 0.5).max() < 0.25


def test_joint_order_is_that_of_the_controller():
    assert joint_order(['a', 'b', 'c'], ['c', 'a']).tolist() == [2, 0]
    with pytest.raises(ValueError, match='joints d are not among a, b, c'):
        joint_order(['a', 'b', 'c'], ['d'])


def test_forward_message_holds_plain_numbers():
    assert list(make_forward(np.array([0.5, -1.0])).data) == [0.5, -1.0]


def test_shipped_contract_sends_the_gripper_as_a_joint():
    order = CommandOrder(load_contract('libero_panda'))
    assert order.gripper is None
    assert order.arm.tolist() == list(range(8))


def test_chunk_for_viewers_keeps_stamp_and_steps():
    message = make_chunk(ActionChunk(('a',), np.array([[0.0], [1.0]]), 3_000_000_005, 0.05))
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 5)
    assert [p.time_from_start.nanosec for p in message.points] == [0, 50_000_000]
    assert [list(p.positions) for p in message.points] == [[0.0], [1.0]]


GRIPPER = Gripper('action', 'finger', 0.04, 0.0, 'gripper/command', hysteresis=0.2)


def test_gripper_goal_is_sent_on_change_only():
    switch = GripperSwitch(GRIPPER)
    sent = [switch.update(p) for p in (0.04, 0.04, 0.03, 0.0, 0.0, 0.04)]
    assert sent == [0.04, None, None, 0.0, None, 0.04]


@given(st.lists(st.floats(0.0165, 0.0235), min_size=1, max_size=50))
def test_gripper_that_dithers_around_the_middle_sends_nothing(positions):
    switch = GripperSwitch(GRIPPER)
    switch.update(0.04)
    assert all(switch.update(p) is None for p in positions)


def test_gripper_goal_is_sent_again_after_a_start():
    switch = GripperSwitch(GRIPPER)
    assert switch.update(0.04) == 0.04
    switch.clear()
    assert switch.update(0.04) == 0.04


@given(st.lists(st.floats(-0.1, 0.2), min_size=1, max_size=50))
def test_gripper_goals_are_open_or_closed_and_alternate(positions):
    switch = GripperSwitch(GRIPPER)
    goals = [g for g in map(switch.update, positions) if g is not None]
    assert set(goals) <= {0.04, 0.0}
    assert all(a != b for a, b in zip(goals, goals[1:], strict=False))
