# SPDX-License-Identifier: Apache-2.0
"""LIBERO's Panda in plain MuJoCo: start states, joint-position control, success, pictures.

Restates robosuite 1.4.0's JOINT_POSITION law and LIBERO's predicates, 2.4 ms a control step
where robosuite takes 8 on the same machine; `quantvla bench parity` compares the two. Not the
papers' controller: targets are absolute joint positions with kp 200, not OSC_POSE.
One World belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantvla_ros.sim.lighting import DAY, Lighting, SceneLights
from quantvla_ros.sim.predicates import GoalReader
from quantvla_ros.sim.rendering import SceneRenderer, mujoco, set_render_quality
from quantvla_ros.sim.scenes import MAX_TEXTURE, Scene, load_scene

KP = 200.0  # 1/s^2, on the mass matrix
KD = 2.0 * np.sqrt(KP)  # critically damped
MAX_STEP_RAD = 0.25  # a target farther than this from the joint is pulled closer
GRIPPER_SPEED = 0.01  # of the gripper's -1..1 range, per physics step
CLOSING = np.array([-1.0, 1.0])  # how the two fingers move when the command is +1
OPEN, CLOSE = -1.0, 1.0
SETTLE_STEPS = 5  # control steps with the gripper opening before an episode starts
CAMERAS = {'agentview': 'agentview', 'wrist': 'robot0_eye_in_hand'}  # contract name -> scene's


def as_slice(indices: np.ndarray) -> slice | np.ndarray:
    """Return a slice where the indices are consecutive: views are twice as fast as copies."""
    consecutive = np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices)))
    return slice(int(indices[0]), int(indices[-1]) + 1) if consecutive else indices


class World:
    """One task: reset it, step it with joint targets, ask for success, state and pictures.

    model and data are MuJoCo's own and may be read freely. Gripper commands: -1 opens, +1 closes.
    """

    def __init__(self, scene: Scene, lighting: Lighting = DAY) -> None:
        self.scene = scene
        self.model = mujoco.MjModel.from_xml_path(str(scene.folder / 'scene.xml'))
        set_render_quality(self.model)
        self._lights = SceneLights(self.model)
        self.light(lighting)
        self.data = mujoco.MjData(self.model)
        self.substeps: int = scene.description['substeps']
        self._read_arm()
        self._fixtures = {
            name: (self.body_id(thing['body']), np.array(thing['position']),
                   np.array(thing['quaternion']))
            for name, thing in scene.things.items()
            if thing['kind'] == 'fixture'
        }
        reader = GoalReader(self.model, scene.description)
        self._goal = [reader.read(condition) for condition in scene.goal]
        self._mass = np.zeros((self.model.nv, self.model.nv))
        self._renderers: dict[tuple[int, int], SceneRenderer] = {}
        self.gripper_action = np.zeros(2)
        self.reset_official(0)

    def _read_arm(self) -> None:
        arm = self.scene.description['arm']
        joints = [self.joint_id(name) for name in arm['joints']]
        fingers = [self.joint_id(name) for name in arm['gripper_joints']]
        self.arm_qpos = self.model.jnt_qposadr[joints].copy()
        self.arm_dofs = self.model.jnt_dofadr[joints].copy()
        self.finger_qpos = self.model.jnt_qposadr[fingers].copy()
        self.finger_dofs = self.model.jnt_dofadr[fingers].copy()
        self.arm_range = self.model.jnt_range[joints].copy()
        self.finger_range = self.model.jnt_range[fingers].copy()
        self.grip_site = self.site_id(arm['grip_site'])
        self._arm_actuators = np.array([self._actuator_id(name) for name in arm['actuators']])
        self._grippers = np.array([self._actuator_id(n) for n in arm['gripper_actuators']])
        self._torque = np.array(arm['torque_lower']), np.array(arm['torque_upper'])
        low, high = self.model.actuator_ctrlrange[self._grippers].T
        self._grip_centre, self._grip_reach = 0.5 * (high + low), 0.5 * (high - low)
        self._q, self._v = as_slice(self.arm_qpos), as_slice(self.arm_dofs)
        self._block = (self._v, self._v) if isinstance(self._v, slice) else np.ix_(
            self.arm_dofs, self.arm_dofs)

    # -- start states ----------------------------------------------------------------------------

    def reset_official(self, start: int, settle: int = SETTLE_STEPS) -> None:
        """Start from one of LIBERO's official states. Raises ValueError for one there is not."""
        states = self.scene.official
        if not 0 <= start < len(states):
            raise ValueError(
                f'{self.scene.name} has the official starts 0 to {len(states) - 1}, not {start}')
        nq, nv = self.model.nq, self.model.nv
        self.reset(states[start, 1 : 1 + nq], states[start, 1 + nq : 1 + nq + nv], settle=settle)

    def reset(
        self,
        qpos: np.ndarray,
        qvel: np.ndarray | None = None,
        fixtures: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
        settle: int = SETTLE_STEPS,
    ) -> None:
        """Start from any state, then let it settle for some control steps, the gripper opening.

        qpos: (nq,). fixtures: name -> (position, quaternion wxyz) for those that stand elsewhere
        than in the packed scene.
        """
        mujoco.mj_resetData(self.model, self.data)
        for name, (body, position, quaternion) in self._fixtures.items():
            placed = (fixtures or {}).get(name, (position, quaternion))
            self.model.body_pos[body], self.model.body_quat[body] = placed
        self.data.qpos[:] = qpos
        self.data.qvel[:] = 0.0 if qvel is None else qvel
        mujoco.mj_forward(self.model, self.data)
        self.gripper_action = np.zeros(2)
        for _ in range(settle):
            self.step(self.arm_positions(), OPEN)

    def show(
        self,
        qpos: np.ndarray,
        fixtures: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        """Place everything for a picture, without physics."""
        for name, (body, position, quaternion) in self._fixtures.items():
            placed = (fixtures or {}).get(name, (position, quaternion))
            self.model.body_pos[body], self.model.body_quat[body] = placed
        self.data.qpos[:] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_comPos(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    # -- motion ----------------------------------------------------------------------------------

    def step(self, target: np.ndarray, gripper: float) -> None:
        """Advance one control step, 50 ms, towards (7,) absolute joint targets in rad.

        A target more than 0.25 rad from the present position is clipped to that distance.
        """
        self.advance(self.goal_of(target), gripper, self.substeps)

    def goal_of(self, target: np.ndarray) -> np.ndarray:
        """Return the target pulled to within 0.25 rad of where the arm is, as robosuite does."""
        position = self.data.qpos[self._q]
        return position + np.clip(target - position, -MAX_STEP_RAD, MAX_STEP_RAD)

    def advance(self, goal: np.ndarray, gripper: float, substeps: int) -> None:
        """Run some physics steps of 2 ms towards a fixed joint goal: the finer form of step."""
        model, data = self.model, self.data
        low, high = self._torque
        closing = CLOSING * GRIPPER_SPEED * np.sign(gripper)
        for _ in range(substeps):
            mujoco.mj_step1(model, data)
            mujoco.mj_fullM(model, self._mass, data.qM)
            pull = KP * (goal - data.qpos[self._q]) - KD * data.qvel[self._v]
            torque = self._mass[self._block] @ pull + data.qfrc_bias[self._v]
            self.gripper_action = (self.gripper_action + closing).clip(-1.0, 1.0)
            data.ctrl[self._arm_actuators] = torque.clip(low, high)
            data.ctrl[self._grippers] = self._grip_centre + self._grip_reach * self.gripper_action
            mujoco.mj_step2(model, data)

    # -- what can be known -----------------------------------------------------------------------

    def success(self) -> bool:
        """Whether every condition of the goal holds now."""
        return all(condition(self.data) for condition in self._goal)

    def conditions(self) -> list[bool]:
        """Whether each condition of the goal holds, in the order of scene.goal."""
        return [condition(self.data) for condition in self._goal]

    def arm_positions(self) -> np.ndarray:
        """Return (7,) joint positions in rad."""
        return self.data.qpos[self.arm_qpos]

    def arm_velocities(self) -> np.ndarray:
        """Return (7,) joint velocities in rad/s."""
        return self.data.qvel[self.arm_dofs]

    def finger_positions(self) -> np.ndarray:
        """Return (2,) finger positions in m; the second one is negative."""
        return self.data.qpos[self.finger_qpos]

    def joint_state(self) -> np.ndarray:
        """Return (9,): seven joint positions in rad, two finger positions in m."""
        return np.concatenate([self.arm_positions(), self.finger_positions()])

    def joint_velocities(self) -> np.ndarray:
        """Return (9,): rad/s of the arm, m/s of the fingers."""
        return np.concatenate([self.arm_velocities(), self.data.qvel[self.finger_dofs]])

    def grip_position(self) -> np.ndarray:
        """Return (3,): the point between the fingertips, in the world's frame."""
        return self.data.site_xpos[self.grip_site].copy()

    def body_id(self, name: str) -> int:
        """Return the number of a body. Raises ValueError when the scene lacks it."""
        return self._id(mujoco.mjtObj.mjOBJ_BODY, name)

    def joint_id(self, name: str) -> int:
        """Return the number of a joint."""
        return self._id(mujoco.mjtObj.mjOBJ_JOINT, name)

    def site_id(self, name: str) -> int:
        """Return the number of a site."""
        return self._id(mujoco.mjtObj.mjOBJ_SITE, name)

    def geom_id(self, name: str) -> int:
        """Return the number of a geom."""
        return self._id(mujoco.mjtObj.mjOBJ_GEOM, name)

    def thing_body(self, name: str) -> int:
        """Return the root body of an object or fixture of the task."""
        if name not in self.scene.things:
            raise ValueError(
                f'{self.scene.name} has no {name!r}; it has {", ".join(self.scene.things)}')
        return self.body_id(self.scene.things[name]['body'])

    def thing_qpos(self, name: str) -> int | None:
        """Return where the free joint of an object starts in qpos; None for what cannot move."""
        joint = int(self.model.body_jntadr[self.thing_body(name)])
        free = joint >= 0 and self.model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_FREE
        return int(self.model.jnt_qposadr[joint]) if free else None

    def _actuator_id(self, name: str) -> int:
        return self._id(mujoco.mjtObj.mjOBJ_ACTUATOR, name)

    def _id(self, kind: mujoco.mjtObj, name: str) -> int:
        number = mujoco.mj_name2id(self.model, kind, name)
        if number < 0:
            raise ValueError(f'{self.scene.name} has no {kind.name[6:].lower()} named {name!r}')
        return number

    # -- pictures --------------------------------------------------------------------------------

    def light(self, lighting: Lighting) -> None:
        """Light the scene, and see it, in another way from the next picture on."""
        self.lighting = lighting
        self._lights.set(lighting)

    def render(self, camera: str, size: int | tuple[int, int] = 128) -> np.ndarray:
        """Return (height, width, 3) uint8 RGB of 'agentview' or 'wrist', upright.

        size: the edge in pixels, or (width, height). Any camera of the scene may be named.
        """
        width, height = (size, size) if isinstance(size, int) else size
        if (width, height) not in self._renderers:
            self._renderers[width, height] = SceneRenderer(self.model, width, height)
        picture = self._renderers[width, height].render(self.data, CAMERAS.get(camera, camera))
        return self.lighting.sense(picture, camera, self.data)

    def close(self) -> None:
        """Free the GL contexts."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


def make_world(
    suite: str, task_id: int, max_texture: int = MAX_TEXTURE, lighting: Lighting = DAY
) -> World:
    """Return the world of a task, packed first when the cache lacks it."""
    return World(load_scene(suite, task_id, max_texture), lighting)
