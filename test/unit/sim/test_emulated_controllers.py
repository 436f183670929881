# SPDX-License-Identifier: Apache-2.0
"""What the emulated controllers do with the commands they accept."""

import numpy as np
import pytest

from quantvla_ros.action import NS_PER_S
from quantvla_ros.sim.controller_rules import Point, TrajectoryMessage
from quantvla_ros.sim.controllers import (
    ForwardCommandController,
    GripperJoint,
    JointTrajectoryController,
    Motion,
    violation,
)

START = 50 * NS_PER_S
REST = Motion(np.array([0.0, 1.0]), np.zeros(2))


def ns(seconds):
    return START + round(seconds * NS_PER_S)


def trajectory(*points, names=('a', 'b'), stamp_ns=0):
    return TrajectoryMessage(names, tuple(points), stamp_ns)


def point(time_s, *positions, **fields):
    return Point(round(time_s * NS_PER_S), positions, **fields)


def running(*points, measured=REST, **options):
    controller = JointTrajectoryController(('a', 'b'), **options)
    assert controller.receive(trajectory(*points), START) is None
    controller.sample(START, measured)
    return controller


def test_nothing_is_commanded_before_the_first_message():
    assert JointTrajectoryController(('a', 'b')).sample(START, REST) is None
    assert ForwardCommandController(('a', 'b')).sample(START, REST) is None


def test_positions_alone_are_joined_by_straight_lines_from_the_measured_state():
    controller = running(point(0.2, 1.0, 3.0))
    np.testing.assert_allclose(controller.sample(ns(0.05), REST), [0.25, 1.5])


def test_velocities_make_the_way_a_cubic_that_meets_them():
    controller = running(point(0.2, 1.0, 1.0, velocities=(2.0, 0.0)),
                         point(0.4, 1.2, 1.0, velocities=(0.0, 0.0)))
    step = 1e-4
    before = (controller.sample(ns(0.2), REST) - controller.sample(ns(0.2 - step), REST)) / step
    after = (controller.sample(ns(0.2 + step), REST) - controller.sample(ns(0.2), REST)) / step
    np.testing.assert_allclose(before, [2.0, 0.0], atol=0.02)
    np.testing.assert_allclose(after, [2.0, 0.0], atol=0.02)


def test_accelerations_make_the_way_a_quintic_that_meets_them():
    fields = {'velocities': (0.0, 0.0), 'accelerations': (4.0, 0.0)}
    controller = running(point(0.5, 1.0, 1.0, **fields),
                         point(1.0, 2.0, 1.0, velocities=(0.0, 0.0), accelerations=(0.0, 0.0)))
    t = 1e-3
    moved = controller.sample(ns(0.5 + t), REST)[0] - 1.0
    assert moved == pytest.approx(0.5 * 4.0 * t**2, rel=0.05)
    np.testing.assert_allclose(controller.sample(ns(1.0 - 1e-6), REST), [2.0, 1.0], atol=1e-9)


def test_a_first_point_at_time_zero_is_a_jump():
    controller = running(point(0.0, 5.0, 5.0), point(0.1, 6.0, 6.0))
    np.testing.assert_allclose(controller.sample(START, REST), [5.0, 5.0])


def test_the_last_point_is_held_for_ever():
    controller = running(point(0.1, 1.0, 2.0))
    np.testing.assert_allclose(controller.sample(ns(1000.0), REST), [1.0, 2.0])


def test_points_in_the_past_are_skipped():
    controller = JointTrajectoryController(('a', 'b'))
    message = trajectory(point(0.1, 1.0, 1.0), point(0.3, 2.0, 2.0), stamp_ns=START)
    assert controller.receive(message, ns(0.2)) is None
    np.testing.assert_allclose(controller.sample(ns(0.2), REST), [1.5, 1.5])


def test_a_new_trajectory_replaces_the_old_one_at_once_and_starts_at_the_measured_state():
    controller = running(point(1.0, 10.0, 10.0))
    controller.sample(ns(0.5), REST)
    lagging = Motion(np.array([0.3, 1.3]), np.zeros(2))
    assert controller.receive(trajectory(point(0.1, 0.4, 1.4)), ns(0.5)) is None
    np.testing.assert_allclose(controller.sample(ns(0.5), lagging), [0.3, 1.3])


def test_it_starts_at_the_last_command_where_that_is_configured():
    controller = running(point(1.0, 10.0, 11.0), from_desired=True)
    controller.sample(ns(0.5), REST)
    assert controller.receive(trajectory(point(0.1, 6.0, 7.0)), ns(0.5)) is None
    np.testing.assert_allclose(controller.sample(ns(0.5), REST), [5.0, 6.0])


def test_a_refused_trajectory_changes_nothing():
    controller = running(point(1.0, 10.0, 11.0))
    assert controller.receive(trajectory(), ns(0.2)) is not None
    np.testing.assert_allclose(controller.sample(ns(0.5), REST), [5.0, 6.0])


def test_numbers_are_matched_by_name():
    controller = JointTrajectoryController(('a', 'b'))
    assert controller.receive(trajectory(point(0.1, 7.0, 8.0), names=('b', 'a')), START) is None
    np.testing.assert_allclose(controller.sample(ns(0.0), REST), REST.positions)
    np.testing.assert_allclose(controller.sample(ns(1.0), REST), [8.0, 7.0])


def test_a_forward_command_is_held_without_timeout():
    controller = ForwardCommandController(('a', 'b'))
    assert controller.receive([0.5, 0.6]) is None
    np.testing.assert_allclose(controller.sample(ns(3600.0), REST), [0.5, 0.6])


def test_a_forward_command_of_the_wrong_width_deactivates_the_controller_until_it_is_reset():
    controller = ForwardCommandController(('a', 'b'))
    assert 'does not match' in controller.receive([0.5])
    assert 'inactive' in controller.receive([0.5, 0.6])
    assert controller.sample(START, REST) is None
    controller.activate()
    assert controller.receive([0.5, 0.6]) is None


def test_one_nan_goes_through_and_a_vector_of_nan_is_ignored():
    controller = ForwardCommandController(('a', 'b'))
    assert controller.receive([0.5, float('nan')]) is None
    assert np.isnan(controller.sample(START, REST)[1])
    controller.receive([0.5, 0.6])
    assert controller.receive([float('nan')] * 2) is None
    np.testing.assert_allclose(controller.sample(START, REST), [0.5, 0.6])


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1.1, -1.1])
def test_a_command_the_hardware_cannot_follow_is_a_violation_that_names_the_joint(value):
    words = violation(np.array([0.0, value]), ('a', 'b'), {'b': (-1.0, 1.0)})
    assert words is not None and words.startswith('b ')


def test_a_command_at_its_limit_is_no_violation():
    assert violation(np.array([1.0]), ('a',), {'a': (-1.0, 1.0)}) is None


def test_the_ends_of_the_finger_are_liberos_open_and_close():
    finger = GripperJoint(0.04, 0.0, 0.01)
    for present in (-1.0, 0.0, 0.995):
        assert finger.command(0.0, present, 5) == 1.0
    for present in (1.0, 0.0, -0.995):
        assert finger.command(0.04, present, 5) == -1.0


def test_a_finger_position_in_between_is_reached_and_kept():
    finger, present = GripperJoint(0.04, 0.0, 0.01), -1.0
    for _ in range(100):
        present += 0.01 * 5 * finger.command(0.01, present, 5)
    assert present == pytest.approx(0.5, abs=0.05)
