# SPDX-License-Identifier: Apache-2.0
"""Random starts drawn from the regions of LIBERO's task files, for demonstrations.

Draws what LIBERO's own samplers draw (regions, orientations, doors, fixtures that move by about a
centimetre) and lets physics settle it. LIBERO's states do not say where the fixtures stand: they
are saved beside one draw of them and played beside another, so that a bowl in a drawer is off its
middle by as much. That is drawn here too. Refuses a draw only when something overlaps, falls or
leaves its region. The official start states are for evaluation: nothing here looks at them, and a
test runs it with those states replaced by NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.world import World

# LIBERO's Panda before an episode, rad; robosuite adds Gaussian noise of 0.02 rad
ARM_START = np.array([0.0, -0.161037389, 0.0, -2.44459747, 0.0, 2.2267522, np.pi / 4])
ARM_NOISE = 0.02
FINGERS_START = np.array([0.020833, -0.020833])
SETTLE_STEPS = 12  # control steps
MAX_SLIDE = 0.06  # m; farther from its draw, an object has been pushed away or has fallen
MAX_TILT = 0.35  # rad away from the drawn orientation
MAX_TRIES = 400


@dataclass(frozen=True)
class Start:
    """A state an episode may begin from: qpos (nq,) and where the fixtures stand.

    As LIBERO's own states, it is taken before things have come to rest.
    """

    qpos: np.ndarray
    fixtures: dict[str, tuple[np.ndarray, np.ndarray]]

    def put(self, world: World) -> None:
        """Reset a world to this start and let it settle as an official one."""
        world.reset(self.qpos, fixtures=self.fixtures)


@dataclass
class _Placed:
    position: np.ndarray
    quaternion: np.ndarray


def quat_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply quaternions whose last entry is the real part, as robosuite's samplers do."""
    x0, y0, z0, w0 = left
    x1, y1, z1, w1 = right
    return np.array([
        w0 * x1 + x0 * w1 + y0 * z1 - z0 * y1,
        w0 * y1 - x0 * z1 + y0 * w1 + z0 * x1,
        w0 * z1 + x0 * y1 - y0 * x1 + z0 * w1,
        w0 * w1 - x0 * x1 - y0 * y1 - z0 * z1,
    ])


def _half_turn(axis: str, angle: float) -> np.ndarray:
    """Return sin and cos of half the angle in LIBERO's order: real part last."""
    found = np.zeros(4)
    found['xyz'.index(axis)], found[3] = np.sin(angle / 2), np.cos(angle / 2)
    return found


def draw_quaternion(placement: Mapping[str, Any], rng: np.random.Generator) -> np.ndarray:
    """Draw the four numbers LIBERO writes into qpos.

    Its table samplers put the real part last and MuJoCo reads it first; the objects are modelled
    for that, so it is kept. Only the sampler of fixtures puts the real part first.
    """
    rotation, axis = placement['rotation'], placement['rotation_axis']
    if isinstance(rotation, Mapping):
        found = np.array([0.0, 0.0, 0.0, 1.0])
        for name, bounds in rotation.items():
            found = quat_product(_half_turn(name, rng.uniform(min(bounds), max(bounds))), found)
        return found
    if rotation is None:
        angle = rng.uniform(0.0, 2 * np.pi)
    elif np.ndim(rotation):
        angle = rng.uniform(min(rotation), max(rotation))
    else:
        angle = float(rotation)
    found = _half_turn(axis, angle)
    return np.roll(found, 1) if placement['sampler'] == 'MultiRegionRandomSampler' else found


class StartSampler:
    """Draws starts of one task; the world it is made with is used and left changed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.things = world.scene.things
        self.free = {name: world.thing_qpos(name) for name in self.things}
        self.tries = self.refused = 0

    def draw(self, rng: np.random.Generator) -> Start:
        """Draw one start. Raises ValueError when the task's regions leave no room for one."""
        for _ in range(MAX_TRIES):
            self.tries += 1
            start = self._try(rng)
            if start is not None:
                return start
            self.refused += 1
        raise ValueError(f'{self.world.scene.name}: no valid start in {MAX_TRIES} draws')

    def _try(self, rng: np.random.Generator) -> Start | None:
        world, data = self.world, self.world.data
        world.reset(self._bare(rng), settle=0)
        self._draw_joints(rng)
        placed: dict[str, _Placed] = {}
        for placement in world.scene.placements:
            spot = self._place(placement, placed, rng)
            if spot is None:
                return None
            self._write(placement['object'], spot)
            placed[placement['object']] = spot
            mujoco.mj_forward(world.model, data)
        qpos, fixtures = data.qpos.copy(), self._other_fixtures(placed, rng)
        world.reset(qpos, fixtures=fixtures, settle=SETTLE_STEPS)
        if not self._stands(placed):
            return None
        return Start(qpos, fixtures)

    def _other_fixtures(
        self, placed: Mapping[str, _Placed], rng: np.random.Generator
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Draw the fixtures once more, for what was placed beside the first draw of them."""
        found = {}
        for placement in self.world.scene.placements:
            if self.free[placement['object']] is None:
                # no test for overlap: what stands on a fixture would never pass it
                spot = self._place({**placement, 'ensure_valid_placement': False}, placed, rng)
                assert spot is not None
                found[placement['object']] = spot.position.copy(), spot.quaternion.copy()
        return found

    def _bare(self, rng: np.random.Generator) -> np.ndarray:
        world = self.world
        qpos = world.model.qpos0.copy()
        qpos[world.arm_qpos] = ARM_START + ARM_NOISE * rng.standard_normal(7)
        qpos[world.finger_qpos] = FINGERS_START
        # objects wait far away until they are placed: nothing touches anything by accident
        for index, address in enumerate(a for a in self.free.values() if a is not None):
            qpos[address : address + 3] = 10.0 + index, 10.0, 10.0
        return qpos

    def _draw_joints(self, rng: np.random.Generator) -> None:
        """Open or close what the task file says is open or closed at the start."""
        world = self.world
        for sampler in world.scene.description['property_samplers']:
            owner = world.scene.sites.get(sampler['object']) or self.things[sampler['object']]
            value = rng.uniform(min(sampler['range']), max(sampler['range']))
            for joint in owner['joints']:
                address = world.model.jnt_qposadr[world.joint_id(joint)]
                world.data.qpos[address] = value
        mujoco.mj_forward(world.model, world.data)

    def _place(
        self,
        placement: Mapping[str, Any],
        placed: Mapping[str, _Placed],
        rng: np.random.Generator,
    ) -> _Placed | None:
        """Draw where one thing goes; None when it would overlap what is there."""
        thing = self.things[placement['object']]
        x_ranges, y_ranges = placement['x_ranges'], placement['y_ranges']
        chosen = int(rng.integers(len(x_ranges)))
        whole = placement['ensure_object_boundary_in_range']
        inside = placement['sampler'] == 'InSiteRegionRandomSampler'
        shrink = thing['horizontal_radius'] if whole and not inside else 0.0
        offset = [
            rng.uniform(*sorted((low + shrink, high - shrink)))
            for low, high in (x_ranges[chosen], y_ranges[chosen])
        ]
        quaternion = draw_quaternion(placement, rng)
        if thing['init_quat'] is not None:
            quaternion = quat_product(quaternion, np.asarray(thing['init_quat'], float))
        base = self._support(placement, placed)
        position = np.array([base[0] + offset[0], base[1] + offset[1], base[2]])
        position[2] += placement['z_offset'] - thing['bottom_offset'][2]
        spot = _Placed(position, quaternion)
        if placement['ensure_valid_placement'] and self._overlaps(placement['object'], spot,
                                                                  placed):
            return None
        return spot

    def _support(
        self, placement: Mapping[str, Any], placed: Mapping[str, _Placed]
    ) -> np.ndarray:
        """Return the point a draw is relative to: of the table, of a region or of another thing.

        LIBERO adds the height of a fixture's upper part to that of a region on it, so that what
        stands there is dropped from a little above, and not so for a region inside.
        """
        if not placement['on']:
            return np.asarray(placement['reference_pos'], float)
        top = float(self.things[placement['on']]['top_offset'][2])
        if not placement['site']:
            return placed[placement['on']].position + [0, 0, top]
        site = self.world.data.site_xpos[self.world.site_id(placement['site'])].copy()
        inside = placement['sampler'] == 'InSiteRegionRandomSampler'
        return site if inside else site + [0, 0, top]

    def _overlaps(self, name: str, spot: _Placed, placed: Mapping[str, _Placed]) -> bool:
        """LIBERO's own test: circles in the plane, unless one stands above the other."""
        thing = self.things[name]
        for other_name, other in placed.items():
            there = self.things[other_name]
            apart = np.linalg.norm(spot.position[:2] - other.position[:2])
            near = apart <= there['horizontal_radius'] + thing['horizontal_radius']
            height = there['top_offset'][2] - thing['bottom_offset'][2]
            if near and spot.position[2] - other.position[2] <= height:
                return True
        return False

    def _write(self, name: str, spot: _Placed) -> None:
        world, address = self.world, self.free[name]
        if address is None:
            body = world.thing_body(name)
            world.model.body_pos[body] = spot.position
            world.model.body_quat[body] = spot.quaternion
        else:
            world.data.qpos[address : address + 3] = spot.position
            world.data.qpos[address + 3 : address + 7] = spot.quaternion

    def _stands(self, placed: Mapping[str, _Placed]) -> bool:
        """Whether every object has come to rest where it was put."""
        data = self.world.data
        if not np.isfinite(data.qpos).all():
            return False
        for name, spot in placed.items():
            address = self.free[name]
            if address is None:
                continue
            moved = np.linalg.norm(data.qpos[address : address + 2] - spot.position[:2])
            cosine = abs(float(np.dot(data.qpos[address + 3 : address + 7], spot.quaternion)))
            tilt = 2 * np.arccos(min(1.0, cosine / np.linalg.norm(spot.quaternion)))
            if moved > MAX_SLIDE or tilt > MAX_TILT:
                return False
        return True
