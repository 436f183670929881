# SPDX-License-Identifier: Apache-2.0
"""Nothing that breaks a limit reaches the wire, and the judge would notice if it did."""

import json

import numpy as np
import pytest
from hand_moved_arm import DT, STALE, Arm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from quantvla_ros.bench.control import LIMITS, hostile_limiter, run_hostile
from quantvla_ros.bench.wire_checker import KINDS, WireChecker
from quantvla_ros.cli import main
from quantvla_ros.control.limits import JointLimiter, Motion
from quantvla_ros.control.types import State

# -- the judge -----------------------------------------------------------------------------


def judged(positions, times_s=None, start=0.0, scale=1.0):
    """Judge a stream of one joint within -1..1, velocity 1 and acceleration 10."""
    checker = WireChecker([-1.0], [1.0], [1.0], [10.0])
    times_s = times_s or [DT * i for i in range(len(positions))]
    for index, (position, time_s) in enumerate(zip(positions, times_s, strict=True)):
        checker.command(
            round(time_s * 1e9), np.atleast_1d(np.array(position, float)), scale=scale,
            start_pose=np.array([start]) if index == 0 else None,
        )
    return checker


def violated(checker):
    return {kind for kind, count in checker.violations.items() if count}


@pytest.mark.parametrize(
    ('positions', 'kinds'),
    [
        ([0.0, 0.0002, 0.0008], set()),
        ([0.0, np.nan], {'finite'}),
        ([0.0, [0.0, 0.0]], {'width'}),
        ([0.1], {'first_pose'}),
        ([0.0, 0.002], {'acceleration'}),
        ([0.0, 0.0004, 0.0008, 0.0001], {'acceleration'}),
        ([0.0, 0.5, 1.1], {'position', 'velocity', 'acceleration', 'scaled_velocity'}),
    ],
)
def test_judge_names_each_kind_of_violation(positions, kinds):
    assert violated(judged(positions)) == kinds


def test_judge_sees_silence_in_motion_but_not_at_rest():
    moving, resting = judged([0.0, 0.0004]), judged([0.0, 0.0004, 0.0004])
    moving.silence()
    resting.silence()
    assert violated(moving) == {'silence_in_motion'} and not violated(resting)


def test_judge_sees_two_commands_at_one_time():
    assert violated(judged([0.0, 0.0], [0.0, 0.0])) == {'acceleration'}


def test_judge_takes_the_real_times_of_the_ticks():
    even, late = [0.0, 0.0, 0.0005], [0.0, DT, 3 * DT]
    assert not violated(judged(even)) and not violated(judged(even, late))
    assert violated(judged(even, [0.0, DT, 1.3 * DT])) == {'acceleration'}


def test_judge_holds_the_stream_to_the_speed_scale():
    speeding = np.cumsum([0.0005, 0.0010, 0.0015, 0.0020, 0.0025, 0.0030, 0.0035]) - 0.0005
    # from rest with 5 rad/s^2: never too fast for the joint, but for a scale of 0.01
    times = [DT * i for i in range(len(speeding))]
    checker = WireChecker([-1.0], [1.0], [1.0], [10.0])
    for index, (position, time_s) in enumerate(zip(speeding, times, strict=True)):
        checker.command(round(time_s * 1e9), np.array([position]), scale=0.01,
                        start_pose=np.array([0.0]) if index == 0 else None)
    # right after the start the judge still grants what braking from full speed would need
    assert 'scaled_velocity' not in violated(checker)
    for index in range(20):
        checker.command(round((times[-1] + DT * (index + 1)) * 1e9),
                        np.array([speeding[-1] + 0.0035 * (index + 1)]), scale=0.01)
    assert 'scaled_velocity' in violated(checker)


# -- limiters that are broken on purpose ------------------------------------------------------


class IgnoresAcceleration(JointLimiter):
    def _advance(self, motion, wanted, step_s, scale):
        positions = np.clip(motion.positions + wanted * step_s, self.lower, self.upper)
        return Motion(positions, wanted, step_s)


class IgnoresVelocity(JointLimiter):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._velocity = self._velocity * 1.001


class BrakesTooLate(JointLimiter):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._brakes = self._brakes * 1.5


class AllowsAMillimetreMore(JointLimiter):
    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.upper = self.upper + 0.001


class ForgetsJitter(JointLimiter):
    def step(self, motion, target, target_velocity, step_s, **more):
        return super().step(motion, target, target_velocity, DT, **more)


class ForgetsTheSpeedScale(JointLimiter):
    @property
    def speed_scale(self):
        return self._asked

    @speed_scale.setter
    def speed_scale(self, value):
        self._asked = value

    _asked = 1.0


@pytest.mark.parametrize(
    ('broken', 'kind'),
    [
        (IgnoresAcceleration, 'acceleration'),
        (IgnoresVelocity, 'velocity'),
        (BrakesTooLate, 'acceleration'),
        (AllowsAMillimetreMore, 'position'),
        (ForgetsJitter, 'acceleration'),
        (ForgetsTheSpeedScale, 'scaled_velocity'),
    ],
)
def test_judge_catches_a_broken_limiter(broken, kind):
    report = run_hostile(2000, seed=1, limiter=broken(LIMITS, snap_joints=('finger',)))
    assert report.violations[kind] > 0


# -- the real one ----------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_hostile_run_of_a_thousand_commands_violates_nothing(seed):
    report = run_hostile(1000, seed)
    assert sum(report.violations.values()) == 0, report.violations


def test_hostile_run_reaches_every_state_and_stops_for_many_causes():
    report = run_hostile(5000, seed=0)
    assert {state.value for state in State} <= set(report.states)
    assert len(report.causes) >= 8 and report.streams > 30
    assert min(report.chunks['merged'], report.chunks['refused']) > 20
    assert sum(report.clipped.values()) > 1000
    assert sum(report.violations.values()) == 0


def test_same_seed_gives_the_same_run():
    first, second = run_hostile(500, 7), run_hostile(500, 7)
    assert (first.causes, first.clipped, first.nearest) == (
        second.causes, second.clipped, second.nearest
    )


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Hypothesis chooses what happens and when; the judge watches the wire all the time."""

    def __init__(self):
        super().__init__()
        self.arm = Arm(
            hold_s=0.05, start_ramp_s=0.1, long_clip_s=0.2, first_chunk_s=0.5,
            estop_cooldown_s=0.02,
        )

    @rule(count=st.integers(1, 40), step_s=st.floats(0.001, 0.04))
    def tick(self, count, step_s):
        self.arm.ticks(count, step_s=step_s)

    @rule(steps=st.lists(st.floats(0.0005, 0.3), min_size=1, max_size=10))
    def tick_with_jitter(self, steps):
        for step_s in steps:
            self.arm.tick(step_s=step_s)

    @rule(
        rows=st.lists(st.tuples(st.floats(-0.4, 0.4), st.floats(-0.4, 0.4)), min_size=2,
                      max_size=12),
        late_ms=st.integers(-100, 400),
        step_s=st.sampled_from([0.02, 0.05, 0.2]),
    )
    def chunk_around_the_pose(self, rows, late_ms, step_s):
        rows = np.array(rows) + self.arm.pose
        self.arm.merge(rows, stamp_ns=self.arm.clock.now_ns() - late_ms * 10**6, step_s=step_s)

    @rule(goal=st.sampled_from([-2.5, -2.0, 2.0, 2.5]))
    def chunk_straight_at_a_limit(self, goal):
        pose = self.arm.pose
        self.arm.merge(pose + (goal - pose) * np.linspace(0, 1, 12)[:, None])

    @rule(bad=st.sampled_from([np.nan, np.inf, 1e308, 5.0]), row=st.integers(0, 3))
    def chunk_of_nonsense(self, bad, row):
        rows = np.tile(self.arm.pose, (4, 1))
        rows[row, 0] = bad
        assert self.arm.merge(rows) is not None

    @rule()
    def start(self):
        self.arm.player.clear()
        try:
            self.arm.guard.start(self.arm.pose)
        except ValueError:
            assert self.arm.guard.latch is not None or not self.arm.guard.at_rest

    @rule()
    def stop(self):
        self.arm.guard.stop('asked', 'asked')

    @rule()
    def estop(self):
        self.arm.guard.estop('pressed')
        assert self.arm.guard.latch is not None

    @rule()
    def reset(self):
        state = self.arm.guard.state
        try:
            self.arm.guard.reset()
        except ValueError:
            assert self.arm.guard.latch is not None
        assert self.arm.guard.state is state

    @rule(scale=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    def change_the_speed_scale(self, scale):
        self.arm.limiter.speed_scale = scale

    @rule(seconds=st.floats(-2, 2))
    def jump_the_header_clock(self, seconds):
        self.arm.clock.jump(seconds)

    @rule()
    def camera_goes_stale(self):
        self.arm.tick(faults=[STALE])

    @rule(push=st.floats(-0.7, 0.7))
    def push_the_arm(self, push):
        self.arm.pose = np.clip(self.arm.pose + push, -1.9, 1.9)

    @invariant()
    def wire_is_clean(self):
        assert self.arm.checker.total == 0, dict(self.arm.checker.violations)

    @invariant()
    def at_rest_means_at_rest(self):
        guard = self.arm.guard
        assert not (guard.state in (State.HOLDING, State.SILENT) and guard.moving)

    @invariant()
    def every_stop_has_a_cause(self):
        guard = self.arm.guard
        stopped = guard.state in (State.STOPPING, State.HOLDING, State.SILENT)
        assert stopped == (guard.cause is not None)


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


# -- the command -----------------------------------------------------------------------------


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / 'report.json'
    assert main(['bench', 'control', '--commands', '400', '--json', str(path)]) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS) and 'p99' in printed
    report = json.loads(path.read_text())
    assert report['commands'] >= 400 and set(report['violations']) == set(KINDS)


def test_command_fails_when_anything_is_violated(monkeypatch):
    monkeypatch.setattr(
        'quantvla_ros.bench.control.hostile_limiter', lambda: IgnoresAcceleration(LIMITS)
    )
    assert main(['bench', 'control', '--commands', '400']) == 1


def test_command_refuses_an_impossible_count(capsys):
    assert main(['bench', 'control', '--commands', '0']) == 2
    assert 'expected at least 1' in capsys.readouterr().err


def test_judge_and_limiter_are_given_the_same_limits():
    limiter = hostile_limiter()
    assert limiter.joint_names == tuple(LIMITS)
