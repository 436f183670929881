# SPDX-License-Identifier: Apache-2.0
"""Position, velocity and acceleration hold at once, for any target and any jitter."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.bench.wire_checker import WireChecker
from quantvla_ros.control.limits import JointLimiter, Motion
from quantvla_ros.control.urdf import Limit

STEPS = st.one_of(
    st.just(0.01), st.floats(0.0005, 0.03), st.sampled_from([0.0005, 0.02, 0.1, 0.5, 3.0])
)
TARGETS = st.one_of(
    st.floats(-3, 3), st.sampled_from([-1.0, 2.0, 1e9, -1e9, 1e308, -1e308, 0.0, 1.9999999])
)
SPEEDS = st.one_of(st.just(0.0), st.floats(-5, 5), st.sampled_from([1e9, -1e9]))
SCALES = st.sampled_from([0.0, 0.05, 0.5, 1.0])
TICKS = st.lists(
    st.tuples(STEPS, TARGETS, SPEEDS, SCALES, st.sampled_from(['follow', 'follow', 'brake'])),
    min_size=1, max_size=80,
)


def limiter_of(velocity=1.5, acceleration=8.0, **more):
    return JointLimiter({'a': Limit(-1.0, 2.0, velocity, acceleration)}, **more)


def checker_of(limiter):
    return WireChecker(limiter.lower, limiter.upper, limiter.velocity, limiter.acceleration)


def seconds_to_ns(seconds):
    return max(1, round(seconds * 1e9))


def drive(limiter, ticks, start, measured=None):
    """Run ticks of (step_s, target, speed, scale, what) and return the checker and the motions."""
    checker, now_ns = checker_of(limiter), 0
    motion = Motion.at_rest(np.array([start]))
    checker.command(now_ns, motion.positions, scale=1.0, start_pose=motion.positions)
    motions = [motion]
    for step_s, target, speed, scale, what in ticks:
        step_ns = seconds_to_ns(step_s)
        now_ns += step_ns
        limiter.speed_scale = scale
        if what == 'brake':
            motion = limiter.brake(motion, step_ns / 1e9)
        else:
            motion, _ = limiter.step(
                motion, np.array([target]), np.array([speed]), step_ns / 1e9, measured=measured
            )
        checker.command(now_ns, motion.positions, scale=scale)
        motions.append(motion)
    return checker, motions


@settings(max_examples=150, deadline=None)
@given(TICKS, st.floats(-1, 2), st.floats(0.05, 10), st.floats(0.5, 50))
def test_no_limit_is_ever_broken_on_the_wire(ticks, start, velocity, acceleration):
    checker, _ = drive(limiter_of(velocity, acceleration), ticks, start)
    assert checker.total == 0, dict(checker.violations)


@settings(max_examples=60, deadline=None)
@given(TICKS, st.floats(-1, 2), st.lists(STEPS, min_size=60, max_size=60))
def test_a_stop_is_possible_from_every_reached_motion(ticks, start, stop_steps):
    limiter = limiter_of()
    stop = [(step_s, 0.0, 0.0, 1.0, 'brake') for step_s in stop_steps]
    stop += [(0.01, 0.0, 0.0, 1.0, 'brake')] * 25
    checker, motions = drive(limiter, [*ticks, *stop], start)
    assert checker.total == 0, dict(checker.violations)
    assert motions[-1].velocities[0] == 0.0


@settings(max_examples=100, deadline=None)
@given(TICKS, st.floats(-0.4, 1.4))
def test_command_stays_near_a_measured_pose_that_stands_still(ticks, start):
    limiter = limiter_of(lead_rad=0.3)
    follow = [(*tick[:4], 'follow') for tick in ticks]
    _, motions = drive(limiter, follow, start, measured=np.array([start]))
    away = max(abs(motion.positions[0] - start) for motion in motions)
    assert away <= 0.3 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_eight_joints_hold_their_own_limits_through_random_targets(seed, jitter):
    rng = np.random.default_rng(seed)
    width = 8
    lower, span = rng.uniform(-3, 0, width), rng.uniform(0.05, 5, width)
    limits = {
        f'j{i}': Limit(lower[i], lower[i] + span[i], rng.uniform(0.1, 4), rng.uniform(1, 30))
        for i in range(width)
    }
    limiter = JointLimiter(limits)
    checker, motion, now_ns = checker_of(limiter), Motion.at_rest(lower + span / 2), 0
    checker.command(0, motion.positions, scale=1.0, start_pose=motion.positions)
    for tick in range(150):
        if tick % 10 == 0:
            target = rng.uniform(lower - 1, lower + span + 1)
        step_ns = round(rng.uniform(1e6, 3e7) if jitter else 1e7)
        now_ns += step_ns
        motion, _ = limiter.step(motion, target, rng.normal(0, 2, width), step_ns / 1e9)
        checker.command(now_ns, motion.positions, scale=1.0)
    assert checker.total == 0, dict(checker.violations)


def test_feasible_motion_is_passed_through_exactly():
    limiter, motion = limiter_of(), Motion.at_rest(np.array([0.0]))
    for tick in range(1, 400):
        t = tick * 0.01
        target = 0.5 - 0.5 * math.cos(t)  # acceleration 0.5, velocity 0.5
        motion, clipped = limiter.step(
            motion, np.array([target]), np.array([0.5 * math.sin(t)]), 0.01
        )
        assert abs(motion.positions[0] - target) < 1e-12
        assert not clipped.any()


def test_far_target_is_reached_without_overshoot_and_stays():
    limiter, motion = limiter_of(), Motion.at_rest(np.array([-1.0]))
    highest = -1.0
    for _ in range(600):
        motion, clipped = limiter.step(motion, np.array([1.0]), np.zeros(1), 0.01)
        highest = max(highest, motion.positions[0])
    assert abs(motion.positions[0] - 1.0) < 1e-6 and not clipped.any()
    assert highest < 1.0 + 1e-6


def test_target_beyond_the_limit_ends_at_the_limit_and_counts_as_clipped():
    limiter, motion = limiter_of(), Motion.at_rest(np.array([0.0]))
    for _ in range(600):
        motion, clipped = limiter.step(motion, np.array([2.5]), np.zeros(1), 0.01)
    assert abs(motion.positions[0] - 2.0) < 1e-6
    assert clipped.all()


def test_snap_joint_is_limited_but_never_called_clipped():
    limiter = limiter_of(snap_joints=('a',))
    motion, clipped = limiter.step(
        Motion.at_rest(np.zeros(1)), np.array([2.0]), np.zeros(1), 0.01
    )
    assert motion.positions[0] < 0.001 and not clipped.any()


def test_speed_scale_bounds_the_speed_that_is_reached():
    limiter, motion = limiter_of(), Motion.at_rest(np.array([-1.0]))
    limiter.speed_scale = 0.2
    fastest = 0.0
    for _ in range(150):
        motion, _ = limiter.step(motion, np.array([2.0]), np.zeros(1), 0.01)
        fastest = max(fastest, motion.velocities[0])
    assert 0.29 < fastest <= 0.3


def test_speed_scale_is_gentle_when_gaining_speed_and_never_weakens_braking():
    limiter = limiter_of(velocity=2.0, acceleration=8.0)
    limiter.speed_scale = 0.25
    motion, slow = Motion.at_rest(np.zeros(1)), []
    for _ in range(10):
        motion, _ = limiter.step(motion, np.array([2.0]), np.zeros(1), 0.01)
        slow.append(motion.velocities[0])
    assert np.diff(slow).max() <= 8.0 * 0.25 * 0.01
    moving = Motion(np.zeros(1), np.array([-1.0]), 0.01)
    after, _ = limiter.step(moving, np.array([2.0]), np.zeros(1), 0.01)
    assert after.velocities[0] + 1.0 > 8.0 * 0.99 * 0.01
    turning, _ = limiter.step(
        Motion(np.zeros(1), np.array([-0.02]), 0.01), np.array([2.0]), np.zeros(1), 0.01
    )
    assert 0 < turning.velocities[0] <= 0.25 * 0.06


def test_speed_scale_zero_brings_a_moving_joint_to_rest_within_its_acceleration():
    limiter = limiter_of()
    ticks = [(0.01, 2.0, 0.0, 1.0, 'follow')] * 60 + [(0.01, 2.0, 0.0, 0.0, 'follow')] * 60
    checker, motions = drive(limiter, ticks, -1.0)
    assert motions[60].velocities[0] > 1.0 and motions[-1].velocities[0] == 0.0
    assert checker.total == 0


def test_braking_joints_slow_down_together_along_their_path():
    limiter = JointLimiter({'a': Limit(-9, 9, 2, 10), 'b': Limit(-9, 9, 2, 10)})
    motion = Motion(np.zeros(2), np.array([1.0, 0.5]), 0.01)
    for _ in range(5):
        motion = limiter.brake(motion, 0.01)
        assert abs(motion.velocities[0] - 2 * motion.velocities[1]) < 1e-12
        assert abs(motion.positions[0] - 2 * motion.positions[1]) < 1e-12


def test_values_that_leave_the_limiter_cannot_be_changed():
    motion, _ = limiter_of().step(Motion.at_rest(np.zeros(1)), np.ones(1), np.zeros(1), 0.01)
    assert not motion.positions.flags.writeable and not motion.velocities.flags.writeable
