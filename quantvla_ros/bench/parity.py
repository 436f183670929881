# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench parity`: the same commands through LIBERO with robosuite and through World.

Free motion, a grasp, then the goal state itself: largest difference of joint and object positions
per phase, and agreement of every goal condition on every step. Imports LIBERO into this process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.resources import cache_folder
from quantvla_ros.sim.kinematics import ArmKinematics
from quantvla_ros.sim.packing import make_libero_env, prepare_import, quiet
from quantvla_ros.sim.rendering import mujoco
from quantvla_ros.sim.scenes import SUITES, load_scene, parse_tasks
from quantvla_ros.sim.world import CLOSE, OPEN, World

DEFAULT_TASKS = (
    'libero_object/0,libero_object/4,libero_spatial/0,libero_spatial/5,libero_goal/0,'
    'libero_goal/1,libero_goal/5,libero_goal/7,libero_10/2,libero_10/3,libero_10/9')
# what World restates, written down a second time: taken from World it would agree by itself
STIFFNESS, REACH_RAD = 200.0, 0.25
FREE_STEPS, GRASP_STEPS, GOAL_STEPS = 60, 60, 30
Command = tuple[np.ndarray, float]


class Twin:
    """LIBERO's environment beside a World, both fed the same absolute joint targets."""

    def __init__(self, suite: str, task_id: int, start: int, refreshed: bool = True) -> None:
        """Start both from an official state.

        refreshed: read the arm's state into robosuite's controller after the state is set.
        LIBERO does not, so its first control step acts on the pose from before.
        """
        self.world = World(load_scene(suite, task_id))
        prepare_import(cache_folder() / 'scenes' / '.libero')
        with quiet():
            self.env, _, states = make_libero_env(suite, task_id)
        self.env.robots[0].reset(deterministic=True)
        with quiet():
            self.env.set_init_state(states[start])
        self.controller = self.env.robots[0].controller
        self._stiffen()
        if refreshed:
            self.controller.update(force=True)
        self.world.reset_official(start, settle=0)
        self.data = self.env.env.sim.data._data
        self.seconds: list[tuple[float, float]] = []  # of each step, LIBERO's and World's

    def _stiffen(self) -> None:
        """Make robosuite's delta controller an absolute one, as World is."""
        controller = self.controller
        controller.output_max = np.full(7, REACH_RAD)
        controller.output_min = -controller.output_max
        controller.action_scale = None
        controller.kp = np.full(7, STIFFNESS)
        controller.kd = 2.0 * np.sqrt(controller.kp)

    def step(self, target: np.ndarray, gripper: float) -> None:
        """Send one absolute joint target to both."""
        delta = (target - self.data.qpos[self.world.arm_qpos]) / REACH_RAD
        begin = time.perf_counter()
        with quiet():
            self.env.step(np.concatenate([delta.clip(-1.0, 1.0), [gripper]]))
        between = time.perf_counter()
        self.world.step(target, gripper)
        self.seconds.append((between - begin, time.perf_counter() - between))

    def difference(self) -> float:
        """Return the largest difference of any joint or object coordinate, in rad or m."""
        return float(np.abs(self.data.qpos - self.world.data.qpos).max())

    def conditions(self) -> tuple[list[bool], list[bool]]:
        """Return each goal condition as LIBERO sees it and as World does."""
        env = self.env.env
        theirs = [bool(env._eval_predicate(c)) for c in env.parsed_problem['goal_state']]
        return theirs, self.world.conditions()

    def put_goal(self) -> None:
        """Set, in both, joints and objects to where every goal condition should hold."""
        qpos = goal_state(self.world)
        for data, model in ((self.world.data, self.world.model),
                            (self.data, self.env.env.sim.model._model)):
            data.qpos[:] = qpos
            data.qvel[:] = 0.0
            mujoco.mj_forward(model, data)
        self.controller.update(force=True)

    def close(self) -> None:
        """Free both."""
        self.world.close()
        with quiet():
            self.env.close()


def goal_state(world: World) -> np.ndarray:
    """Return a qpos in which articulated goals are met and objects stand above their places."""
    qpos = world.data.qpos.copy()
    wanted = {'open': 'is_open', 'close': 'is_close', 'turnon': 'turn_on', 'turnoff': 'turn_off'}
    for name, *arguments in world.scene.goal:
        if name not in wanted:
            continue
        site = world.scene.sites.get(arguments[0])
        owner = world.scene.things[site['parent'] if site else arguments[0]]
        for joint in (site or owner)['joints']:
            threshold = owner['switches'][wanted[name]]
            address = world.model.jnt_qposadr[world.joint_id(joint)]
            low, high = world.model.jnt_range[world.joint_id(joint)]
            end = high if threshold['above'] else low
            qpos[address] = 0.5 * (threshold['value'] + end)
    probe = mujoco.MjData(world.model)
    probe.qpos[:] = qpos
    mujoco.mj_forward(world.model, probe)
    for name, *arguments in world.scene.goal:
        address = world.thing_qpos(arguments[0]) if len(arguments) == 2 else None
        if address is None:
            continue
        if arguments[1] in world.scene.sites:
            site = world.site_id(arguments[1])
            place = probe.site_xpos[site].copy()
            place[2] += world.scene.sites[arguments[1]]['size'][2] if name == 'on' else 0.0
        else:
            place = probe.xpos[world.thing_body(arguments[1])].copy()
        if name == 'on':  # let it fall the last two centimetres
            place[2] += 0.02 - world.scene.things[arguments[0]]['bottom_offset'][2]
        qpos[address : address + 3] = place
        probe.qpos[address : address + 3] = place
        mujoco.mj_forward(world.model, probe)  # the next object may belong on this one
    return qpos


def free_motion(world: World) -> Iterator[Command]:
    """Swing every joint."""
    home = world.arm_positions()
    for step in range(FREE_STEPS):
        swing = 0.15 * np.sin(0.1 * step) * np.array([1, 1, -1, 1, 1, 1, 1])
        yield home + swing, CLOSE if step > FREE_STEPS // 2 else OPEN


def grasp(world: World) -> Iterator[Command]:
    """Reach into the first object or fixture of interest, close on it and pull it up."""
    name = next(arg for arg in world.scene.goal[0][1:])
    sites = world.scene.sites
    if name in sites:
        place = world.data.site_xpos[world.site_id(name)].copy()
    else:
        place = world.data.xpos[world.thing_body(name)].copy()
    home = world.arm_positions()
    arm = ArmKinematics(world, home)
    hand = arm.pose()[1]
    above, _ = arm.solve(place + [0.0, 0.0, 0.12], hand, home)
    at, _ = arm.solve(place, hand, above)
    quarter = GRASP_STEPS // 4
    for start, end, gripper in ((home, above, OPEN), (above, at, OPEN), (at, at, CLOSE),
                                (at, above, CLOSE)):
        for step in range(1, quarter + 1):
            yield start + (end - start) * step / quarter, gripper


@dataclass
class Result:
    """What one task showed. Differences in rad or m, per phase."""

    task: str
    goal: list[list[str]]
    differences: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    checks: int = 0
    disagreements: int = 0
    held: int = 0
    successes: int = 0
    contacts: int = 0
    libero_step_ms: float = 0.0
    world_step_ms: float = 0.0

    def note(self, phase: str, twin: Twin) -> None:
        """Add what one step showed."""
        self.last[phase] = twin.difference()
        self.differences[phase] = max(self.differences.get(phase, 0.0), self.last[phase])
        theirs, ours = twin.conditions()
        self.checks += len(theirs)
        self.disagreements += sum(a != b for a, b in zip(theirs, ours, strict=True))
        self.held += sum(theirs)
        self.successes += all(theirs)
        self.contacts = max(self.contacts, int(twin.world.data.ncon))


def compare(suite: str, task_id: int, start: int = 0, refreshed: bool = True) -> Result:
    """Run the three phases of one task in both and return what was seen."""
    twin = Twin(suite, task_id, start, refreshed)
    result = Result(f'{suite}/{task_id}', twin.world.scene.goal)
    try:
        twin.step(twin.world.arm_positions(), OPEN)
        result.note('first step', twin)
        for command in free_motion(twin.world):
            twin.step(*command)
            result.note('free', twin)
        for command in grasp(twin.world):
            twin.step(*command)
            result.note('grasp', twin)
        twin.put_goal()
        hold = twin.world.arm_positions()
        for _ in range(GOAL_STEPS):
            twin.step(hold, OPEN)
            result.note('goal', twin)
        result.libero_step_ms, result.world_step_ms = (
            1e3 * float(value) for value in np.median(twin.seconds, axis=0))
    finally:
        twin.close()
    return result


def line(result: Result) -> str:
    """Return one row of the printed table."""
    parts = '  '.join(f'{result.differences[p]:10.1e}' for p in result.differences)
    return (f'{result.task:22s}  {parts}  {result.checks:6d}  {result.disagreements:8d}  '
            f'{result.held:5d}  {result.successes:8d}')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench parity`."""
    parser.add_argument('--tasks', default=DEFAULT_TASKS,
                        help=f'SUITE or SUITE/TASK, joined by commas; suites: {", ".join(SUITES)}')
    parser.add_argument('--start', type=int, default=0, help='official start state, 0 to 49')
    parser.add_argument('--json', type=Path, help='write the figures to this file')


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 when a goal condition disagreed anywhere."""
    tasks = parse_tasks(args.tasks)
    print('largest difference of any joint or object coordinate, rad or m, per phase')
    print(f'{"task":22s}  {"first step":>10s}  {"free":>10s}  {"grasp":>10s}  {"goal":>10s}  '
          f'{"checks":>6s}  {"disagree":>8s}  {"held":>5s}  {"success":>8s}')
    results = []
    for suite, task_id in tasks:
        results.append(compare(suite, task_id, args.start))
        print(line(results[-1]), flush=True)
    times = np.array([(r.libero_step_ms, r.world_step_ms) for r in results])
    print(f'a control step of 50 ms took {times[:, 0].mean():.1f} ms in robosuite and '
          f'{times[:, 1].mean():.1f} ms in World (medians, averaged over the tasks)')
    stale = compare(*tasks[0], args.start, refreshed=False)
    wrong = sum(r.disagreements for r in results)
    print(f'goal conditions agreed on {sum(r.checks for r in results) - wrong} of '
          f'{sum(r.checks for r in results)} checks')
    print('LIBERO as it is acts, in its first control step, on the arm state from before the '
          f'start state was set: {stale.task} then differs by '
          f'{stale.last["first step"]:.1e} after that step and by {stale.last["free"]:.1e} '
          f'{FREE_STEPS} steps later')
    if args.json is not None:
        found: dict[str, Any] = {'tasks': [asdict(r) for r in results], 'stale': asdict(stale)}
        args.json.write_text(json.dumps(found, indent=1))
    return int(wrong > 0)
