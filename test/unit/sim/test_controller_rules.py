# SPDX-License-Identifier: Apache-2.0
"""Which trajectories joint_trajectory_controller refuses, rule by rule."""

from dataclasses import replace

import pytest

from quantvla_ros.action import NS_PER_S
from quantvla_ros.sim.controller_rules import (
    RULES,
    Expectation,
    Point,
    TrajectoryMessage,
    refusal,
)

JOINTS = ('a', 'b')
NOW = Expectation(JOINTS, now_ns=100 * NS_PER_S)


def point(time_s, positions=(0.1, 0.2), **fields):
    return Point(round(time_s * NS_PER_S), tuple(positions), **fields)


GOOD = TrajectoryMessage(JOINTS, (point(0.1), point(0.2)))


def test_a_plain_trajectory_is_accepted():
    assert refusal(GOOD, NOW) is None


def test_joints_may_come_in_another_order():
    assert refusal(replace(GOOD, joint_names=('b', 'a')), NOW) is None


def test_a_first_point_at_time_zero_is_accepted_although_it_jumps():
    assert refusal(replace(GOOD, points=(point(0.0), point(0.1))), NOW) is None


def test_a_trajectory_partly_in_the_past_is_accepted():
    late = replace(GOOD, stamp_ns=NOW.now_ns - round(0.15 * NS_PER_S))
    assert refusal(late, NOW) is None


def test_a_number_that_is_not_finite_passes_as_it_does_in_the_released_controller():
    assert refusal(replace(GOOD, points=(point(0.1, (float('nan'), 0.0)),)), NOW) is None


BROKEN = {
    'no_joint_names': (replace(GOOD, joint_names=()), 'empty joint names'),
    'no_points': (replace(GOOD, points=()), 'empty trajectory'),
    'wholly_in_the_past': (replace(GOOD, stamp_ns=NS_PER_S), 'in the past'),
    'unknown_joints': (
        TrajectoryMessage(('a', 'b', 'c'), (point(0.1, (0, 0, 0)),)), "'c'"),
    'missing_joints': (TrajectoryMessage(('a',), (point(0.1, (0,)),)), "'b'"),
    'repeated_joints': (TrajectoryMessage(('a', 'b', 'a'), (point(0.1, (0, 0, 0)),)), 'unique'),
    'moving_at_the_end': (
        replace(GOOD, points=(point(0.1, velocities=(0.0, 0.5)),)), "'b' is not zero"),
    'times_do_not_increase': (
        replace(GOOD, points=(point(0.1), point(0.1))), 'not strictly increasing'),
    'wrong_widths': (replace(GOOD, points=(point(0.1, (1.0,)),)), 'positions (1)'),
    'effort_given': (replace(GOOD, points=(point(0.1, effort=(1.0, 1.0)),)), 'effort'),
}


@pytest.mark.parametrize('rule', BROKEN)
def test_a_message_that_breaks_one_rule_is_refused_with_its_reason(rule):
    message, words = BROKEN[rule]
    assert words in (refusal(message, NOW) or '')


def test_every_rule_has_a_message_that_breaks_it_and_a_reason_in_its_docstring():
    assert {rule.__name__ for rule in RULES} == set(BROKEN)
    for rule in RULES:
        assert rule(BROKEN[rule.__name__][0], NOW) is not None
        assert len(rule.__doc__ or '') > 30


@pytest.mark.parametrize('field', ['velocities', 'accelerations'])
def test_a_field_of_another_width_than_the_names_is_refused(field):
    message = replace(GOOD, points=(point(0.1, **{field: (0.0,)}),))
    assert field in (refusal(message, NOW) or '')


def test_some_joints_suffice_where_partial_goals_are_allowed():
    message = TrajectoryMessage(('a',), (point(0.1, (0,)),))
    assert refusal(message, replace(NOW, allow_partial_joints=True)) is None


def test_a_last_velocity_is_accepted_where_it_is_allowed():
    message, _ = BROKEN['moving_at_the_end']
    assert refusal(message, replace(NOW, allow_nonzero_end_velocity=True)) is None
