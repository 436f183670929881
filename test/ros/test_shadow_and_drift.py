# SPDX-License-Identifier: Apache-2.0
"""What watches the policy that commands, over real DDS: a shadow beside it, and drift."""

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from precise_policy import PrecisePolicy
from swapping import assert_no_gap, settle, value
from swapping import model as model  # fixtures
from swapping import moving as moving
from swapping import pair as pair
from swapping import robot as robot
from trajectory_msgs.msg import JointTrajectory

pytestmark = pytest.mark.ros


def test_shadow_answers_beside_and_commands_nothing(robot, moving):
    heard = []
    robot.node.create_subscription(
        JointTrajectory, 'policy_node/shadow', lambda m: robot._keep(heard, m), 5)
    assert robot.set_parameters(shadow='coarse').successful
    robot.wait(lambda: len(heard) > 1, 'differences')
    assert heard[-1].joint_names == ['shoulder', 'elbow']
    for point in heard[-1].points:
        np.testing.assert_allclose(point.positions, 0.01, atol=1e-9)
    robot.wait(lambda: robot.status['shadow'].get('compared', 0) > 1, 'figures in ~/status')
    assert robot.status['shadow']['worst']['elbow'] == pytest.approx(0.01)
    assert value(moving, 'shadow') == 'coarse'
    assert value(moving) == robot.status['precision'] == 'fine'
    robot.set_parameters(shadow='')
    robot.wait(lambda: robot.status['shadow']['precision'] == '', 'no shadow')
    assert value(moving, 'shadow') == ''
    assert_no_gap(robot, moving)


@pytest.mark.parametrize(('shadow', 'words'), [
    ('raises', 'illegal instruction'), ('nan', 'not finite'), ('nowhere', 'holds no artifact'),
])
def test_shadow_that_breaks_is_dropped_and_told_and_nothing_stops(robot, moving, shadow, words):
    assert robot.set_parameters(shadow=shadow).successful
    robot.wait(lambda: words in robot.status['shadow']['trouble'], 'the trouble is told')
    robot.wait(lambda: value(moving, 'shadow') == '', 'nothing shadows')
    chunks = len(robot.chunks)
    robot.wait(lambda: len(robot.chunks) > chunks + 1, 'it goes on')
    assert_no_gap(robot, moving)


def test_shadow_without_room_is_refused_with_figures(robot, moving):
    PrecisePolicy.needs = 10**15
    refusal = robot.set_parameters(shadow='coarse')
    assert '1000000000 MB beside the running one' in refusal.reason


def test_precision_swapped_under_a_shadow_keeps_the_shadow(robot, moving):
    robot.set_parameters(shadow='coarse')
    robot.wait(lambda: robot.status['shadow'].get('compared', 0) > 0, 'a comparison')
    robot.set_parameters(precision='good')
    settle(robot, moving, 'good', 'active')
    before = robot.status['shadow']['compared']
    robot.wait(lambda: robot.status['shadow']['compared'] > before, 'it goes on')
    assert value(moving, 'shadow') == 'coarse'


def test_scene_that_left_the_calibrated_range_warns_with_the_worst_layer(robot, moving):
    heard = robot.diagnostics
    robot.node.create_subscription(
        DiagnosticArray, '/diagnostics', lambda m: robot._keep(heard, m), 20)
    robot.set_parameters(precision='good')
    settle(robot, moving, 'good', 'active')
    robot.wait(lambda: robot.status['drift']['looks'] > 4, 'looks')
    assert robot.status['drift']['warning'] == ''
    PrecisePolicy.largest = 9.0

    def warned():
        return any(item.name.endswith('quantization') and item.level == DiagnosticStatus.WARN
                   and 'recalibrate' in item.message and 'worst layer' in item.message
                   for item in heard[-1].status)

    robot.wait(lambda: heard and warned(), 'a warning')
    assert_no_gap(robot, moving)
