# SPDX-License-Identifier: Apache-2.0
"""From the conditions of a task's goal to the skill that comes next.

Knows the order in which conditions can be met (switch on, open, put, close) and where a thing
must go to satisfy one. Refuses a condition no skill serves, with its name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from quantvla_ros.sim.kinematics import ArmKinematics
from quantvla_ros.sim.skills import PAIR, SLOT, Hold, Segment, Skills
from quantvla_ros.sim.surroundings import Surroundings
from quantvla_ros.sim.world import OPEN, World

ORDER = ('turnon', 'open', 'on', 'in', 'close')
DROP = 0.008  # m above a surface at which a thing is let go
BOXES = ('microwave',)
BOX_PLACE = np.array([-0.022, -0.025, 0.0])  # m from the middle of its region: room for the hand
ROOM = 0.13  # m; a drawer must be this far open to put something in
OUTWARD = np.arange(0.0, 0.041, 0.005)  # m from the middle of a drawer
LEANS = 0.25  # rad; what leans on a drawer's wall keeps the drawer from closing


class Planner:
    """Plans for one world. aim: what the last plan reaches for from above, if it does."""

    def __init__(self, world: World, arm: ArmKinematics, around: Surroundings) -> None:
        self.world, self.around = world, around
        self.skills = Skills(world, arm, around)
        self.aim: str | None = None
        self.goal = sorted(enumerate(world.scene.goal), key=lambda item: ORDER.index(item[1][0]))

    def plan(self, seed: np.ndarray, tries: Counter[str]) -> list[Segment]:
        """Return the moves up to the next point of decision; never an empty list."""
        self.aim = None
        met = self.world.conditions()
        for number, condition in self.goal:
            if not met[number] or self._leans(condition):
                moves = self._towards(condition, seed, tries)
                return moves or [Hold(OPEN, 2)]
        return [Hold(OPEN, 2)]

    def _leans(self, condition: list[str]) -> bool:
        """Whether a thing is in a drawer that shall be shut, but stands in the way of it."""
        if condition[0] != 'in' or ['close', condition[2]] not in self.world.scene.goal:
            return False
        up = self.world.data.xmat[self.world.thing_body(condition[1])].reshape(3, 3)[2]
        return float(np.arccos(min(1.0, np.abs(up).max()))) > LEANS

    def _towards(
        self, condition: list[str], seed: np.ndarray, tries: Counter[str]
    ) -> list[Segment]:
        verb, thing = condition[0], condition[1]
        if verb in ('on', 'in'):
            return self._put(verb, thing, condition[2], seed, tries)
        joint = self._joints(thing)[0]
        held = self.around.holding()
        if held is not None:
            return self._put_aside(held)
        if verb == 'open':
            return self.skills.open_drawer(joint, seed)
        if verb == 'turnon':
            return self.skills.turn_knob(joint)
        if verb == 'close':
            hinged = thing in self.world.scene.things
            return self.skills.close_door(joint) if hinged else self.skills.close_drawer(joint)
        raise ValueError(f'the expert has no skill for {condition!r}')

    def _joints(self, name: str) -> list[str]:
        owner = self.world.scene.sites.get(name) or self.world.scene.things[name]
        return owner['joints']

    def _put_aside(self, held: str) -> list[Segment]:
        """Set down what is in the way where the hand is."""
        position, _ = self.skills.arm.pose()
        below = self.around.surface_below(position, 0.03, (held,))
        low = max(below, float(self.around.points(held)[:, 2].min()) - 0.2)
        return self.skills.place(held, self.around.origin(held)[:2], low + DROP)

    def _put(
        self, verb: str, thing: str, target: str, seed: np.ndarray, tries: Counter[str]
    ) -> list[Segment]:
        site = self.world.scene.sites.get(target)
        held = self.around.holding()
        drawer = self._drawer(site)
        if drawer and held is None and self.skills.opened(drawer) < ROOM:
            return self.skills.open_drawer(drawer, seed)
        if held not in (None, thing):
            return self._put_aside(held)
        if site and self._category(site['parent']) in BOXES:
            return self._through_door(thing, target, held)
        if held is None:
            moves = self.skills.pick(thing, seed, tries[thing] // 2, drawer)
            tries[thing] += 1
            self.aim = thing
            return moves
        return self._put_down(verb, thing, target)

    def _clear_of_handles(self, spot: np.ndarray, outward: np.ndarray, thing: str) -> np.ndarray:
        """Return the place nearest to a spot in an open drawer with nothing sticking out above."""
        points = self.around.points(thing)
        half = 0.9 * float(np.ptp(points[:, :2], axis=0).max()) / 2
        spots = [spot + out * outward[:2] for out in OUTWARD]
        tops = [self.around.surface_below(place, half, (thing,)) for place in spots]
        return spots[int(np.argmin(tops))]

    def _drawer(self, site: dict[str, Any] | None) -> str | None:
        """Return the joint of the drawer that a region is in, if it is in one."""
        joint = site['joints'][0] if site and site['joints'] else ''
        return joint if 'drawer' in joint or 'level' in joint else None

    def _category(self, name: str | None) -> str:
        return self.world.scene.things[name]['category'] if name in self.world.scene.things else ''

    def _through_door(self, thing: str, target: str, held: str | None) -> list[Segment]:
        """Put a thing into a box with a door: by its handle, from the front."""
        if held is None:
            return self.skills.pick_by_handle(thing)
        parent = self.world.thing_body(self.world.scene.sites[target]['parent'])
        matrix = self.world.data.xmat[parent].reshape(3, 3)
        front = matrix @ [0.0, -1.0, 0.0]
        spot = self._middle(target) + matrix @ BOX_PLACE
        low = self._middle(target)[2] - self.world.scene.sites[target]['size'][2]
        return self.skills.slide_in(thing, spot[:2], front[:2], low + 0.01)

    def _middle(self, target: str) -> np.ndarray:
        if target in self.world.scene.sites:
            return self.world.data.site_xpos[self.world.site_id(target)].copy()
        return self.around.origin(target)

    def _slot(self, verb: str, thing: str, target: str) -> np.ndarray:
        """Where the thing's origin goes in the plane: the middle, or a place beside the other."""
        spot = self._middle(target)[:2]
        rivals = [c[1] for c in self.world.scene.goal if c[0] == verb and c[-1] == target]
        if len(rivals) < 2:
            return spot
        away = SLOT if verb == 'on' else PAIR
        side = np.array([1.0, 0.0]) if verb == 'on' else np.array([1.0, 0.0])
        return spot + side * away * (1 - 2 * rivals.index(thing))

    def _put_down(self, verb: str, thing: str, target: str) -> list[Segment]:
        spot = self._slot(verb, thing, target)
        below = self.around.surface_below(spot, 0.02, (thing,))
        site = self.world.scene.sites.get(target)
        if verb == 'in' and site:
            drawer = self._drawer(site)
            if drawer:
                spot = self._clear_of_handles(spot, self.skills.outward(drawer), thing)
                below = self.around.surface_below(spot, 0.02, (thing,))
            points = self.around.points(thing)
            position, _ = self.skills.arm.pose()
            hang = float(position[2] - points[:, 2].min())
            walls = self.around.surface_below(spot, 0.11, (thing,))
            clear = max(below + 0.02, walls + 0.015 - hang)
            return self.skills.place(
                thing, spot, self.skills.lowest_release(thing, spot, clear, below + 0.02))
        return self.skills.place(thing, spot, below + DROP)
