# SPDX-License-Identifier: Apache-2.0
"""The simulated robot without ROS: commands, episodes, determinism."""

from dataclasses import replace

import numpy as np
import pytest

from quantvla_ros.action import NS_PER_S
from quantvla_ros.contract import load_contract
from quantvla_ros.sim.controller_rules import Point, TrajectoryMessage
from quantvla_ros.sim.robot import Episode, SimRobot, check_contract

pytestmark = pytest.mark.sim
EPISODE = Episode('libero_10', 2, 0)
CONTRACT = load_contract('libero_panda')
PERIOD_NS = NS_PER_S // 100


@pytest.fixture(scope='module')
def robots():
    made = {kind: SimRobot(CONTRACT, kind) for kind in ('forward_command', 'joint_trajectory')}
    for robot in made.values():
        robot.start(EPISODE)
    return made


@pytest.fixture
def forward(robots):
    robots['forward_command'].start(EPISODE)
    return robots['forward_command']


@pytest.fixture
def jtc(robots):
    robots['joint_trajectory'].start(EPISODE)
    return robots['joint_trajectory']


def run(robot, periods, begin_ns=NS_PER_S):
    return [robot.advance(begin_ns + k * PERIOD_NS) for k in range(periods)]


def test_a_robot_that_nobody_commands_holds_still(forward):
    before, _ = forward.joint_state()
    run(forward, 50)
    after, _ = forward.joint_state()
    np.testing.assert_allclose(after[:7], before[:7], atol=2e-3)


def test_a_forward_command_moves_arm_and_finger(forward):
    target, _ = forward.joint_state()
    assert forward.receive_forward([*(target[:7] + 0.1), 0.0]) is None
    run(forward, 100)
    positions, _ = forward.joint_state()
    np.testing.assert_allclose(positions[:7], target[:7] + 0.1, atol=3e-3)
    assert positions[7] < 0.005


def test_a_trajectory_moves_the_arm_to_its_last_point(jtc):
    start, _ = jtc.joint_state()
    names = CONTRACT.controller.joints
    points = (Point(NS_PER_S // 2, (*(start[:7] + 0.1), 0.04)),)
    assert jtc.receive_trajectory(TrajectoryMessage(names, points), NS_PER_S) is None
    run(jtc, 100)
    positions, _ = jtc.joint_state()
    np.testing.assert_allclose(positions[:7], start[:7] + 0.1, atol=3e-3)


def test_the_same_commands_in_the_same_periods_give_the_same_state_to_the_last_bit(forward):
    rng = np.random.default_rng(0)
    start, _ = forward.joint_state()
    commands = np.cumsum(rng.normal(0, 0.004, (60, 8)), 0) + [*start[:7], 0.02]
    commands[:, 7] = commands[:, 7].clip(0.0, 0.04)
    states = []
    for _ in range(2):
        forward.start(EPISODE)
        for k, command in enumerate(commands):
            forward.receive_forward(command)
            forward.advance(NS_PER_S + k * PERIOD_NS)
        states.append(forward.snapshot(0).qpos)
    np.testing.assert_array_equal(*states)


def test_a_nan_is_reported_and_counted_and_the_arm_holds(forward):
    before, _ = forward.joint_state()
    assert forward.receive_forward([float('nan'), *before[1:7], 0.04]) is None
    assert all('panda_joint1 was commanded to nan' in wrong for wrong in run(forward, 3))
    after, _ = forward.joint_state()
    np.testing.assert_allclose(after[:7], before[:7], atol=1e-3)
    assert forward.report()['violations'] == 3


def test_a_target_beyond_a_joints_limit_is_reported(forward):
    before, _ = forward.joint_state()
    forward.receive_forward([*before[:3], 0.5, *before[4:7], 0.04])
    assert 'panda_joint4' in run(forward, 1)[0]


def test_a_refused_command_is_counted_and_a_reset_activates_the_controller(forward):
    assert forward.receive_forward([0.0]) is not None
    assert forward.report()['refused_commands'] == 1
    forward.start(EPISODE)
    assert forward.report()['refused_commands'] == 0
    before, _ = forward.joint_state()
    assert forward.receive_forward([*before[:7], 0.04]) is None


def test_steps_are_counted_in_liberos_control_steps(forward):
    run(forward, 12)
    assert forward.report()['step'] == 2


def test_success_is_noted_at_the_step_it_is_reached(forward):
    world = forward.world
    for name, value in (('flat_stove_1', 1.0),):
        joint = world.joint_id(world.scene.things[name]['joints'][0])
        world.data.qpos[world.model.jnt_qposadr[joint]] = value
    address = world.thing_qpos('moka_pot_1')
    site = world.data.site_xpos[world.site_id('flat_stove_1_cook_region')]
    lift = 0.02 - world.scene.things['moka_pot_1']['bottom_offset'][2]
    world.data.qpos[address : address + 3] = site + [0, 0, lift]
    run(forward, 100)
    report = forward.report()
    assert report['success'] and 1 <= report['succeeded_at'] <= report['step']
    assert forward.success_now()


def test_a_random_start_is_drawn_by_its_seed(forward):
    states = []
    for seed in (1, 1, 2):
        forward.start(replace(EPISODE, init=-1, seed=seed))
        states.append(forward.snapshot(0).qpos)
    np.testing.assert_array_equal(states[0], states[1])
    assert np.abs(states[2] - states[0]).max() > 1e-3


def test_another_task_that_does_not_exist_leaves_the_episode_as_it_is(forward):
    with pytest.raises(ValueError, match='0 to 9'):
        forward.start(Episode('libero_10', 12, 0))
    assert forward.report()['task'] == 2
    assert run(forward, 1) == [None]


def test_a_contract_for_another_robot_is_refused_with_what_this_one_has():
    controller = replace(CONTRACT.controller, joints=('elbow',))
    with pytest.raises(ValueError, match='has no joint elbow'):
        check_contract(replace(CONTRACT, controller=controller))


def test_a_control_rate_that_physics_cannot_keep_is_refused():
    controller = replace(CONTRACT.controller, rate_hz=30.0)
    with pytest.raises(ValueError, match='500 Hz divided by a whole number'):
        check_contract(replace(CONTRACT, controller=controller))
