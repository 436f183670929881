# SPDX-License-Identifier: Apache-2.0
"""Where to take hold of a thing: candidates from its collision geometry, best first.

Boxes, cans and bottles are taken across their narrowest side, bowls and mugs by the rim, pots by
the knob of the lid. No angle is tuned per task: each candidate is checked for reach and room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from quantvla_ros.sim.kinematics import ArmKinematics, hand_rotation, top_down
from quantvla_ros.sim.shapes import body_points, collision_geoms
from quantvla_ros.sim.surroundings import Surroundings

MAX_WIDTH = 0.073  # m; the fingers open to 0.08
PALM_DEPTH = 0.031  # m from the point between the fingertips up to the palm
TIP_BELOW = 0.0095  # m from that point down to the fingertips
RIM_DEPTH = 0.022  # m below the rim
KNOB_DEPTH = 0.010
FINGERS_OPEN = 0.04  # m, each finger
REACH_ERROR = 4e-3
RIM_DIRECTIONS = 16
# how far inside the rim in m and how much the hand leans outwards in rad, tried in this order
RIM_WAYS = ((0.008, 0.0), (0.022, 0.0), (0.006, 0.3), (0.006, 0.42), (-0.004, 0.3))
HOVER = 0.08  # m above a grasp
HAND_HALF = 0.10  # m, across the fingers
BESIDE = 0.04  # m from the middle of a thing towards a front where there is still room
# rad; a joint this far from its home: the elbow hits what stands around more often than not, and
# the arm must unfold on the way there
TWISTED = 1.3
KNOBBED = ('moka_pot',)
Pose = tuple[np.ndarray, np.ndarray]  # position (3,), rotation (3, 3)
YAWS = np.linspace(-np.pi / 2, np.pi / 2, 25)[1:]


@dataclass(frozen=True)
class Grasp:
    """A hand pose at which the fingers close, the joints that reach it, and from where to come."""

    position: np.ndarray
    rotation: np.ndarray
    joints: np.ndarray

    @property
    def way(self) -> np.ndarray:
        """From the grasp to the point above it; a leaning hand comes from aside."""
        return _way(self.rotation)


def _way(rotation: np.ndarray) -> np.ndarray:
    outward = -rotation[:2, 2]
    lean = float(np.linalg.norm(outward))
    if lean < 0.05:
        return np.array([0.0, 0.0, HOVER])
    return np.append(0.09 / lean * outward, HOVER)


def body_candidates(points: np.ndarray) -> Iterator[Pose]:
    """Yield hand poses across the narrow sides of a thing, narrowest and straightest first."""
    low, high = points[:, 2].min(), points[:, 2].max()
    height = high - low
    z = max(high - PALM_DEPTH + 0.002, low + 0.012)
    if height < 0.05:
        z = low + max(0.012, 0.35 * height)
    scored = []
    for yaw in YAWS:
        closing, side = np.array([-np.sin(yaw), np.cos(yaw)]), np.array([np.cos(yaw), np.sin(yaw)])
        along, across = points[:, :2] @ closing, points[:, :2] @ side
        width = np.ptp(along)
        if width > MAX_WIDTH:
            continue
        centre = closing * (along.max() + along.min()) / 2 + side * (across.max()
                                                                      + across.min()) / 2
        # one way out of two on a square thing: stay with the straight wrist
        scored.append((width + 0.006 * abs(yaw), np.append(centre, z), float(yaw)))
    for _, position, yaw in sorted(scored, key=lambda item: item[0]):
        yield position, top_down(yaw)


def rim_candidates(points: np.ndarray) -> Iterator[Pose]:
    """Yield hand poses with one finger inside a hollow thing, straightest wrist first.

    A direction in which a handle sticks out is left out. Where a straight hand has no room, one
    that leans outwards follows.
    """
    lowest = points[:, 2].min() + TIP_BELOW + 0.004
    rim = points[points[:, 2] > points[:, 2].max() - 0.03]
    radii, centre = _rim_radii(rim)
    tops = _rim_tops(rim, centre)
    usual = np.median(radii)
    scored = []
    for index in range(RIM_DIRECTIONS):
        angle = 2 * np.pi * index / RIM_DIRECTIONS
        if radii[index] > usual + 0.012:
            continue
        outward = np.array([np.cos(angle), np.sin(angle)])
        yaw = angle % np.pi - np.pi / 2  # either finger may be the one inside
        closing = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
        for order, (inset, lean) in enumerate(RIM_WAYS):
            spot = centre + outward * (radii[index] - inset)
            approach = np.append(-np.sin(lean) * outward, -np.cos(lean))
            score = abs(yaw) + 0.05 * (outward[1] < 0) + 10.0 * order
            height = max(tops[index] - RIM_DEPTH, lowest)
            pose = np.append(spot, height), hand_rotation(approach, closing)
            scored.append((score, pose))
    yield from (pose for _, pose in sorted(scored, key=lambda item: item[0]))


def _rim_radii(rim: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the rim reaches in each direction, and its centre without the handle."""
    centre = (rim[:, :2].max(0) + rim[:, :2].min(0)) / 2
    angles = 2 * np.pi * np.arange(RIM_DIRECTIONS) / RIM_DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    for _ in range(8):
        radii = ((rim[:, :2] - centre) @ directions.T).max(0)
        usual = np.median(radii)
        # what is not within a centimetre of the usual radius on both sides is a handle
        good = np.abs(radii - usual) < 0.012
        centre = centre + 0.5 * ((radii - usual)[:, None] * directions)[good].mean(0)
    return radii, centre


def _rim_tops(rim: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return how high the rim is in each direction: that of a tilted bowl by centimetres."""
    seen = np.arctan2(*(rim[:, :2] - centre).T[::-1])
    angles = 2 * np.pi * np.arange(RIM_DIRECTIONS) / RIM_DIRECTIONS
    away = np.abs((seen - angles[:, None] + np.pi) % (2 * np.pi) - np.pi)
    near = away <= np.maximum(2 * np.pi / RIM_DIRECTIONS, away.min(1, keepdims=True))
    return np.where(near, rim[:, 2], -np.inf).max(1)


def knob_candidates(around: Surroundings, name: str) -> Iterator[Pose]:
    """Yield hand poses at the highest geom of a pot: the knob of its lid."""
    model, data = around.world.model, around.world.data
    geoms = collision_geoms(model, around.world.thing_body(name))
    tops = [(data.geom_xpos[g][2] + model.geom_size[g].max(), g) for g in geoms]
    points = {g: data.geom_xpos[g] for _, g in tops}
    best = max(points, key=lambda g: points[g][2])
    high = body_points(model, data, around.world.thing_body(name))[:, 2].max()
    position = np.append(points[best][:2], high - KNOB_DEPTH)
    for yaw in (0.0, np.pi / 4, -np.pi / 4, np.pi / 2):
        yield position, top_down(yaw)


def candidates(around: Surroundings, name: str) -> Iterator[Pose]:
    """Yield hand poses for a thing, best first."""
    points = around.points(name)
    if around.world.scene.things[name]['category'] in KNOBBED:
        yield from knob_candidates(around, name)
        return
    found = list(body_candidates(points))
    yield from found or rim_candidates(points)


def choose_grasp(
    around: Surroundings, arm: ArmKinematics, name: str, skip: int = 0,
    front: np.ndarray | None = None,
) -> Grasp | None:
    """Return the best candidate that the arm reaches without hitting anything.

    Those that twist the arm come last: only the hand is checked for room, not the elbow.
    skip: how many good candidates to pass over, for another try after a failed one.
    front: outward direction of a front that the thing is then put down close to; poses in which
    the hand does not stick out towards it come first.
    """
    reached, twisted, clear = [], [], []
    poses = list(candidates(around, name))
    if front is not None:
        middle = around.origin(name)
        poses.sort(key=lambda pose: _sticks_out(pose, middle, front) > BESIDE)
    for position, rotation in poses:
        joints, error = arm.solve(position, rotation, arm.home)
        if error > REACH_ERROR:
            continue
        grasp = Grasp(position, rotation, joints)
        reached.append(grasp)
        if not _has_room(around, arm, position, rotation, joints):
            continue
        if np.abs(joints - arm.home).max() > TWISTED:
            twisted.append(grasp)
            continue
        clear.append(grasp)
        if len(clear) > skip:
            return grasp
    # where nothing is quite clear, a light touch on the way is better than no try
    found = clear + twisted or reached
    return found[skip % len(found)] if found else None


def _sticks_out(pose: Pose, middle: np.ndarray, front: np.ndarray) -> float:
    """How far the hand reaches from the middle of the thing towards a front, against `front`."""
    position, rotation = pose
    return float(HAND_HALF * abs(rotation[:, 0] @ front) - (position - middle) @ front)


def _has_room(
    around: Surroundings,
    arm: ArmKinematics,
    position: np.ndarray,
    rotation: np.ndarray,
    joints: np.ndarray,
) -> bool:
    """Whether the open hand hits nothing at a grasp and on the way down to it."""
    if around.hand_collides(joints, FINGERS_OPEN):
        return False
    way = _way(rotation)
    for step in (way, way + [0, 0, HOVER]):
        joints, _ = arm.solve(position + step, rotation, joints)
        if around.hand_collides(joints, FINGERS_OPEN):
            return False
    return True
