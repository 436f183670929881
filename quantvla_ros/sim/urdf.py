# SPDX-License-Identifier: Apache-2.0
"""The robot description of the simulated Panda, written from the MuJoCo model itself.

Frames, axes, position limits, torques, masses and inertias are the model's; each link's geometry
is the bounding box of its collision shapes. Velocity limits come from Franka's data sheet, since
the model has none. Publishes nothing.
"""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.world import CAMERAS, World

ARM_JOINTS = tuple(f'panda_joint{i}' for i in range(1, 8))
FINGER_JOINTS = ('panda_finger_joint1', 'panda_finger_joint2')
JOINTS = ARM_JOINTS + FINGER_JOINTS
# rad/s, Franka Emika Panda data sheet: joints 1 to 4 and 5 to 7
ARM_VELOCITY = (2.1750,) * 4 + (2.6100,) * 3
FINGER_VELOCITY = 0.2  # m/s; LIBERO's gripper itself moves its fingers at up to 0.1 m/s
FINGER_EFFORT = 20.0  # N, the model's actuator force limit
LINKS = {f'robot0_link{i}': f'panda_link{i}' for i in range(8)} | {
    'robot0_right_hand': 'panda_flange',
    'gripper0_right_gripper': 'panda_hand',
    'gripper0_leftfinger': 'panda_leftfinger',
    'gripper0_rightfinger': 'panda_rightfinger',
}
OPTICAL = np.diag([1.0, -1.0, -1.0])  # MuJoCo looks along -z with y up, ROS along z with y down


def _numbers(values: np.ndarray | list[float]) -> str:
    return ' '.join(f'{float(value) + 0.0:.9g}' for value in values)


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    flat = np.zeros(9)
    mujoco.mju_quat2Mat(flat, np.asarray(quaternion, np.float64))
    return flat.reshape(3, 3)


def roll_pitch_yaw(matrix: np.ndarray) -> np.ndarray:
    """Return the angles about fixed x, y, z that URDF writes, from a rotation matrix."""
    pitch = np.arctan2(-matrix[2, 0], np.hypot(matrix[0, 0], matrix[1, 0]))
    if np.hypot(matrix[0, 0], matrix[1, 0]) < 1e-9:  # straight up or down: yaw is free, take 0
        return np.array([np.arctan2(-matrix[1, 2], matrix[1, 1]), pitch, 0.0])
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch,
                     np.arctan2(matrix[1, 0], matrix[0, 0])])


def _origin(parent: ElementTree.Element, position: np.ndarray, matrix: np.ndarray) -> None:
    ElementTree.SubElement(
        parent, 'origin', xyz=_numbers(position), rpy=_numbers(roll_pitch_yaw(matrix)))


def _add_link(robot: ElementTree.Element, model: mujoco.MjModel, body: int, name: str) -> None:
    link = ElementTree.SubElement(robot, 'link', name=name)
    if model.body_mass[body] > 0:
        inertial = ElementTree.SubElement(link, 'inertial')
        _origin(inertial, model.body_ipos[body], _matrix(model.body_iquat[body]))
        ElementTree.SubElement(inertial, 'mass', value=_numbers([model.body_mass[body]]))
        xx, yy, zz = (_numbers([value]) for value in model.body_inertia[body])
        ElementTree.SubElement(
            inertial, 'inertia', ixx=xx, iyy=yy, izz=zz, ixy='0', ixz='0', iyz='0')
    first = model.body_geomadr[body]
    for geom in range(first, first + model.body_geomnum[body]):
        if not model.geom_contype[geom] and not model.geom_conaffinity[geom]:
            continue
        turn = _matrix(model.geom_quat[geom])
        centre = model.geom_pos[geom] + turn @ model.geom_aabb[geom, :3]
        for kind in ('visual', 'collision'):
            shape = ElementTree.SubElement(link, kind)
            _origin(shape, centre, turn)
            geometry = ElementTree.SubElement(shape, 'geometry')
            ElementTree.SubElement(
                geometry, 'box', size=_numbers(2.0 * model.geom_aabb[geom, 3:]))


def _add_joint(
    robot: ElementTree.Element, name: str, kind: str, parent: str, child: str,
    pose: tuple[np.ndarray, np.ndarray],
) -> ElementTree.Element:
    joint = ElementTree.SubElement(robot, 'joint', name=name, type=kind)
    ElementTree.SubElement(joint, 'parent', link=parent)
    ElementTree.SubElement(joint, 'child', link=child)
    _origin(joint, *pose)
    return joint


def _add_moving_joint(
    robot: ElementTree.Element, world: World, body: int, parent: str, child: str
) -> None:
    """Add the joint that carries a body, with the limits of the model and of the data sheet."""
    model = world.model
    number = int(model.body_jntadr[body])
    arm = world.scene.description['arm']
    scene_name = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_JOINT, number)
    if scene_name in arm['joints']:
        index = arm['joints'].index(scene_name)
        name, kind = ARM_JOINTS[index], 'revolute'
        velocity, effort = ARM_VELOCITY[index], float(arm['torque_upper'][index])
    else:
        name, kind = FINGER_JOINTS[arm['gripper_joints'].index(scene_name)], 'prismatic'
        velocity, effort = FINGER_VELOCITY, FINGER_EFFORT
    pose = (model.body_pos[body], _matrix(model.body_quat[body]))
    joint = _add_joint(robot, name, kind, parent, child, pose)
    ElementTree.SubElement(joint, 'axis', xyz=_numbers(model.jnt_axis[number]))
    low, high = model.jnt_range[number]
    ElementTree.SubElement(
        joint, 'limit', lower=_numbers([low]), upper=_numbers([high]),
        velocity=_numbers([velocity]), effort=_numbers([effort]))
    if name == FINGER_JOINTS[1]:
        ElementTree.SubElement(joint, 'mimic', joint=FINGER_JOINTS[0], multiplier='-1', offset='0')


def _add_cameras(robot: ElementTree.Element, world: World) -> None:
    """Add the optical frame of each camera: fixed to the hand, or to the base for the other."""
    model = world.model
    data = mujoco.MjData(model)  # the world's own data must not change
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    base = world.body_id('robot0_link0')
    for name, scene_name in CAMERAS.items():
        camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, scene_name)
        body = int(model.cam_bodyid[camera])
        carrier = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, body)
        if carrier not in LINKS:
            body, carrier = base, 'robot0_link0'
        turn = data.xmat[body].reshape(3, 3)
        pose = (turn.T @ (data.cam_xpos[camera] - data.xpos[body]),
                turn.T @ data.cam_xmat[camera].reshape(3, 3) @ OPTICAL)
        child = optical_frame(name)
        ElementTree.SubElement(robot, 'link', name=child)
        _add_joint(robot, f'{name}_optical_joint', 'fixed', LINKS[carrier], child, pose)


def optical_frame(camera: str) -> str:
    """Return the frame_id of a camera's pictures."""
    return f'{camera}_optical_frame'


def robot_description(world: World) -> str:
    """Return the URDF of LIBERO's Panda as text."""
    model = world.model
    robot = ElementTree.Element('robot', name='libero_panda')
    names = {world.body_id(body): link for body, link in LINKS.items()}
    for body, link in names.items():
        _add_link(robot, model, body, link)
    for body, link in names.items():
        parent = int(model.body_parentid[body])
        if parent not in names:
            continue  # the base: the root of the tree
        if model.body_jntnum[body]:
            _add_moving_joint(robot, world, body, names[parent], link)
        else:
            pose = (model.body_pos[body], _matrix(model.body_quat[body]))
            _add_joint(robot, f'{link}_joint', 'fixed', names[parent], link, pose)
    _add_cameras(robot, world)
    ElementTree.indent(robot)
    return '<?xml version="1.0"?>\n' + ElementTree.tostring(robot, encoding='unicode') + '\n'
