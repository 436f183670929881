# SPDX-License-Identifier: Apache-2.0
"""Joint targets for a hand pose: damped least squares in a scratch copy of the world.

A pose is the point between the fingertips and a rotation whose columns are the direction in which
the fingers close, the side, and the direction of approach. Moves nothing in the world itself.
"""

from __future__ import annotations

import numpy as np

from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.world import World

ITERATIONS = 60
DAMPING = 1e-4
POSTURE_GAIN = 0.02  # pulls the redundant joint towards its home
STEP_RAD = 0.2  # largest change of a joint in one iteration
LIMIT_MARGIN_RAD = 0.02
DOWN = np.array([0.0, 0.0, -1.0])


def hand_rotation(approach: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Return the rotation of a hand that approaches and closes along two directions."""
    z = np.asarray(approach, float) / np.linalg.norm(approach)
    x = closing - np.dot(closing, z) * z
    x = x / np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


def top_down(yaw: float) -> np.ndarray:
    """Return the rotation of a hand that points down; yaw 0 closes along the world's y."""
    return hand_rotation(DOWN, np.array([-np.sin(yaw), np.cos(yaw), 0.0]))


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Return axis times angle of a rotation matrix."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def rotation_of(vector: np.ndarray) -> np.ndarray:
    """Return the rotation matrix of axis times angle."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, vector / angle, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


class ArmKinematics:
    """Solves hand poses of one world's arm. home: (7,) the posture that is preferred, rad."""

    def __init__(self, world: World, home: np.ndarray) -> None:
        self.world, self.home = world, np.asarray(home, float)
        self.scratch = mujoco.MjData(world.model)
        self.low = world.arm_range[:, 0] + LIMIT_MARGIN_RAD
        self.high = world.arm_range[:, 1] - LIMIT_MARGIN_RAD

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Return position (3,) and rotation (3, 3) of the hand in the world."""
        data, site = self.world.data, self.world.grip_site
        return data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()

    def pose_at(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pose of the hand at (7,) joint positions."""
        world, scratch = self.world, self.scratch
        scratch.qpos[:] = world.data.qpos
        scratch.qpos[world.arm_qpos] = joints
        mujoco.mj_kinematics(world.model, scratch)
        site = world.grip_site
        return scratch.site_xpos[site].copy(), scratch.site_xmat[site].reshape(3, 3).copy()

    def solve(
        self, position: np.ndarray, rotation: np.ndarray, seed: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Return (7,) joint positions for a pose and the error left, in m plus rad.

        seed: (7,) where to start; the nearest solution is found. Joint limits are kept.
        """
        world, scratch = self.world, self.scratch
        scratch.qpos[:] = world.data.qpos
        scratch.qpos[world.arm_qpos] = seed
        jacobian, error = np.zeros((6, world.model.nv)), np.zeros(6)
        left = np.inf
        for _ in range(ITERATIONS):
            mujoco.mj_kinematics(world.model, scratch)
            mujoco.mj_comPos(world.model, scratch)
            turn = rotation @ scratch.site_xmat[world.grip_site].reshape(3, 3).T
            error[:3] = position - scratch.site_xpos[world.grip_site]
            error[3:] = rotation_vector(turn)
            left = float(np.abs(error[:3]).max() + np.abs(error[3:]).max())
            if np.abs(error[:3]).max() < 1e-4 and np.abs(error[3:]).max() < 1e-3:
                break
            mujoco.mj_jacSite(world.model, scratch, jacobian[:3], jacobian[3:], world.grip_site)
            arm = jacobian[:, world.arm_dofs]
            inverse = np.linalg.inv(arm @ arm.T + DAMPING * np.eye(6))
            joints = scratch.qpos[world.arm_qpos]
            change = arm.T @ (inverse @ error)
            change += (np.eye(7) - arm.T @ inverse @ arm) @ (POSTURE_GAIN * (self.home - joints))
            moved = joints + np.clip(change, -STEP_RAD, STEP_RAD)
            scratch.qpos[world.arm_qpos] = np.clip(moved, self.low, self.high)
        return scratch.qpos[world.arm_qpos].copy(), left
