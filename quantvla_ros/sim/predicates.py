# SPDX-License-Identifier: Apache-2.0
"""LIBERO's goal predicates on plain MuJoCo data: In, On, Open, Close, TurnOn, TurnOff.

The wheels' definitions restated as arithmetic on the packed description, with their peculiarities
(In ignores contact with a region, regions rotate by their matrix and not by its transpose): the
parity test compares every predicate with LIBERO's own on every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from quantvla_ros.sim.rendering import mujoco

Predicate = Callable[[mujoco.MjData], bool]
IN_SLACK_BELOW = 0.01  # m; a region reaches this far below its box
ON_SLACK_BELOW = 0.005  # m
ON_REACH_ABOVE = 0.10  # m; an object this far above the top of a region is still on it
ON_CENTRE_DISTANCE = 0.03  # m, between the centres of two objects in the plane


def _id(model: mujoco.MjModel, kind: mujoco.mjtObj, name: str) -> int:
    number = mujoco.mj_name2id(model, kind, name)
    if number < 0:
        raise ValueError(f'the scene has no {kind.name[6:].lower()} named {name!r}')
    return number


class GoalReader:
    """Turns the goal of a task description into predicates over MjData."""

    def __init__(self, model: mujoco.MjModel, description: Mapping[str, Any]) -> None:
        self._model = model
        self._things = description['things']
        self._sites = description['sites']

    def read(self, condition: list[str]) -> Predicate:
        """Return the predicate of one condition such as ['on', 'bowl_1', 'plate_1'].

        Raises ValueError for a predicate that no LIBERO suite uses.
        """
        name, *arguments = condition
        unary = {'open': ('is_open', any), 'close': ('is_close', all),
                 'turnon': ('turn_on', any), 'turnoff': ('turn_off', all)}
        if name in unary and len(arguments) == 1:
            return self._joint_test(arguments[0], *unary[name])
        if name == 'in' and len(arguments) == 2:
            return self._inside(*arguments)
        if name == 'on' and len(arguments) == 2:
            on_site = arguments[1] in self._sites
            return self._on_site(*arguments) if on_site else self._on_thing(*arguments)
        raise ValueError(
            f'goal condition {condition!r} is unknown; known are in, on, {", ".join(unary)}')

    def _body(self, thing: str) -> int:
        return _id(self._model, mujoco.mjtObj.mjOBJ_BODY, self._things[thing]['body'])

    def _touching(self, first: str, second: str) -> Predicate:
        """Whether any collision geom of the first is in contact with one of the second."""
        masks = []
        for name in (first, second):
            mask = np.zeros(self._model.ngeom, bool)
            for geom in self._things[name]['contact_geoms']:
                mask[_id(self._model, mujoco.mjtObj.mjOBJ_GEOM, geom)] = True
            masks.append(mask)
        one, other = masks

        def touching(data: mujoco.MjData) -> bool:
            a, b = data.contact.geom1, data.contact.geom2
            return bool(np.any((one[a] & other[b]) | (one[b] & other[a])))

        return touching

    def _joint_test(self, name: str, test: str, combine: Callable[..., bool]) -> Predicate:
        """Compare the joints of a fixture, or of the part that carries a site."""
        if name in self._sites:
            joints, owner = self._sites[name]['joints'], self._sites[name]['parent']
        else:
            joints, owner = self._things[name]['joints'], name
        threshold = self._things[owner]['switches'].get(test)
        if threshold is None:
            raise ValueError(f'{owner!r} has no test {test!r}, which the goal asks of {name!r}')
        addresses = [
            int(self._model.jnt_qposadr[_id(self._model, mujoco.mjtObj.mjOBJ_JOINT, joint)])
            for joint in joints
        ]
        value, above, equal = threshold['value'], threshold['above'], threshold['equal']

        def passed(position: float) -> bool:
            return (position > value if above else position < value) or (
                equal and position == value)

        return lambda data: combine(passed(data.qpos[address]) for address in addresses)

    def _site(self, name: str) -> tuple[int, np.ndarray]:
        site = _id(self._model, mujoco.mjtObj.mjOBJ_SITE, name)
        return site, np.asarray(self._sites[name]['size'], float)

    def _inside(self, thing: str, region: str) -> Predicate:
        """In: the thing's origin is inside the region's axis-aligned box."""
        if region not in self._sites:
            raise ValueError(f'goal In({thing}, {region}): {region!r} is not a region')
        body = self._body(thing)
        site, size = self._site(region)

        def inside(data: mujoco.MjData) -> bool:
            half = np.abs(data.site_xmat[site].reshape(3, 3) @ size)
            low = data.site_xpos[site] - half
            low[2] -= IN_SLACK_BELOW
            high = data.site_xpos[site] + half
            return bool(np.all(data.xpos[body] > low) and np.all(data.xpos[body] < high))

        return inside

    def _on_site(self, thing: str, region: str) -> Predicate:
        """On a region: above it within its borders, and touching what carries the region."""
        body = self._body(thing)
        site, size = self._site(region)
        parent = self._sites[region]['parent']
        touching = self._touching(parent, thing) if parent in self._things else None

        def on(data: mujoco.MjData) -> bool:
            matrix = data.site_xmat[site].reshape(3, 3)
            offset = matrix @ (data.xpos[body] - data.site_xpos[site])
            above = size[2] - ON_SLACK_BELOW < offset[2] < size[2] + ON_REACH_ABOVE
            if not (above and np.all(np.abs(offset[:2]) < size[:2])):
                return False
            return touching is None or touching(data)

        return on

    def _on_thing(self, thing: str, base: str) -> Predicate:
        """On a thing: not lower, centres within 3 cm in the plane, and touching."""
        body, below = self._body(thing), self._body(base)
        touching = self._touching(thing, base)

        def on(data: mujoco.MjData) -> bool:
            above = data.xpos[below][2] <= data.xpos[body][2]
            apart = np.linalg.norm(data.xpos[below][:2] - data.xpos[body][:2])
            return bool(above and apart < ON_CENTRE_DISTANCE) and touching(data)

        return on
