# SPDX-License-Identifier: Apache-2.0
"""A packed task: its description, its steps, its pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantvla_ros
from quantvla_ros.contract import load_contract
from quantvla_ros.sim import scenes
from quantvla_ros.sim.cameras import CameraRig, View
from quantvla_ros.sim.lighting import DAY, Lighting
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.robot import Episode, SimRobot
from quantvla_ros.sim.world import CLOSE, MAX_STEP_RAD, OPEN, World

pytestmark = pytest.mark.sim
SUITE, TASK = 'libero_10', 2  # turn on the stove and put the moka pot on it


@pytest.fixture(scope='module')
def world():
    world = World(scenes.load_scene(SUITE, TASK))
    yield world
    world.close()


def test_a_scene_says_what_the_task_file_says(world):
    scene = world.scene
    assert scene.instruction == 'turn on the stove and put the moka pot on it'
    assert scene.goal == [['turnon', 'flat_stove_1'],
                          ['on', 'moka_pot_1', 'flat_stove_1_cook_region']]
    assert scene.things['flat_stove_1']['kind'] == 'fixture'
    assert scene.sites['flat_stove_1_cook_region']['parent'] == 'flat_stove_1'
    assert {p['object'] for p in scene.placements} == set(scene.things)
    assert all(p['x_ranges'] for p in scene.placements)


def test_there_are_fifty_official_starts_and_no_more(world):
    assert world.scene.official.shape == (50, 1 + world.model.nq + world.model.nv)
    with pytest.raises(ValueError, match='0 to 49, not 50'):
        world.reset_official(50)


def test_official_starts_differ(world):
    world.reset_official(0)
    first = world.data.qpos.copy()
    world.reset_official(1)
    assert np.abs(world.data.qpos - first).max() > 1e-3


def test_the_same_start_and_commands_give_the_same_state_to_the_last_bit(world):
    states = []
    for _ in range(2):
        world.reset_official(3)
        for step in range(10):
            world.step(world.scene.official[3, 1:8] + 0.02 * step, CLOSE)
        states.append(world.data.qpos.copy())
    np.testing.assert_array_equal(*states)


def test_the_arm_goes_to_its_target_and_stays(world):
    world.reset_official(0)
    target = world.arm_positions() + [0.2, -0.1, 0.1, 0.1, -0.1, 0.1, 0.2]
    for _ in range(40):
        world.step(target, OPEN)
    np.testing.assert_allclose(world.arm_positions(), target, atol=2e-3)
    np.testing.assert_allclose(world.arm_velocities(), 0.0, atol=1e-3)


def test_a_far_target_is_pulled_to_a_quarter_radian(world):
    world.reset_official(0)
    far = world.goal_of(world.arm_positions() + 3.0)
    np.testing.assert_allclose(far - world.arm_positions(), MAX_STEP_RAD)


def test_the_finer_interface_adds_up_to_a_step(world):
    target = world.scene.official[0, 1:8] + 0.1
    world.reset_official(0)
    world.step(target, CLOSE)
    whole = world.data.qpos.copy()
    world.reset_official(0)
    goal = world.goal_of(target)
    for _ in range(5):
        world.advance(goal, CLOSE, world.substeps // 5)
    np.testing.assert_array_equal(world.data.qpos, whole)


def test_the_gripper_opens_and_closes(world):
    world.reset_official(0)
    hold = world.arm_positions()
    for _ in range(20):
        world.step(hold, OPEN)
    assert world.finger_positions()[0] > 0.035
    for _ in range(20):
        world.step(hold, CLOSE)
    assert world.finger_positions()[0] < 0.005


def test_a_stove_turned_far_enough_is_on_and_alone_is_no_success(world):
    world.reset_official(0)
    assert world.conditions() == [False, False]
    joint = world.joint_id(world.scene.things['flat_stove_1']['joints'][0])
    address = world.model.jnt_qposadr[joint]
    world.data.qpos[address] = 0.49
    assert world.conditions()[0] is False
    world.data.qpos[address] = 0.5
    assert world.conditions() == [True, False]
    assert not world.success()


def test_a_fixture_can_stand_elsewhere_and_goes_back(world):
    body = world.thing_body('flat_stove_1')
    packed = world.model.body_pos[body].copy()
    world.reset(world.scene.official[0, 1 : 1 + world.model.nq],
                fixtures={'flat_stove_1': (packed + [0.01, 0, 0], np.array([1.0, 0, 0, 0]))})
    assert world.model.body_pos[body][0] == packed[0] + 0.01
    world.reset_official(0)
    np.testing.assert_array_equal(world.model.body_pos[body], packed)


def test_a_name_the_scene_lacks_is_refused_with_those_it_has(world):
    with pytest.raises(ValueError, match='moka_pot_1'):
        world.thing_body('teapot')
    with pytest.raises(ValueError, match='no body named'):
        world.body_id('teapot')


def test_both_cameras_see_the_scene_and_the_wrist_moves_with_the_arm(world):
    world.reset_official(0)
    before = {name: world.render(name) for name in ('agentview', 'wrist')}
    target = world.arm_positions() + 0.2
    for _ in range(20):
        world.step(target, OPEN)
    for name, picture in before.items():
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert picture.std() > 20
        assert np.abs(world.render(name).astype(int) - picture).mean() > 2


def test_pictures_are_upright(world):
    """Move the pot: the pixels that change lie where the camera's geometry puts it."""
    world.reset_official(0)
    before = world.render('agentview').astype(int)
    address = world.thing_qpos('moka_pot_1')
    place = world.data.xpos[world.thing_body('moka_pot_1')].copy()
    world.data.qpos[address + 2] += 5.0
    mujoco.mj_forward(world.model, world.data)
    changed = np.abs(world.render('agentview').astype(int) - before).max(2) > 30
    rows, columns = np.nonzero(changed)
    camera = world.data.camera('agentview')
    x, y, z = camera.xmat.reshape(3, 3).T @ (place - camera.xpos)
    focal = 64 / np.tan(np.radians(world.model.camera('agentview').fovy[0]) / 2)
    assert abs(rows.mean() - (64 - focal * y / -z)) < 8
    assert abs(columns.mean() - (64 + focal * x / -z)) < 8


def test_pictures_of_any_size_can_be_asked_for(world):
    assert world.render('agentview', (160, 96)).shape == (96, 160, 3)


def test_an_exported_folder_needs_nothing_else(tmp_path):
    scenes.export([(SUITE, TASK)], tmp_path)
    program = (
        'import sys; from quantvla_ros.sim.world import make_world;'
        f'w = make_world({SUITE!r}, {TASK}); w.step(w.arm_positions(), -1);'
        'assert "robosuite" not in sys.modules and "libero" not in sys.modules;'
        'print(w.scene.folder)')
    found = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, check=True, timeout=120,
        env={**_environment(), 'QUANTVLA_SCENES': str(tmp_path)})
    assert found.stdout.strip() == str(tmp_path / f'{SUITE}_{TASK}')


def test_a_scene_of_another_format_is_refused(tmp_path, monkeypatch):
    scenes.export([(SUITE, TASK)], tmp_path)
    path = tmp_path / f'{SUITE}_{TASK}' / 'task.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format': 0}))
    monkeypatch.setenv(scenes.SCENES_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match='pack or export it again'):
        scenes.load_scene(SUITE, TASK)


def _environment():
    return {**os.environ, 'PYTHONPATH': str(Path(quantvla_ros.__file__).parents[1])}


def test_light_changes_pictures_and_day_brings_back_every_bit(world):
    world.reset_official(0)
    day = world.render('agentview').copy()
    world.light(Lighting(light=0.4, warmth=0.8))
    dark = world.render('agentview').copy()
    assert dark.mean() < 0.8 * day.mean()
    red, _, blue = dark.reshape(-1, 3).mean(0) / day.reshape(-1, 3).mean(0)
    assert red > 1.2 * blue
    world.light(DAY)
    np.testing.assert_array_equal(world.render('agentview'), day)


def test_the_robot_sees_the_light_of_its_episode(world):
    robot = SimRobot(load_contract('libero_panda'), 'forward_command')
    rig = CameraRig([View('agentview', 64, 64)])
    seen = []
    for words in ('day', 'night'):
        robot.start(Episode(SUITE, TASK, 0, lighting=words))
        seen.append(rig.render(robot.snapshot(10**9), ['agentview'])['agentview'].copy())
    rig.close()
    assert seen[1].mean() < 0.6 * seen[0].mean()
    assert Lighting().noise == 0 and np.abs(np.diff(seen[1].astype(int), axis=1)).mean() > 3
