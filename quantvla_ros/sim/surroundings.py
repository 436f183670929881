# SPDX-License-Identifier: Apache-2.0
"""What the scripted expert knows of the scene around the hand: boxes, heights, contacts.

Reads a World's model and data; changes nothing except its own scratch copy.
"""

from __future__ import annotations

import numpy as np

from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.shapes import body_points, collision_geoms
from quantvla_ros.sim.world import World

ROBOT_PREFIXES = ('robot0_', 'gripper0_', 'mount0_')
FINGERS = ('finger1', 'finger2')
ASIDE = 0.012  # m kept from what hangs over a thing that is lifted
TOUCH = 0.0015  # m; overlap that counts as a collision of a planned hand


class Surroundings:
    """Geometry and contact questions about one world."""

    def __init__(self, world: World) -> None:
        self.world, model = world, world.model
        names = [model.geom(geom).name for geom in range(model.ngeom)]
        bodies = [model.body(model.geom_bodyid[geom]).name for geom in range(model.ngeom)]
        solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        robot = np.array([body.startswith(ROBOT_PREFIXES) for body in bodies])
        self.robot = robot & solid
        self.fingers = [
            np.array([r and finger in name for r, name in zip(robot, names, strict=True)])
            for finger in FINGERS
        ]
        self.owner = np.full(model.ngeom, -1)
        self.names = list(world.scene.things)
        for index, name in enumerate(self.names):
            self.owner[collision_geoms(model, world.thing_body(name))] = index
        self.solid = np.flatnonzero(solid & ~robot & (self.owner >= 0))
        self._scratch = mujoco.MjData(model)

    def points(self, name: str) -> np.ndarray:
        """Return (n, 3) collision points of a thing in the world."""
        return body_points(self.world.model, self.world.data, self.world.thing_body(name))

    def origin(self, name: str) -> np.ndarray:
        """Return (3,) the origin of a thing, which the predicates look at."""
        return self.world.data.xpos[self.world.thing_body(name)].copy()

    def boxes(self, ignore: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return (n, 3) lowest and highest corners of everything solid but the robot."""
        model, data = self.world.model, self.world.data
        skipped = [self.names.index(name) for name in ignore]
        geoms = self.solid[~np.isin(self.owner[self.solid], skipped)]
        low, high = model.geom_aabb[geoms, :3], model.geom_aabb[geoms, 3:]
        rotation = data.geom_xmat[geoms].reshape(-1, 3, 3)
        centre = data.geom_xpos[geoms] + np.einsum('nij,nj->ni', rotation, low)
        half = np.einsum('nij,nj->ni', np.abs(rotation), high)
        return centre - half, centre + half

    def highest_between(
        self, start: np.ndarray, end: np.ndarray, reach: float, ignore: tuple[str, ...] = ()
    ) -> float:
        """Return the height of the highest thing within reach of a straight path in the plane."""
        low, high = self.boxes(ignore)
        spots = start[:2] + np.linspace(0, 1, 12)[:, None] * (end[:2] - start[:2])
        near = np.ones((12, len(low)), bool)
        for axis in (0, 1):
            near &= spots[:, None, axis] > low[None, :, axis] - reach
            near &= spots[:, None, axis] < high[None, :, axis] + reach
        tops = high[near.any(0), 2]
        return float(tops.max()) if len(tops) else -np.inf

    def surface_below(self, spot: np.ndarray, reach: float, ignore: tuple[str, ...]) -> float:
        """Return the height of what lies below a spot of the plane, tables included."""
        low, high = self.boxes(ignore)
        under = np.all(
            (spot[:2] > low[:, :2] - reach) & (spot[:2] < high[:, :2] + reach), axis=1
        )
        return max(self.worktop(), float(high[under, 2].max()) if under.any() else -np.inf)

    def way_out(self, name: str) -> np.ndarray:
        """Return the shortest shift in the plane (3,) that brings a held thing out from under."""
        points = self.points(name)
        low, high = self.boxes((name,))
        above = low[:, 2] > points[:, 2].max() - 0.01
        low, high = low[above, :2], high[above, :2]
        mine = points[:, :2].min(0) - ASIDE, points[:, :2].max(0) + ASIDE
        for distance in np.arange(0.0, 0.2, 0.02):
            for angle in np.pi + np.arange(8) * np.pi / 4 * np.array([1, -1] * 4):
                shift = distance * np.array([np.cos(angle), np.sin(angle)])
                over = np.all((mine[0] + shift < high) & (mine[1] + shift > low), axis=1)
                if not over.any():
                    return np.append(shift, 0.0)
        return np.zeros(3)

    def worktop(self) -> float:
        """Return the height of the table: where the lowest movable thing stands."""
        return min(float(self.points(name)[:, 2].min()) for name in self.names
                   if self.world.thing_qpos(name) is not None)

    def held_by_fingers(self, name: str) -> bool:
        """Whether both fingers touch a thing."""
        data = self.world.data
        mine = self.owner == self.names.index(name)
        a, b = data.contact.geom1, data.contact.geom2
        return all(bool(np.any((f[a] & mine[b]) | (f[b] & mine[a]))) for f in self.fingers)

    def holding(self) -> str | None:
        """Return the movable thing that both fingers touch, if any."""
        for name in self.names:
            if self.world.thing_qpos(name) is not None and self.held_by_fingers(name):
                return name
        return None

    def hand_collides(
        self, joints: np.ndarray, opening: float, ignore: tuple[str, ...] = ()
    ) -> bool:
        """Whether the arm at (7,) joints, the fingers this far open, would be inside something."""
        world, scratch = self.world, self._scratch
        scratch.qpos[:] = world.data.qpos
        scratch.qpos[world.arm_qpos] = joints
        scratch.qpos[world.finger_qpos] = opening, -opening
        mujoco.mj_kinematics(world.model, scratch)
        mujoco.mj_comPos(world.model, scratch)
        mujoco.mj_collision(world.model, scratch)
        contact = scratch.contact
        a, b = contact.geom1, contact.geom2
        skipped = [self.names.index(name) for name in ignore]
        other = ~self.robot & ~np.isin(self.owner, skipped)
        touching = (self.robot[a] & other[b]) | (self.robot[b] & other[a])
        return bool(np.any(touching & (contact.dist < -TOUCH)))

