# SPDX-License-Identifier: Apache-2.0
"""Where the collision geometry of a body is: points in the world, computed from the model.

Knows no task and no robot. Visual meshes are ignored.
"""

from __future__ import annotations

import weakref

import numpy as np

from quantvla_ros.sim.rendering import mujoco

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
_subtrees: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def collision_geoms(model: mujoco.MjModel, body: int) -> list[int]:
    """List the collision geoms of a body and all bodies below it."""
    return [geom for geom, _ in _local_points(model, body)]


def body_points(model: mujoco.MjModel, data: mujoco.MjData, body: int) -> np.ndarray:
    """Return (points, 3) corners and vertices of a body's collision geometry in the world."""
    found = [
        points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
        for geom, points in _local_points(model, body)
    ]
    return np.concatenate(found) if found else data.xpos[body][None].copy()


def _local_points(model: mujoco.MjModel, body: int) -> list[tuple[int, np.ndarray]]:
    known = _subtrees.setdefault(model, {})
    if body not in known:
        known[body] = _collect(model, body)
    return known[body]


def _collect(model: mujoco.MjModel, body: int) -> list[tuple[int, np.ndarray]]:
    inside = {body}
    for child in range(body + 1, model.nbody):
        if model.body_parentid[child] in inside:
            inside.add(child)
    return [
        (geom, _geom_points(model, geom))
        for geom in range(model.ngeom)
        if model.geom_bodyid[geom] in inside
        and (model.geom_contype[geom] or model.geom_conaffinity[geom])
    ]


def _geom_points(model: mujoco.MjModel, geom: int) -> np.ndarray:
    kind, size = model.geom_type[geom], model.geom_size[geom].copy()
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        first = model.mesh_vertadr[mesh]
        return model.mesh_vert[first : first + model.mesh_vertnum[mesh]].astype(float)
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        size = np.full(3, size[0])
    elif kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        tall = size[1] + (size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0)
        size = np.array([size[0], size[0], tall])
    return _CORNERS * size
