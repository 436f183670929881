# SPDX-License-Identifier: Apache-2.0
"""A scripted expert for LIBERO's tasks: reads the whole state, commands joint targets.

The goal's own conditions are the plan: the next one that does not hold decides the skill, so one
planner serves all tasks and continues from anywhere. Uses the privileged state of a World that it
never steps; who owns the world steps it.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np

from quantvla_ros.sim.kinematics import ArmKinematics, rotation_of, rotation_vector
from quantvla_ros.sim.planner import Planner
from quantvla_ros.sim.skills import Hold, Move, Posture, Segment
from quantvla_ros.sim.starts import ARM_START
from quantvla_ros.sim.surroundings import Surroundings
from quantvla_ros.sim.world import World

RATE_HZ = 20.0
TURN_SPEED = 1.1  # rad/s, on average
# rad/s, of the fastest joint on average. An arm that is told to go much faster falls behind by
# more than the 0.25 rad to which LIBERO's controller cuts a target, and leaves the straight line.
JOINT_SPEED = 1.0
FASTEST = 0.08  # rad, of any joint in one step
LOST_AFTER = 3  # steps without a finger on it, after which a thing counts as dropped
SHIFTED = 0.005  # m; a thing this far from where it was is reached for anew
REMEMBERED = ('queue', 'progress', 'tries', 'target', 'gripper', 'carried', 'lost', 'position',
              'rotation', 'origin', 'turned', 'aim', 'aimed_at')
SMOOTH_FROM = 4  # steps; shorter moves are not eased in and out


class Expert:
    """Commands one step at a time: targets (7,) in rad and the gripper, -1 open, +1 close."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.arm = ArmKinematics(world, ARM_START)
        self.around = Surroundings(world)
        self.planner = Planner(world, self.arm, self.around)
        self.restart()

    def restart(self) -> None:
        """Forget every plan and look at the world afresh."""
        self.queue: list[Segment] = []
        self.progress = 0
        self.tries: Counter[str] = Counter()
        self.target = self.world.arm_positions().copy()
        self.gripper = -1.0
        self.carried: str | None = None
        self.lost = 0
        self.position, self.rotation = self.arm.pose()
        self.origin = self.target.copy()
        self.turned = 0.0  # rad, of the joint that the present move turns most
        self.aim: str | None = None
        self.aimed_at = np.zeros(3)

    def command(self) -> tuple[np.ndarray, float]:
        """Return the command for the present step; call it once per step of the world."""
        self._notice_a_slip()
        self._notice_a_shift()
        while not self.queue:
            self.position, self.rotation = self.arm.pose_at(self.target)
            self.queue = self.planner.plan(self.target, self.tries)
            self.carried, self.lost = self.around.holding(), 0
            self.aim = self.planner.aim
            if self.aim is not None:
                self.aimed_at = self.around.origin(self.aim).copy()
            self.progress = 0
        segment = self.queue[0]
        if isinstance(segment, Hold):
            self.gripper, last = segment.gripper, segment.steps
        elif isinstance(segment, Posture):
            last = self._unfold(segment)
        else:
            last = self._advance(segment)
        self.progress += 1
        if self.progress >= last:
            if isinstance(segment, Move):
                self.position, self.rotation = segment.position, segment.rotation
            elif isinstance(segment, Posture):
                self.position, self.rotation = self.arm.pose_at(self.target)
            self.queue.pop(0)
            self.progress = 0
        return self.target.copy(), self.gripper

    def memory(self) -> dict[str, Any]:
        """Return everything the expert remembers between two commands."""
        return {name: copy.copy(getattr(self, name)) for name in REMEMBERED}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go back to what was remembered then."""
        for name, value in memory.items():
            setattr(self, name, copy.copy(value))

    def _notice_a_slip(self) -> None:
        """Drop the plan when what it carries has left the closed hand."""
        if self.carried is None or self.gripper < 0 or not self.queue:
            return
        self.lost = 0 if self.around.held_by_fingers(self.carried) else self.lost + 1
        if self.lost >= LOST_AFTER:
            self.queue, self.carried = [], None

    def _notice_a_shift(self) -> None:
        """Plan anew when what the open hand reaches for has fallen, rolled or been pushed."""
        if self.aim is None or not self.queue or not isinstance(self.queue[0], Move):
            return
        if self.queue[0].gripper > 0:
            return  # it is in the hand by now, or has been missed
        if np.linalg.norm(self.around.origin(self.aim) - self.aimed_at) > SHIFTED:
            self.tries[self.aim] -= 1
            self.queue = []

    def _unfold(self, posture: Posture) -> int:
        """Set the target of the present step towards a posture; return how many it takes."""
        if self.progress == 0:
            self.origin = self.target.copy()
        way = posture.joints - self.origin
        steps = max(1, int(np.ceil(RATE_HZ * np.abs(way).max() / JOINT_SPEED)))
        part = (self.progress + 1) / steps
        self.target = self.origin + part * part * (3 - 2 * part) * way
        self.gripper = posture.gripper
        return steps

    def _advance(self, move: Move) -> int:
        """Set the target of the present step of a move; return how many steps it takes."""
        way = move.position - self.position
        turn = rotation_vector(move.rotation @ self.rotation.T)
        if self.progress == 0:
            there, _ = self.arm.solve(move.position, move.rotation, self.target)
            self.turned = float(np.abs(there - self.target).max())
        seconds = max(np.linalg.norm(way) / move.speed, np.linalg.norm(turn) / TURN_SPEED,
                      self.turned / JOINT_SPEED)
        steps = max(1, int(np.ceil(RATE_HZ * seconds)))
        self.gripper = move.gripper
        if self.progress < steps:
            part = (self.progress + 1) / steps
            if steps > SMOOTH_FROM:
                part = part * part * (3 - 2 * part)
            rotation = rotation_of(part * turn) @ self.rotation
            found, _ = self.arm.solve(self.position + part * way, rotation, self.target)
            change = found - self.target
            most = float(np.abs(change).max())
            if most > FASTEST:  # a joint has far to turn here: the hand waits for it
                change *= FASTEST / most
                self.progress -= 1
            self.target = self.target + change
        return steps + move.settle
