# SPDX-License-Identifier: Apache-2.0
"""A LIBERO task in robosuite itself, with the face of World: what World is checked against.

robosuite's own controller, LIBERO's own predicates and the original textures; only the frames are
drawn by this package's renderer. Imports LIBERO into this process, which changes global state: use
it in a process of its own. The controller is told to read the arm after a start state is set,
which LIBERO leaves out (its first step acts on the pose from before).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.resources import cache_folder
from quantvla_ros.sim.packing import make_libero_env, prepare_import, quiet
from quantvla_ros.sim.rendering import SceneRenderer
from quantvla_ros.sim.world import CAMERAS, KP, MAX_STEP_RAD, OPEN, SETTLE_STEPS


@dataclass(frozen=True)
class RobosuiteScene:
    """What an episode asks of a scene."""

    instruction: str


class RobosuiteWorld:
    """One task of LIBERO in robosuite: reset, step with absolute targets, success, frames."""

    def __init__(self, suite: str, task_id: int) -> None:
        prepare_import(cache_folder() / 'scenes' / '.libero')
        with quiet():
            self.env, task, self._official = make_libero_env(suite, task_id)
        self.scene = RobosuiteScene(task.language)
        self._size = (0, 0)
        self._renderer: SceneRenderer | None = None
        self._bind()
        # LIBERO moves fixtures by about a centimetre at every reset; keep those of the first one
        self._fixtures = self.model.body_pos.copy(), self.model.body_quat.copy()

    def _bind(self) -> None:
        sim, robot = self.env.env.sim, self.env.robots[0]
        self.model, self.data = sim.model._model, sim.data._data
        self._arm = np.array(robot._ref_joint_pos_indexes)
        fingers = [sim.model.get_joint_qpos_addr(name) for name in robot.gripper.joints]
        self._fingers = np.array(fingers)

    def reset_official(self, start: int) -> None:
        """Start from one of LIBERO's official states and let it settle."""
        self.env.env.timestep, self.env.env.done = 0, False
        with quiet():
            self.env.reset()
            self._bind()
            self.model.body_pos[:], self.model.body_quat[:] = self._fixtures
            self.env.set_init_state(self._official[start])
        gripper = self.env.robots[0].gripper
        # robosuite keeps what the fingers were told in the episode before
        gripper.current_action = np.zeros_like(gripper.current_action)
        controller = self.env.robots[0].controller
        controller.output_max = np.full(7, MAX_STEP_RAD)
        controller.output_min = -controller.output_max
        controller.action_scale = None
        controller.kp = np.full(7, KP)
        controller.kd = 2.0 * np.sqrt(controller.kp)
        controller.update(force=True)
        for _ in range(SETTLE_STEPS):
            self.step(self.data.qpos[self._arm].copy(), OPEN)

    def step(self, target: np.ndarray, gripper: float) -> None:
        """Advance one control step, 50 ms, towards (7,) absolute joint targets in rad."""
        delta = (target - self.data.qpos[self._arm]) / MAX_STEP_RAD
        with quiet():
            self.env.step(np.concatenate([delta.clip(-1.0, 1.0), [gripper]]))

    def success(self) -> bool:
        """Whether LIBERO says so."""
        return bool(self.env.check_success())

    def joint_state(self) -> np.ndarray:
        """Return (9,): seven joint positions in rad, two finger positions in m."""
        return np.concatenate([self.data.qpos[self._arm], self.data.qpos[self._fingers]])

    def render(self, camera: str, size: int | tuple[int, int] = 128) -> np.ndarray:
        """Return (height, width, 3) uint8 RGB of 'agentview' or 'wrist', upright."""
        wanted = (size, size) if isinstance(size, int) else size
        if self._renderer is None or wanted != self._size:
            self._release()
            self._renderer, self._size = SceneRenderer(self.model, *wanted), wanted
        return self._renderer.render(self.data, CAMERAS.get(camera, camera))

    def close(self) -> None:
        """Free the GL context and the environment."""
        self._release()
        with quiet():
            self.env.close()

    def _release(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
