# SPDX-License-Identifier: Apache-2.0
"""One recorded cause for every stop, a latched e-stop, and what is refused before it is a plan."""

import threading
from dataclasses import fields

import numpy as np
import pytest
from hand_moved_arm import HOME, STALE, Arm

from quantvla_ros.control.clock import ManualClock
from quantvla_ros.control.guard import Guard, GuardSettings
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.types import State
from quantvla_ros.control.urdf import Limit

# -- one cause -----------------------------------------------------------------------------


def test_first_cause_wins():
    arm = Arm().run()
    assert arm.guard.stop('first', 'the first') is True
    assert arm.guard.stop('second', 'the second') is False
    arm.tick(faults=[STALE])
    assert arm.guard.cause.kind == 'first' and arm.guard.counts['stops'] == 1


def test_cause_carries_its_header_time_and_is_cleared_by_the_next_start():
    arm = Arm(hold_s=0.1).run()
    arm.guard.stop('asked', 'asked')
    assert arm.guard.cause.stamp_ns == arm.clock.now_ns()
    arm.settle()
    arm.player.clear()
    arm.guard.start(arm.pose)
    assert arm.guard.cause is None


def test_stop_when_nothing_runs_records_nothing():
    arm = Arm()
    assert arm.guard.stop('asked', 'asked') is False and arm.guard.cause is None


def test_many_threads_record_one_cause():
    for _ in range(20):
        arm = Arm()
        arm.guard.start(arm.pose)
        arm.tick()
        gate, won = threading.Barrier(8), []

        def push(kind, arm=arm, gate=gate, won=won):
            gate.wait(10)
            if arm.guard.stop(kind, kind):
                won.append(kind)

        threads = [threading.Thread(target=push, args=(f'k{i}',)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert won == [arm.guard.cause.kind]


# -- e-stop --------------------------------------------------------------------------------


def test_estop_stops_latches_and_refuses_a_start():
    arm = Arm(hold_s=0.1).run()
    arm.guard.estop('button pressed')
    arm.settle()
    assert arm.guard.cause.kind == 'estop' and arm.guard.latch.sentence == 'button pressed'
    with pytest.raises(ValueError, match='e-stop is latched .button pressed.'):
        arm.guard.start(arm.pose)


def test_estop_latches_without_motion_and_beside_another_cause():
    arm = Arm()
    arm.guard.estop('pressed')
    assert arm.guard.state is State.INACTIVE and arm.guard.latch is not None
    moving = Arm().run()
    moving.guard.stop('asked', 'asked')
    moving.guard.estop('pressed')
    assert moving.guard.cause.kind == 'asked' and moving.guard.latch.kind == 'estop'


def test_reset_is_refused_during_the_cooldown():
    arm = Arm(estop_cooldown_s=0.5)
    arm.guard.estop('pressed')
    arm.clock.advance(0.4)
    with pytest.raises(ValueError, match='reset again in 0.10 s'):
        arm.guard.reset()
    assert arm.guard.latch is not None


def test_pressing_again_restarts_the_cooldown():
    arm = Arm(estop_cooldown_s=0.5)
    arm.guard.estop('pressed')
    arm.clock.advance(0.4)
    arm.guard.estop('pressed again')
    arm.clock.advance(0.2)
    with pytest.raises(ValueError, match='reset again'):
        arm.guard.reset()
    assert arm.guard.latch.sentence == 'pressed'


def test_reset_is_refused_while_the_arm_still_decelerates():
    arm = Arm(estop_cooldown_s=0.0).run()
    arm.guard.estop('pressed')
    with pytest.raises(ValueError, match='still decelerating'):
        arm.guard.reset()


def test_reset_never_moves_the_arm():
    arm = Arm(hold_s=0.1).run()
    arm.guard.estop('pressed')
    arm.settle()
    arm.guard.reset()
    assert arm.guard.latch is None and arm.guard.state is State.SILENT
    assert arm.ticks(20) == [None] * 20
    arm.player.clear()
    arm.guard.start(arm.pose)
    assert np.array_equal(arm.tick().positions, arm.pose)


def test_reset_without_a_latch_does_nothing():
    Arm().guard.reset()


# -- chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('rows', 'more', 'kind'),
    [
        (np.zeros((4, 1)), {'names': ('a',)}, 'wrong_width'),
        (np.zeros((4, 2)), {'names': ('b', 'a')}, 'wrong_names'),
        ([0.0, np.nan, 0.1], {}, 'non_finite'),
        ([0.0, np.inf, 0.1], {}, 'non_finite'),
        ([0.0, 0.1], {'step_s': np.inf}, 'non_finite'),
        ([0.0, 0.1, 0.7, 0.8], {}, 'huge_step'),
        ([0.6, 0.6], {}, 'huge_step'),
        ([0.0, 1e308, -1e308], {}, 'huge_step'),
        ([0.0, 0.1], {'stamp_ns': 60 * 10**9}, 'future'),
    ],
)
def test_nonsense_is_refused_and_too_much_of_it_stops_with_its_cause(rows, more, kind):
    arm = Arm(max_refusals=3)
    arm.guard.start(arm.pose)
    arm.tick()
    for _ in range(2):
        assert arm.guard.admit(arm.chunk(rows, **more)) is not None
        assert arm.guard.state is State.RUNNING
    assert arm.guard.admit(arm.chunk(rows, **more)) is not None
    assert arm.guard.cause.kind == kind
    assert '3 chunks refused in a row' in arm.guard.cause.sentence
    assert arm.guard.counts['refused'] == {kind: 3}


def test_a_good_chunk_forgives_earlier_refusals():
    arm = Arm(max_refusals=2)
    arm.guard.start(arm.pose)
    arm.tick()
    for _ in range(5):
        arm.guard.admit(arm.chunk([0.0, np.nan]))
        assert arm.guard.admit(arm.chunk([0.0, 0.1])) is None
    assert arm.guard.state is State.RUNNING


def test_plan_that_runs_out_after_a_refusal_says_what_was_refused():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.tick()
    arm.merge([0.0, 0.01, 0.02])
    arm.tick()
    arm.merge([0.0, np.nan, 0.1])
    arm.ticks(20)
    assert arm.guard.cause.kind == 'non_finite'
    assert 'ran out' in arm.guard.cause.sentence and "row 1 of 'a'" in arm.guard.cause.sentence


def test_late_chunk_noted_by_the_caller_explains_the_stop():
    arm = Arm(first_chunk_s=0.1)
    arm.guard.start(arm.pose)
    arm.guard.refused('late', 'chunk is late: 2 s')
    arm.ticks(15)
    assert arm.guard.cause.kind == 'late' and '2 s' in arm.guard.cause.sentence


def test_only_the_first_reachable_row_is_compared_with_the_last_command():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.tick()
    early = arm.clock.now_ns() - 100_000_000
    assert arm.guard.admit(arm.chunk([-0.8, -0.4, 0.0, 0.3], stamp_ns=early)) is None
    assert arm.guard.admit(arm.chunk([0.0, 0.4, 0.8, 1.2], stamp_ns=early)) is not None


def test_step_of_a_snap_joint_may_cross_its_range_but_not_more():
    arm = Arm(snap=('a',))
    assert arm.guard.admit(arm.chunk([[-1.9, 0.0], [1.9, 0.0]])) is None
    assert 'joint' in arm.guard.admit(arm.chunk([[-1.9, 0.0], [9.0, 0.0]]))


def test_overshoot_is_clipped_and_counted_by_joint():
    arm = Arm()
    arm.guard.start(arm.pose)
    arm.tick()
    rows = np.stack([HOME[0] + 0.2 * np.arange(20), np.full(20, HOME[1])], axis=1)
    arm.merge(rows)  # 4 rad/s, beyond the 2 rad/s of the joint
    arm.ticks(30)
    clipped = arm.guard.counts['clipped']
    assert clipped['a'] > 20 and clipped['b'] == 0 and arm.checker.total == 0


def test_long_clipping_stops_with_its_figures():
    arm = Arm(long_clip_s=0.5, start_ramp_s=0.0)
    arm.guard.start(arm.pose)
    arm.tick()
    arm.merge(np.stack([np.minimum(HOME[0] + 0.15 * np.arange(99), 6), np.zeros(99) - 0.3], 1))
    arm.ticks(250)
    assert arm.guard.cause.kind == 'clipping' and 'at most 0.5 s' in arm.guard.cause.sentence
    arm.settle()


def test_clipping_during_the_slow_start_does_not_stop():
    arm = Arm(long_clip_s=0.2, start_ramp_s=2.0)
    arm.guard.start(arm.pose)
    arm.tick()
    arm.merge(np.full(60, 0.45))
    arm.ticks(60)
    assert arm.guard.counts['clipped']['a'] > 40 and arm.guard.state is State.RUNNING


def test_clipping_because_the_operator_stands_the_arm_still_does_not_stop():
    arm = Arm(long_clip_s=0.3).run()
    arm.limiter.speed_scale = 0.0
    arm.ticks(150)
    assert arm.guard.state is State.RUNNING and arm.sent[-1].velocities[0] == 0.0
    assert arm.checker.total == 0


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize('name', [item.name for item in fields(GuardSettings)])
def test_impossible_settings_are_refused_by_name(name):
    for value in (-1, float('nan')):
        with pytest.raises(ValueError, match=name):
            GuardSettings(**{name: value})


@pytest.mark.parametrize(
    'wrong', [{'start_speed': 1.1}, {'max_refusals': 0}, {'min_tick_s': 0.2}]
)
def test_settings_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GuardSettings(**wrong)


def test_guard_and_limiter_must_agree_on_the_joints():
    limiter = JointLimiter({'a': Limit(-1, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"guard for \['b'\]"):
        Guard(['b'], limiter, GuardSettings(), ManualClock())
