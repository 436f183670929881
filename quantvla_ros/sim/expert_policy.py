# SPDX-License-Identifier: Apache-2.0
"""The scripted expert behind the policy interface, to exercise the whole graph without weights.

Reads the simulation's positions from the vector `world_state` of the contract libero_expert and
finds the task by its instruction. Mirrors the world, plays the next steps there and returns what
it commanded. It knows what no camera shows, so its success says nothing about a policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.sim.expert import Expert
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.scenes import MAIN_SUITES, load_scene
from quantvla_ros.sim.world import World

STATE = 'world_state'


class ExpertPolicy:
    """Observation with world_state -> the expert's next chunk."""

    def __init__(self, contract: Contract, settings: PolicySettings) -> None:
        del settings
        if STATE not in [vector.name for vector in contract.vectors]:
            raise ValueError(
                f'the expert needs vectors.{STATE} in the contract; libero_expert has it')
        self.contract = contract
        self._worlds: dict[str, World] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the plan; the next chunk starts from what is then true."""
        self._expert: Expert | None = None
        self._task = ''
        self._stamp_ns = 0
        self._memories: list[dict[str, Any]] = []

    def prepare(self, observation: Observation) -> Observation:
        """Check that the state is there. Raises ValueError when it is not."""
        if STATE not in observation.vectors:
            raise ValueError(f'the observation lacks {STATE}, which the expert acts on')
        return observation

    def denoise(
        self, context: Observation, seed: int, prefix: ActionChunk | None = None
    ) -> ActionChunk:
        """Return the expert's next steps from the observation; seed and prefix change nothing."""
        del seed, prefix
        world = self._world_of(context.instruction)
        state = context.vectors[STATE]
        if len(state) < world.model.nq:
            raise ValueError(f'{STATE} has {len(state)} numbers; {world.scene.name} needs '
                             f'{world.model.nq}')
        world.data.qpos[:] = state[: world.model.nq]
        world.data.qvel[:] = 0.0
        mujoco.mj_forward(world.model, world.data)
        expert = self._continued(world, context)
        action, gripper = self.contract.action, self.contract.gripper
        rows = []
        self._memories = [expert.memory()]
        for _ in range(action.horizon):
            target, closing = expert.command()
            grip = gripper.closed_position if closing > 0 else gripper.open_position
            rows.append(np.append(target, grip))
            world.step(target, closing)
            self._memories.append(expert.memory())
        self._stamp_ns = context.stamp_ns
        return ActionChunk(action.joints, np.array(rows), context.stamp_ns, action.step_dt_s)

    def _continued(self, world: World, context: Observation) -> Expert:
        """Return the expert as it was when the last chunk had got this far, or a fresh one."""
        passed = (context.stamp_ns - self._stamp_ns) / NS_PER_S / self.contract.action.step_dt_s
        done = round(passed)
        same = self._expert is not None and self._task == context.instruction
        if self._expert is None or not same or not 0 <= done < len(self._memories):
            self._expert, self._task = Expert(world), context.instruction
        else:
            self._expert.recall(self._memories[done])
        return self._expert

    def _world_of(self, instruction: str) -> World:
        if instruction not in self._worlds:
            self._worlds[instruction] = World(load_scene(*_task_of(instruction)))
        return self._worlds[instruction]


def _task_of(instruction: str) -> tuple[str, int]:
    """Find the task of an instruction. Raises ValueError that lists the known ones."""
    known = {}
    for suite, count in MAIN_SUITES.items():
        for number in range(count):
            text = load_scene(suite, number).instruction
            if text == instruction:
                return suite, number
            known[text] = number
    raise ValueError(f'no task is called {instruction!r}; known are {"; ".join(known)}')
