# SPDX-License-Identifier: Apache-2.0
"""World against LIBERO and robosuite themselves: the small form of `quantvla bench parity`."""

import pytest

from quantvla_ros.bench.parity import compare

pytestmark = pytest.mark.sim


# rad or m in the grasp: rounding, which contact lets grow; in the last task the hand is pressed
# hard into a microwave
GRASP_BOUNDS = {'libero_object/0': 1e-5, 'libero_goal/7': 1e-9, 'libero_10/9': 5e-3}


@pytest.fixture(scope='module', params=GRASP_BOUNDS)
def result(request):
    suite, task = request.param.split('/')
    return compare(suite, int(task))


def test_free_motion_is_the_same_to_rounding(result):
    assert result.differences['first step'] < 1e-12
    assert result.differences['free'] < 1e-10


def test_a_grasp_with_contact_stays_within_its_bound(result):
    assert result.contacts > 0
    assert result.differences['grasp'] < GRASP_BOUNDS[result.task]


def test_every_goal_condition_agrees_on_every_step_and_holds_on_some(result):
    assert result.checks > 150
    assert result.disagreements == 0
    assert 0 < result.held < result.checks


def test_success_is_reached_and_agreed_on(result):
    assert result.successes > 0


def test_liberos_first_step_acts_on_the_old_pose_and_the_difference_dies_out():
    result = compare('libero_10', 2, refreshed=False)
    assert result.last['first step'] > 1e-4
    assert result.last['free'] < 1e-8
