# SPDX-License-Identifier: Apache-2.0
"""The simulated robot without ROS: a World behind one of the stock controllers.

Decides what a command does to the arm and what counts as an episode. The caller owns threads,
clocks and messages and moves time by one control period at a time. The same start, the same
commands at the same periods give bit-equal states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantvla_ros.contract import Contract
from quantvla_ros.sim.cameras import Snapshot
from quantvla_ros.sim.controller_rules import TrajectoryMessage
from quantvla_ros.sim.controllers import (
    ForwardCommandController,
    GripperJoint,
    JointTrajectoryController,
    Motion,
    violation,
)
from quantvla_ros.sim.lighting import parse_lighting
from quantvla_ros.sim.scenes import MAX_TEXTURE, load_scene
from quantvla_ros.sim.urdf import ARM_JOINTS, FINGER_JOINTS, JOINTS
from quantvla_ros.sim.world import GRIPPER_SPEED, OPEN, World

PHYSICS_HZ = 500


@dataclass(frozen=True)
class Episode:
    """Which start of which task, in which light (as parse_lighting reads it)."""

    suite: str
    task: int
    init: int
    seed: int = 0
    lighting: str = ''


def check_contract(contract: Contract) -> int:
    """Return the physics steps of one control period. Raises ValueError for what is not there."""
    rate = contract.controller.rate_hz
    substeps = round(PHYSICS_HZ / rate)
    if abs(substeps * rate - PHYSICS_HZ) > 1e-6:
        raise ValueError(
            f'controller.rate_hz is {rate:g}; the simulated robot runs at {PHYSICS_HZ} Hz divided '
            'by a whole number, such as 100, 50 or 20')
    commandable = (*ARM_JOINTS, FINGER_JOINTS[0])
    wrong = [name for name in contract.controller.joints if name not in commandable]
    wrong += [name for name in contract.joints.names if name not in JOINTS]
    if wrong:
        raise ValueError(
            f'the simulated Panda has no joint {", ".join(wrong)} to command or measure; '
            f'it has {", ".join(JOINTS)}, and the second finger follows the first')
    if contract.gripper.kind == 'action':
        raise ValueError('the simulated Panda has no gripper action; use gripper.kind joint')
    return substeps


class SimRobot:
    """Panda, scene, controller and episode. Every public method takes the lock itself."""

    def __init__(
        self,
        contract: Contract,
        kind: str,
        from_desired: bool = False,
        allow_partial: bool = False,
        max_texture: int = MAX_TEXTURE,
    ) -> None:
        """Make the robot; it has no scene until start is called."""
        self.contract = contract
        self.substeps = check_contract(contract)
        self.period_s = self.substeps / PHYSICS_HZ
        joints = contract.controller.joints
        self.forward = ForwardCommandController(joints)
        self.trajectory = JointTrajectoryController(
            joints, contract.controller.allow_nonzero_end_velocity, allow_partial, from_desired)
        self.kind = kind
        gripper = contract.gripper
        self._finger = GripperJoint(gripper.open_position, gripper.closed_position,
                                    GRIPPER_SPEED) if gripper.kind != 'none' else None
        self._finger_topic_target: float | None = None
        self._max_texture = max_texture
        self._lock = threading.Lock()
        self.world: World | None = None
        self.episode: Episode | None = None

    # -- episodes --------------------------------------------------------------------------------

    def start(self, episode: Episode, say: Callable[[str], None] | None = None) -> None:
        """Load the task if it is another one, and start it.

        Raises ValueError for a task or a start there is not; the old episode then goes on.
        """
        world = self.world
        if world is None or (world.scene.suite, world.scene.task_id) != (
                episode.suite, episode.task):
            world = World(load_scene(episode.suite, episode.task, self._max_texture, say))
        lighting = parse_lighting(episode.lighting)
        with self._lock:
            world.light(lighting)
            if episode.init < 0:
                from quantvla_ros.sim.starts import StartSampler

                StartSampler(world).draw(np.random.default_rng(episode.seed)).put(world)
            else:
                world.reset_official(episode.init)
            self.world, self.episode = world, episode
            self.forward.activate()
            self.trajectory.activate()
            self._hold = world.arm_positions()
            self._gripper_command = OPEN
            self._finger_topic_target = None
            self._limits = self._position_limits(world)
            self.physics_steps = 0
            self.succeeded_at: int | None = None
            self.violations = 0
            self.refusals = 0

    def _position_limits(self, world: World) -> dict[str, tuple[float, float]]:
        ranges = np.concatenate([world.arm_range, world.finger_range])
        return {name: (float(low), float(high))
                for name, (low, high) in zip(JOINTS, ranges, strict=True)}

    # -- commands --------------------------------------------------------------------------------

    def receive_forward(self, values: Any) -> str | None:
        """Take a Float64MultiArray's numbers; return why the controller refuses them."""
        with self._lock:
            return self._count(self.forward.receive(values))

    def receive_trajectory(self, message: TrajectoryMessage, now_ns: int) -> str | None:
        """Take a trajectory; return why the controller refuses it."""
        with self._lock:
            return self._count(self.trajectory.receive(message, now_ns))

    def receive_gripper(self, values: Any) -> str | None:
        """Take the finger position of a gripper that has a topic of its own."""
        with self._lock:
            if len(values) != 1 or not np.isfinite(values[0]):
                return self._count(f'gripper command {list(values)} is not one finite number')
            self._finger_topic_target = float(values[0])
            return None

    def _count(self, reason: str | None) -> str | None:
        self.refusals += reason is not None
        return reason

    # -- time ------------------------------------------------------------------------------------

    def advance(self, now_ns: int) -> str | None:
        """Move on by one control period; return what was wrong with the command, if anything.

        A command that breaks the hardware's rules is not followed: the arm holds.
        """
        with self._lock:
            assert self.world is not None
            world = self.world
            wrong = self._take_command(now_ns, world)
            world.advance(world.goal_of(self._hold), self._gripper_command, self.substeps)
            before = self.physics_steps // world.substeps
            self.physics_steps += self.substeps
            passed = self.physics_steps // world.substeps > before
            if passed and self.succeeded_at is None and world.success():
                self.succeeded_at = self.step_count
            return wrong

    def _take_command(self, now_ns: int, world: World) -> str | None:
        """Ask the controller for its command of this period and turn it into targets."""
        controller = self.forward if self.kind == 'forward_command' else self.trajectory
        command = controller.sample(now_ns, self._motion(world, controller.joints))
        wrong = None
        if command is not None:
            wrong = violation(command, controller.joints, self._limits)
            if wrong is None:
                self._follow(dict(zip(controller.joints, command, strict=True)), world)
            else:
                self.violations += 1
        if self._finger_topic_target is not None:
            self._move_finger(self._finger_topic_target, world)
        return wrong

    def _follow(self, targets: dict[str, float], world: World) -> None:
        hold = self._hold.copy()
        for index, name in enumerate(ARM_JOINTS):
            hold[index] = targets.get(name, hold[index])
        self._hold = hold
        if FINGER_JOINTS[0] in targets:
            self._move_finger(targets[FINGER_JOINTS[0]], world)

    def _move_finger(self, target: float, world: World) -> None:
        if self._finger is not None:
            present = float(world.gripper_action[1])
            self._gripper_command = self._finger.command(target, present, self.substeps)

    def _motion(self, world: World, joints: tuple[str, ...]) -> Motion:
        positions = dict(zip(JOINTS, world.joint_state(), strict=True))
        velocities = dict(zip(JOINTS, world.joint_velocities(), strict=True))
        return Motion(np.array([positions[name] for name in joints]),
                      np.array([velocities[name] for name in joints]))

    # -- what can be known -----------------------------------------------------------------------

    @property
    def step_count(self) -> int:
        """LIBERO's control steps of 50 ms since the start."""
        assert self.world is not None
        return self.physics_steps // self.world.substeps

    def joint_state(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (9,) positions and (9,) velocities in the order of JOINTS."""
        with self._lock:
            assert self.world is not None
            return self.world.joint_state(), self.world.joint_velocities()

    def snapshot(self, stamp_ns: int) -> Snapshot:
        """Return what a camera needs to see this instant."""
        with self._lock:
            assert self.world is not None
            return Snapshot(self.world.model, self.world.data.qpos.copy(), stamp_ns,
                            self.world.lighting)

    def success_now(self) -> bool:
        """Whether the goal holds at this instant."""
        with self._lock:
            assert self.world is not None
            return self.world.success()

    def report(self) -> dict[str, Any]:
        """Return the state of the episode as JSON holds it."""
        with self._lock:
            assert self.world is not None and self.episode is not None
            return {
                'suite': self.episode.suite, 'task': self.episode.task,
                'init': self.episode.init, 'seed': self.episode.seed,
                'instruction': self.world.scene.instruction,
                'step': self.step_count,
                'success': self.succeeded_at is not None,
                'succeeded_at': self.succeeded_at,
                'violations': self.violations,
                'refused_commands': self.refusals,
            }
