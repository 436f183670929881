# SPDX-License-Identifier: Apache-2.0
"""The robot description against the model it was written from."""

import numpy as np
import pytest

from quantvla_ros.control.urdf import read_urdf_limits
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.scenes import load_scene
from quantvla_ros.sim.urdf import (
    ARM_JOINTS,
    FINGER_JOINTS,
    LINKS,
    robot_description,
    roll_pitch_yaw,
)
from quantvla_ros.sim.world import World

pytestmark = pytest.mark.sim


def matrix(quaternion):
    found = np.zeros(9)
    mujoco.mju_quat2Mat(found, quaternion)
    return found.reshape(3, 3)


@pytest.fixture(scope='module')
def world():
    return World(load_scene('libero_10', 2))


@pytest.fixture(scope='module')
def urdf(world):
    return robot_description(world)


@pytest.fixture(scope='module')
def parsed(urdf):
    """Read back by MuJoCo's own URDF reader, fixed links kept as bodies."""
    keep = '<mujoco><compiler fusestatic="false"/></mujoco></robot>'
    return mujoco.MjModel.from_xml_string(urdf.replace('</robot>', keep))


def test_the_control_core_reads_the_limits_of_every_joint_it_commands(urdf, world):
    limits = read_urdf_limits(urdf)
    assert set(limits) == {*ARM_JOINTS, FINGER_JOINTS[0]}
    for index, name in enumerate(ARM_JOINTS):
        assert (limits[name].lower, limits[name].upper) == pytest.approx(world.arm_range[index])
        assert limits[name].velocity == (2.175 if index < 4 else 2.61)
    assert (limits[FINGER_JOINTS[0]].lower, limits[FINGER_JOINTS[0]].upper) == (0.0, 0.04)


def test_its_frames_are_the_models_in_any_pose(world, parsed):
    rng = np.random.default_rng(0)
    data = mujoco.MjData(parsed)
    for _ in range(20):
        pose = rng.uniform(*world.arm_range.T)
        fingers = rng.uniform(0.0, 0.04, 1)
        world.data.qpos[world.arm_qpos] = pose
        world.data.qpos[world.finger_qpos] = [fingers[0], -fingers[0]]
        mujoco.mj_kinematics(world.model, world.data)
        for name, value in zip((*ARM_JOINTS, *FINGER_JOINTS),
                               (*pose, fingers[0], -fingers[0]), strict=True):
            data.joint(name).qpos = value
        mujoco.mj_kinematics(parsed, data)
        base = world.data.xpos[world.body_id('robot0_link0')]
        for theirs, ours in (('panda_link7', 'robot0_link7'),
                             ('panda_leftfinger', 'gripper0_leftfinger'),
                             ('panda_rightfinger', 'gripper0_rightfinger')):
            place = world.data.xpos[world.body_id(ours)] - base
            np.testing.assert_allclose(data.body(theirs).xpos, place, atol=1e-6)


def test_the_optical_frame_of_the_wrist_looks_where_the_camera_looks(world, parsed):
    world.reset_official(0)
    data = mujoco.MjData(parsed)
    for name, value in zip(ARM_JOINTS, world.arm_positions(), strict=True):
        data.joint(name).qpos = value
    mujoco.mj_kinematics(parsed, data)
    mujoco.mj_forward(world.model, world.data)
    base = world.data.xpos[world.body_id('robot0_link0')]
    for camera, scene_camera in (('wrist', 'robot0_eye_in_hand'), ('agentview', 'agentview')):
        frame = data.body(f'{camera}_optical_frame')
        seen = world.data.camera(scene_camera)
        np.testing.assert_allclose(frame.xpos, seen.xpos - base, atol=1e-6)
        forward = -seen.xmat.reshape(3, 3)[:, 2]
        np.testing.assert_allclose(frame.xmat.reshape(3, 3)[:, 2], forward, atol=1e-6)


def test_the_box_of_each_link_holds_its_collision_mesh(world, parsed):
    model, checked = world.model, 0
    for body, link in LINKS.items():
        number = world.body_id(body)
        boxes = [g for g in range(parsed.ngeom) if parsed.geom_bodyid[g] == parsed.body(link).id]
        for geom in range(model.geom_bodyid.searchsorted(number),
                          model.geom_bodyid.searchsorted(number, 'right')):
            if not model.geom_contype[geom] or model.geom_dataid[geom] < 0:
                continue
            mesh = model.mesh(model.geom_dataid[geom])
            vertices = model.mesh_vert[mesh.vertadr[0] : mesh.vertadr[0] + mesh.vertnum[0]]
            points = vertices @ matrix(model.geom_quat[geom]).T + model.geom_pos[geom]
            assert any(
                np.all(np.abs((points - parsed.geom_pos[box]) @ matrix(parsed.geom_quat[box]))
                       <= parsed.geom_size[box] + 1e-5) for box in boxes), link
            checked += 1
    assert checked >= 8


def test_writing_it_does_not_touch_the_world(world):
    world.reset_official(0)
    before = world.data.qacc_warmstart.copy()
    robot_description(world)
    np.testing.assert_array_equal(world.data.qacc_warmstart, before)


def test_angles_survive_the_way_through_roll_pitch_yaw():
    rng = np.random.default_rng(1)
    for matrix in [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in range(50)] + [
            np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])]:
        matrix = matrix * np.linalg.det(matrix)
        r, p, y = roll_pitch_yaw(matrix)
        cr, sr, cp, sp, cy, sy = np.cos(r), np.sin(r), np.cos(p), np.sin(p), np.cos(y), np.sin(y)
        again = (np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
                 @ np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
                 @ np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]]))
        np.testing.assert_allclose(again, matrix, atol=1e-9)
