# SPDX-License-Identifier: Apache-2.0
"""The scripted expert's skills: from the state of the world to the next few straight moves.

Every skill looks at the world only, so it can take over anywhere: after a slip, an off-centre
release, with something else in the hand. A plan ends where it must be judged (is it held? is it
open?), and the next plan starts from what is then true. Commands nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.sim.grasps import (
    FINGERS_OPEN,
    HOVER,
    REACH_ERROR,
    TIP_BELOW,
    TWISTED,
    choose_grasp,
)
from quantvla_ros.sim.kinematics import ArmKinematics, hand_rotation, top_down
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.shapes import collision_geoms
from quantvla_ros.sim.surroundings import Surroundings
from quantvla_ros.sim.world import CLOSE, OPEN, World

MARGIN = 0.03  # m kept above what is passed over
HAND_REACH = 0.05  # m around the fingers that must be free
SLOW = 0.18  # m/s near things
LIFT = 0.75  # of the way to the point above a grasp
DRAWER_TRAVEL = 0.155  # m; a drawer counts as open from 0.14
KNOB_TURN = 0.85  # rad; a stove counts as on from 0.5
SLOT = 0.042  # m from the middle of a cooker for each of two pots
PAIR = 0.028  # m from the middle of a basket for each of two things
PUSH_PAST = 0.03
LOWER = 0.01  # m from one height at which there is room to the next
SWAPPED = np.diag([-1.0, -1.0, 1.0])  # the same hand with its fingers exchanged


@dataclass(frozen=True)
class Move:
    """Go straight to a pose at this speed, then wait a few steps for the arm to arrive."""

    position: np.ndarray
    rotation: np.ndarray
    gripper: float
    speed: float = 0.32
    settle: int = 1


@dataclass(frozen=True)
class Hold:
    """Stay, with the gripper closing or opening."""

    gripper: float
    steps: int


@dataclass(frozen=True)
class Posture:
    """Go to (7,) joint positions, all joints together."""

    joints: np.ndarray
    gripper: float


Segment = Move | Hold | Posture


class Skills:
    """Plans for one world. failed counts the tries per thing, so that the next one differs."""

    def __init__(self, world: World, arm: ArmKinematics, around: Surroundings) -> None:
        self.world, self.arm, self.around = world, arm, around
        self.sites = world.scene.sites

    # -- free motion -------------------------------------------------------------------------

    def travel(
        self,
        target: np.ndarray,
        rotation: np.ndarray,
        gripper: float,
        hang: float = TIP_BELOW,
        ignore: tuple[str, ...] = (),
        reach: float = HAND_REACH,
    ) -> list[Segment]:
        """Go up, across and down to a pose, above everything on the way.

        hang: how far the fingertips, or what they hold, reach below the hand.
        """
        position, turned = self.arm.pose()
        apart = np.linalg.norm(position[:2] - target[:2])
        top = self.around.highest_between(position, target, reach, ignore)
        height = max(float(target[2]), top + MARGIN + hang)
        if apart < 0.02 and position[2] > target[2] - 0.005:
            height = max(float(target[2]), float(position[2]))
        moves: list[Segment] = []
        if position[2] < height - 0.01 and apart > 0.02:
            moves.append(Move(np.append(position[:2], height), turned, gripper))
        height = max(height, float(position[2]) if apart < 0.02 else height)
        moves.append(Move(np.append(target[:2], height), rotation, gripper))
        if height > target[2] + 0.01:
            moves.append(Move(target, rotation, gripper))
        return moves

    # -- pick and place ----------------------------------------------------------------------

    def pick(
        self, name: str, seed: np.ndarray, tries: int, drawer: str | None = None
    ) -> list[Segment]:
        """Take hold of a thing and lift it a little. drawer: the joint of where it goes."""
        front = self.outward(drawer) if drawer else None
        grasp = choose_grasp(self.around, self.arm, name, skip=tries, front=front)
        if grasp is None:
            return [*self.retreat(OPEN), Hold(OPEN, 4)]
        above = grasp.position + grasp.way
        position, rotation = self.arm.pose()
        lined_up = (
            np.linalg.norm(position[:2] - grasp.position[:2]) < 0.012
            and np.trace(rotation.T @ grasp.rotation) > 2.98
            and -0.01 < position[2] - grasp.position[2] < HOVER
            and self.world.finger_positions()[0] > 0.03
        )
        approach: list[Segment] = []
        if not lined_up:
            twisted = np.abs(grasp.joints - seed).max() > TWISTED
            approach = [*self._let_go(), *(self.unfold(OPEN) if twisted else ())]
            approach += self.travel(above, grasp.rotation, OPEN)
        return [
            *approach,
            Move(grasp.position, grasp.rotation, OPEN, SLOW, settle=2),
            Hold(CLOSE, 8),
            Move(grasp.position + LIFT * grasp.way, grasp.rotation, CLOSE, 0.25, settle=0),
        ]

    def _let_go(self) -> list[Segment]:
        """Open the hand before it travels, when it is closed around something or nothing."""
        return [Hold(OPEN, 4)] if self.around.holding() else []

    def place(self, name: str, spot: np.ndarray, bottom: float) -> list[Segment]:
        """Carry the held thing over a spot, set it down and let go.

        spot: (2,) where its origin shall be. bottom: height of its lowest point on release.
        """
        position, rotation = self.arm.pose()
        points, origin = self.around.points(name), self.around.origin(name)
        hang = float(position[2] - points[:, 2].min())
        goal = np.append(spot - (origin - position)[:2], bottom + hang)
        wide = float(np.abs(points[:, :2] - position[:2]).max()) + 0.01
        aside = self.around.way_out(name)
        if aside.any():
            return [Move(position + aside, rotation, CLOSE, SLOW)]
        moves = self.travel(goal, rotation, CLOSE, hang, (name,), min(wide, 0.09))
        if len(moves) > 1 or moves[-1].position[2] > goal[2] + 0.01:  # type: ignore[union-attr]
            last = moves[-1]
            assert isinstance(last, Move)
            moves[-1] = Move(goal, rotation, CLOSE, SLOW, settle=3)
        return [*moves, Hold(OPEN, 6), Move(goal + [0, 0, 0.09], rotation, OPEN, settle=0)]

    def lowest_release(self, name: str, spot: np.ndarray, clear: float, floor: float) -> float:
        """Return how low the held thing can be let go into something with walls.

        From a height that is clear of everything down to the floor, as far as the open hand has
        room: what falls from high above comes to lean.
        """
        position, rotation = self.arm.pose()
        hang = float(position[2] - self.around.points(name)[:, 2].min())
        goal = np.append(spot - (self.around.origin(name) - position)[:2], 0.0)
        joints, bottom = self.world.arm_positions(), clear
        while bottom - LOWER > floor:
            goal[2] = bottom - LOWER + hang
            joints, error = self.arm.solve(goal, rotation, joints)
            if error > REACH_ERROR or self.around.hand_collides(joints, FINGERS_OPEN, (name,)):
                return bottom
            bottom -= LOWER
        return floor if bottom < clear else bottom

    def unfold(self, gripper: float) -> list[Segment]:
        """Go up and back to the posture from which everything is in reach."""
        return [*self.retreat(gripper), Posture(self.arm.home, gripper)]

    def retreat(self, gripper: float) -> list[Segment]:
        """Go straight up to where nothing is in the way."""
        position, rotation = self.arm.pose()
        return [Move(position + [0, 0, 0.10], rotation, gripper)]

    # -- drawers -----------------------------------------------------------------------------

    def _handle(self, joint: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the middle of a drawer's handle and the direction in which it opens."""
        model, data = self.world.model, self.world.data
        number = self.world.joint_id(joint)
        body = int(model.jnt_bodyid[number])
        axis = data.xmat[body].reshape(3, 3) @ model.jnt_axis[number]
        low, high = model.jnt_range[number]
        outward = axis * np.sign(low + high)
        geoms = [g for g in range(model.ngeom)
                 if model.geom_bodyid[g] == body and model.geom_contype[g]]
        bar = max(geoms, key=lambda g: float(data.geom_xpos[g] @ outward))
        return data.geom_xpos[bar].copy(), outward

    def outward(self, joint: str) -> np.ndarray:
        """Return the direction (3,) in which a drawer opens."""
        return self._handle(joint)[1]

    def open_drawer(self, joint: str, seed: np.ndarray) -> list[Segment]:
        """Take the handle from the front, the fingers above and below it, and pull."""
        handle, outward = self._handle(joint)
        opened = self.opened(joint)
        rotation = self._front_rotation(outward)
        grip = handle + [0, 0, -0.004]
        before = grip + 0.07 * outward
        pull = grip + (DRAWER_TRAVEL - opened + 0.012) * outward
        del seed
        return [
            *self.travel(before, rotation, OPEN, hang=0.10, reach=0.06),
            Move(grip + 0.002 * outward, rotation, OPEN, SLOW, settle=2),
            Hold(CLOSE, 8),
            Move(pull, rotation, CLOSE, 0.15, settle=4),
            Hold(OPEN, 5),
            Move(pull + 0.06 * outward, rotation, OPEN, 0.25),
            # up first: on its way home the hand would push the drawer in again
            Move(pull + 0.08 * outward + [0, 0, 0.12], rotation, OPEN, 0.4),
            Posture(self.arm.home, OPEN),
        ]

    def _front_rotation(self, outward: np.ndarray) -> np.ndarray:
        """A hand that points at a front, slightly downwards, and closes upright.

        Of two equal hands, the one that the present hand turns into sooner: the other costs two
        seconds on the way there and two on the way back.
        """
        found = hand_rotation(-outward + [0, 0, -0.12], np.array([0.0, 0.0, 1.0]))
        _, present = self.arm.pose()
        return min((found, found @ SWAPPED), key=lambda r: -float(np.trace(r @ present.T)))

    def opened(self, joint: str) -> float:
        """Return how far a drawer is open, m."""
        model = self.world.model
        return abs(float(self.world.data.qpos[model.jnt_qposadr[self.world.joint_id(joint)]]))

    def close_drawer(self, joint: str) -> list[Segment]:
        """Push a drawer's front with the closed hand, tilted to keep the wrist clear."""
        handle, outward = self._handle(joint)
        rotation = hand_rotation(-outward + [0, 0, -1.0], np.cross(outward, [0.0, 0.0, 1.0]))
        touch = handle + 0.035 * outward + [0, 0, 0.0]
        before = touch + 0.05 * outward + [0, 0, 0.10]
        end = handle - (self.opened(joint) + PUSH_PAST) * outward + 0.01 * outward
        return [
            *self.travel(before, rotation, CLOSE, hang=0.03),
            Move(touch, rotation, CLOSE, SLOW),
            Move(end, rotation, CLOSE, 0.16, settle=6),
            Move(end + 0.08 * outward + [0, 0, 0.05], rotation, CLOSE),
        ]

    # -- through a door ----------------------------------------------------------------------

    def pick_by_handle(self, name: str) -> list[Segment]:
        """Take a mug by its handle from the side, so that the hand stays outside of a box."""
        model, data = self.world.model, self.world.data
        origin = self.around.origin(name)
        geoms = collision_geoms(model, self.world.thing_body(name))
        bar = max(geoms, key=lambda g: np.linalg.norm(data.geom_xpos[g][:2] - origin[:2]))
        centre = data.geom_xpos[bar].copy()
        inward = np.append(origin[:2] - centre[:2], 0.0)
        inward /= np.linalg.norm(inward)
        approach = inward + [0, 0, -0.35]
        rotation = hand_rotation(approach, np.cross(inward, [0.0, 0.0, 1.0]))
        if rotation[0, 0] > 0:  # of two equal hands, the one that keeps the wrist near its home
            rotation = rotation @ SWAPPED
        grip = centre + 0.004 * inward
        before = grip - 0.09 * rotation[:, 2]
        return [
            *self.travel(before, rotation, OPEN, hang=0.05),
            Move(grip, rotation, OPEN, SLOW, settle=2),
            Hold(CLOSE, 8),
            Move(grip + [0, 0, 0.09], rotation, CLOSE, 0.2, settle=1),
        ]

    def slide_in(self, name: str, spot: np.ndarray, front: np.ndarray, floor: float) -> list[
        Segment
    ]:
        """Bring the held thing before an opening, push it in, set it down, come back out.

        spot: (2,) where its origin shall be. front: (2,) the direction out of the opening.
        """
        position, rotation = self.arm.pose()
        points, origin = self.around.points(name), self.around.origin(name)
        hang = float(position[2] - points[:, 2].min())
        offset = (position - origin)[:2]
        inside = np.append(spot + offset, floor + 0.02 + hang)
        before = inside + np.append(0.24 * front, 0.0)
        down = inside - [0, 0, 0.016]
        return [
            Move(np.append(position[:2], inside[2]), rotation, CLOSE),
            Move(before, rotation, CLOSE, 0.25),
            Move(inside, rotation, CLOSE, 0.2, settle=2),
            Move(down, rotation, CLOSE, 0.1, settle=2),
            Hold(OPEN, 6),
            Move(down + np.append(0.16 * front, 0.0), rotation, OPEN, 0.25),
            Posture(self.arm.home, OPEN),
        ]

    # -- knob, door, plate -------------------------------------------------------------------

    def turn_knob(self, joint: str) -> list[Segment]:
        """Take the blade of a cooker's knob and turn the wrist."""
        model, data = self.world.model, self.world.data
        number = self.world.joint_id(joint)
        body = int(model.jnt_bodyid[number])
        geoms = [g for g in range(model.ngeom)
                 if model.geom_bodyid[g] == body and model.geom_contype[g]]
        blade = max(geoms, key=lambda g: data.geom_xpos[g][2] + model.geom_size[g].max())
        matrix = data.xmat[body].reshape(3, 3)
        sign = float(np.sign((matrix @ model.jnt_axis[number])[2]))
        axis = data.xanchor[number]
        yaw = np.arctan2(matrix[1, 0], matrix[0, 0])
        yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2
        high = data.geom_xpos[blade][2] + 0.022
        position = np.array([axis[0], axis[1], high - 0.012])
        position[:2] = 0.5 * (axis[:2] + data.geom_xpos[blade][:2])
        start, end = top_down(yaw), top_down(yaw + sign * KNOB_TURN)
        offset = position - axis
        turn = sign * KNOB_TURN
        spun = np.array([
            np.cos(turn) * offset[0] - np.sin(turn) * offset[1],
            np.sin(turn) * offset[0] + np.cos(turn) * offset[1],
            offset[2],
        ])
        return [
            *self.travel(position + [0, 0, HOVER], start, OPEN),
            Move(position, start, OPEN, SLOW, settle=2),
            Hold(CLOSE, 7),
            Move(axis + spun, end, CLOSE, 0.2, settle=4),
            Hold(OPEN, 4),
            Move(axis + spun + [0, 0, HOVER], end, OPEN),
        ]

    def close_door(self, joint: str) -> list[Segment]:
        """Push a hinged door round its hinge with the closed fingers."""
        model, data = self.world.model, self.world.data
        number = self.world.joint_id(joint)
        body = int(model.jnt_bodyid[number])
        hinge = data.xanchor[number].copy()
        angle = float(data.qpos[model.jnt_qposadr[number]])
        panel = max(
            (g for g in range(model.ngeom)
             if model.geom_bodyid[g] == body and model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX
             and model.geom_contype[g] + model.geom_conaffinity[g]),
            key=lambda g: model.geom_size[g].prod())
        arm = data.geom_xpos[panel][:2] - hinge[:2]
        length = 1.35 * float(np.linalg.norm(arm))
        facing = np.arctan2(arm[1], arm[0])
        high = float(data.geom_xpos[panel][2]) + 0.055

        def at(bearing: float, back: float) -> np.ndarray:
            away = np.array([np.cos(bearing), np.sin(bearing)])
            outer = np.array([away[1], -away[0]])  # the outside of a door that closes to the left
            spot = hinge[:2] + length * away + back * outer
            return np.append(spot, high)

        def turn(bearing: float) -> np.ndarray:
            return top_down(float(np.clip(bearing + np.pi / 2, -0.2, 1.3)))

        moves: list[Segment] = []
        start = at(facing, 0.055)
        moves += self.travel(start, turn(facing), CLOSE)
        steps = max(3, int(np.ceil(-angle / 0.25)))
        for step in range(1, steps + 1):
            bearing = facing - angle * step / steps
            back = 0.026 if step < steps else 0.012
            moves.append(Move(at(bearing, back), turn(bearing), CLOSE, 0.22, 0))
        moves.append(Hold(CLOSE, 5))
        moves.append(Move(at(facing - angle, 0.09), turn(facing - angle), CLOSE))
        return moves
