# SPDX-License-Identifier: Apache-2.0
"""How the guard starts, stops and starts again: bounded, decelerated, never by itself."""

import numpy as np
import pytest
from hand_moved_arm import DT, HOME, STALE, Arm

from quantvla_ros.control.types import Fault, Sample, State

# -- starting ------------------------------------------------------------------------------


def test_nothing_is_published_before_a_start():
    arm = Arm()
    arm.merge([0.0, 0.1])
    assert arm.ticks(5) == [None] * 5
    assert arm.guard.state is State.INACTIVE and arm.guard.cause is None


def test_first_command_equals_the_measured_pose():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.pose = HOME + 0.01  # it sank a little before the first tick
    first = arm.tick()
    assert np.array_equal(first.positions, HOME + 0.01)
    assert np.array_equal(first.velocities, [0, 0])
    assert first.stamp_ns == arm.clock.now_ns()


def test_start_waits_for_the_first_chunk_at_the_measured_pose():
    arm = Arm()
    arm.guard.start(arm.pose)
    assert all(np.array_equal(s.positions, HOME) for s in arm.ticks(50))


def test_first_motion_is_slow_and_grows():
    arm = Arm(start_speed=0.1, start_ramp_s=1.0)
    arm.guard.start(arm.pose)
    arm.tick()
    arm.merge(np.full(60, 0.45))
    arm.ticks(95)
    speeds = np.array([np.abs(s.velocities).max() for s in arm.sent])
    times = DT * np.arange(len(speeds))
    assert (speeds <= 2.0 * (0.1 + 0.9 * times) + 1e-9).all() and speeds.max() > 0.3
    assert arm.checker.total == 0


@pytest.mark.parametrize(
    ('pose', 'word'),
    [
        (None, 'no joint positions'),
        (np.array([0.1, np.nan]), 'b is not a number'),
        (np.zeros(3), r'shape \(3,\)'),
        (np.array([2.1, 0.0]), "joint 'a' is at 2.100, outside"),
    ],
)
def test_start_refuses_a_pose_it_cannot_start_from(pose, word):
    arm = Arm()
    with pytest.raises(ValueError, match=word):
        arm.guard.start(pose)
    assert arm.guard.state is State.INACTIVE and arm.tick() is None


def test_start_a_little_outside_begins_at_the_limit():
    arm = Arm()
    arm.pose = np.array([2.015, 0.0])
    arm.guard.start(arm.pose)
    assert np.array_equal(arm.tick().positions, [2.0, 0.0])
    assert arm.checker.total == 0


def test_start_needs_fresh_data():
    arm = Arm()
    with pytest.raises(ValueError, match='camera: stamped 0.3 s ago'):
        arm.guard.start(arm.pose, [STALE])


def test_start_while_running_or_stopping_is_refused():
    arm = Arm().run()
    with pytest.raises(ValueError, match='the arm is running'):
        arm.guard.start(arm.pose)
    arm.guard.stop('asked', 'asked')
    with pytest.raises(ValueError, match='the arm is stopping'):
        arm.guard.start(arm.pose)


def test_pose_that_turns_bad_before_the_first_tick_publishes_nothing():
    arm = Arm()
    arm.guard.start(arm.pose)
    assert arm.tick(measured=np.array([np.nan, 0.0])) is None
    assert arm.guard.state is State.SILENT and arm.guard.cause.kind == 'measured'


def test_stop_before_the_first_tick_publishes_nothing():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.guard.stop('asked', 'changed my mind')
    assert arm.ticks(3) == [None] * 3 and arm.guard.state is State.SILENT


# -- stopping ------------------------------------------------------------------------------


def test_stop_decelerates_along_the_motion_holds_and_falls_silent():
    arm = Arm(hold_s=0.5).run()
    speed = arm.sent[-1].velocities[0]
    arm.guard.stop('asked', 'somebody asked')
    first = arm.tick()
    assert arm.guard.state is State.STOPPING
    assert 0 < first.velocities[0] < speed
    arm.ticks(20)
    assert arm.guard.state is State.HOLDING
    rest = arm.sent[-1].positions
    holding = arm.ticks(30)
    assert all(np.array_equal(s.positions, rest) for s in holding)
    arm.settle()
    assert 0.49 < DT * sum(np.array_equal(s.positions, rest) for s in arm.sent) < 0.55


@pytest.mark.parametrize('kind', ['stale', 'silent', 'frozen', 'backwards', 'clock_jump'])
def test_faulty_input_stops_within_one_period_with_its_cause(kind):
    arm = Arm().run()
    speed = arm.sent[-1].velocities[0]
    setpoint = arm.tick(faults=[Fault('camera', kind, f'camera is {kind}'), STALE])
    assert setpoint.velocities[0] < speed
    assert (arm.guard.cause.kind, arm.guard.cause.sentence) == (kind, f'camera is {kind}')
    arm.settle()


def test_fault_that_passes_does_not_resume_the_arm():
    arm = Arm(hold_s=0.2).run()
    arm.tick(faults=[STALE])
    arm.settle()
    assert arm.ticks(10) == [None] * 10


def test_plan_that_runs_out_stops_at_once():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.tick()
    arm.merge(0.01 * np.arange(30))
    while arm.guard.state is State.RUNNING:
        arm.tick()
    assert arm.guard.cause.kind == 'exhausted'
    assert arm.clock.now_ns() - arm.player._running.plan.end_ns <= 2 * DT * 1e9
    arm.settle()


def test_cleared_plan_stops_the_arm():
    arm = Arm().run()
    arm.player.clear()
    arm.tick()
    assert arm.guard.cause.kind == 'exhausted'
    arm.settle()


def test_no_first_chunk_stops_after_the_stated_time():
    arm = Arm(first_chunk_s=0.5)
    arm.guard.start(arm.pose)
    arm.ticks(50)
    assert arm.guard.state is State.RUNNING
    arm.ticks(3)
    assert arm.guard.cause.kind == 'no_chunk' and '0.5' in arm.guard.cause.sentence


@pytest.mark.parametrize('measured', [None, np.zeros(1), np.array([np.nan, 0.0])])
def test_bad_joint_positions_stop_the_arm(measured):
    arm = Arm().run()
    arm.tick(measured=measured)
    assert arm.guard.cause.kind in ('measured', 'tracking')
    arm.settle()


def test_late_control_tick_stops_within_the_acceleration_limit():
    arm = Arm(max_tick_gap_s=0.1).run()
    arm.tick(step_s=0.15)
    assert arm.guard.cause.kind == 'late_tick' and '0.150 s' in arm.guard.cause.sentence
    arm.settle()


def test_tick_too_soon_publishes_nothing_and_does_not_stop():
    arm = Arm().run()
    sent = len(arm.sent)
    arm.clock.advance(0.0001)
    assert arm.guard.tick(arm.player.sample(arm.clock.now_ns()), arm.pose) is None
    assert arm.guard.counts['skipped'] == 1 and arm.guard.state is State.RUNNING
    arm.ticks(5)
    assert len(arm.sent) == sent + 5 and arm.checker.violations['acceleration'] == 0


def test_header_clock_jump_does_not_bend_the_stop():
    arm = Arm().run()
    arm.clock.jump(-3.0)
    arm.tick(faults=[Fault('clock', 'clock_jump', 'jumped')])
    arm.settle()
    assert arm.guard.cause.kind == 'clock_jump'


def test_blocked_arm_is_not_pushed_beyond_the_lead_and_stops():
    arm = Arm(lead_rad=0.1, long_clip_s=0.5).run()
    arm.blocked, stuck = True, arm.pose.copy()
    arm.ticks(200)
    assert arm.guard.cause.kind == 'clipping'
    assert max(np.abs(s.positions - stuck).max() for s in arm.sent[-200:]) <= 0.1 + 1e-6


def test_arm_that_moves_away_from_its_command_stops():
    arm = Arm(lead_rad=0.1).run()
    arm.tick(measured=arm.pose + np.array([0.0, 0.2]))
    assert arm.guard.cause.kind == 'tracking' and "joint 'b'" in arm.guard.cause.sentence


def test_plan_with_a_value_that_is_not_a_number_stops_and_never_reaches_the_wire():
    arm = Arm().run()
    arm.clock.advance(DT)
    bad = Sample(np.array([np.nan, 0.0]), np.zeros(2), 5, False)
    setpoint = arm.guard.tick(bad, arm.pose)
    assert np.isfinite(setpoint.positions).all() and arm.guard.cause.kind == 'non_finite'


# -- resuming ------------------------------------------------------------------------------


@pytest.mark.parametrize('wait', [30, 400])
def test_resume_starts_from_the_measured_pose_not_from_the_old_command(wait):
    arm = Arm().run()
    arm.guard.stop('asked', 'asked')
    arm.ticks(wait)
    arm.pose = arm.pose + np.array([0.05, -0.02])  # pushed by hand
    arm.player.clear()
    arm.guard.start(arm.pose)
    assert np.array_equal(arm.tick().positions, arm.pose)
    arm.merge(np.tile(arm.pose, (40, 1)))
    arm.ticks(100)
    assert arm.checker.total == 0 and arm.guard.counts['starts'] == 2


def test_start_that_overtakes_the_last_holding_tick_wins(monkeypatch):
    arm = Arm(hold_s=0.1).run()
    arm.guard.stop('asked', 'asked')
    become = arm.guard._become

    def overtaken(state):
        if state is State.SILENT:
            arm.guard.start(arm.pose)
        become(state)

    monkeypatch.setattr(arm.guard, '_become', overtaken)
    while arm.guard.state is not State.RUNNING:
        arm.tick()
    assert np.array_equal(arm.tick().positions, arm.pose)


def test_deactivated_arm_can_be_ticked_until_it_is_at_rest():
    arm = Arm().run()
    arm.guard.stop('deactivated', 'the node was deactivated')
    count = 0
    while not arm.guard.at_rest:
        arm.tick()
        count += 1
    assert count <= 20 and np.array_equal(arm.sent[-1].velocities, [0, 0])
