# SPDX-License-Identifier: Apache-2.0
"""`quantvla frames`: keep what the policy sees, for calibration: in the simulator, or from a bag.

In the simulator, starts are drawn at random from the regions of the task files; the official
states belong to the evaluation and are never used here. Writes one frames file.
"""

from __future__ import annotations

import argparse
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.calibration.bags import ReadOptions
from quantvla_ros.calibration.frames import FrameSettings, frames_of
from quantvla_ros.calibration.frames_file import write_frames
from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.parallel import Failed, Task, run_tasks
from quantvla_ros.policies.base import Policy, PolicySettings, make_policy
from quantvla_ros.sim.episodes import CLOSE, OPEN, WORLD_RATE_HZ, observe, seed_of
from quantvla_ros.sim.lighting import parse_lighting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla frames`."""
    add = parser.add_argument
    add('--out', type=Path, default=Path('runs/frames.npz'), help='file to write')
    add('--suite', default='libero_object,libero_spatial', help='suites, joined by commas')
    add('--tasks', default='0-9', help='task numbers in each suite, as in 0,3-5')
    add('--episodes', type=int, default=1, help='random starts of each task')
    add('--chunks', type=int, default=12, help='most chunks of an episode, one frame for each')
    add('--policy', default='libero_panda')
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--contract', default='libero_panda')
    add('--lighting', default='day', metavar='WORDS',
        help='day, overcast, lamp, night, or numbers such as light=0.5,warmth=0.8,noise=6')
    add('--seed', type=int, default=0, help='of starts and noise')
    add('--workers', type=int, default=1, help='processes that play tasks side by side')
    add('--threads', type=int, default=0, help='of each process')
    bag = parser.add_argument_group('from a bag instead')
    bag.add_argument('--bag', default='', help='rosbag2 directory, .mcap or .db3')
    bag.add_argument('--count', type=int, default=128, help='frames to choose')
    bag.add_argument('--namespace', default=None, help='of the robot, where several were recorded')
    bag.add_argument('--partial', action='store_true', help='use what a damaged bag still holds')


def roll_out(
    world: Any, policy: Policy, contract: Contract, chunks: int, seed: int
) -> list[Observation]:
    """Play from where the world stands; return what was seen before each chunk."""
    gripper, seen = contract.gripper, []
    middle = 0.5 * (gripper.open_position + gripper.closed_position)
    toward_closed = np.sign(gripper.closed_position - gripper.open_position)
    steps = contract.action.execute
    for number in range(chunks):
        stamp_ns = round(number * steps / WORLD_RATE_HZ * NS_PER_S)
        seen.append(observe(world, contract, world.scene.instruction, stamp_ns))
        chunk = policy.denoise(policy.prepare(seen[-1]), seed_of('frames', seed, number))
        for row in chunk.positions[:steps]:
            closing = (row[-1] - middle) * toward_closed > 0
            world.step(row[:-1], CLOSE if closing else OPEN)
            if world.success():
                return seen
    return seen


def from_bag(args: argparse.Namespace, contract: Contract) -> list[Observation]:
    """Return the frames chosen from a bag, and say what was not used. Raises ValueError."""
    held_out = max(1, args.count // 5)
    wanted = FrameSettings(
        args.count - held_out, held_out, args.seed,
        read=ReadOptions(namespace=args.namespace, partial=args.partial))
    found = frames_of(args.bag, contract, wanted)
    print(f'{args.bag}: {found.facts["moments"]} moments over {found.facts["seconds"]:.0f} s')
    for reason, count in sorted(found.rejected.items()):
        print(f'  {count} not used: {reason}')
    for sentence in found.facts['damage']:
        print(f'  damaged: {sentence}')
    return sorted((*found.fit, *found.held_out), key=lambda one: one.stamp_ns)


def run(args: argparse.Namespace) -> int:
    """Record and write."""
    if args.bag:
        write(args.out, from_bag(args, load_contract(args.contract)))
        return 0
    from quantvla_ros.sim.evaluate import parse_numbers

    if args.episodes < 1 or args.chunks < 1 or args.workers < 1:
        raise ValueError('--episodes, --chunks and --workers must be at least 1')
    parse_lighting(args.lighting)
    names = [(suite.strip(), task) for suite in args.suite.split(',')
             for task in parse_numbers(args.tasks)]
    tasks = [Task(f'{suite}_{task}', partial(record, args, suite, task)) for suite, task in names]
    found: dict[str, list[Observation]] = {}
    for task, seen in run_tasks(tasks, args.workers):
        if isinstance(seen, Failed):
            kind = ValueError if seen.sentence else RuntimeError
            raise kind(f'{task.name}: {seen.sentence or seen.text}')
        found[task.name] = seen
        print(f'{task.name}: {len(seen)} frames, {len(found)} of {len(tasks)} tasks', flush=True)
    write(args.out, [one for task in tasks for one in found[task.name]])
    return 0


def record(args: argparse.Namespace, suite: str, task: int) -> list[Observation]:
    """Return the frames of all episodes of one task."""
    from quantvla_ros.sim.starts import StartSampler
    from quantvla_ros.sim.world import make_world

    policy = _policy(args.policy, args.contract, args.model,
                     args.threads or (1 if args.workers > 1 else 0))
    world = make_world(suite, task, lighting=parse_lighting(args.lighting))
    sampler, frames = StartSampler(world), []
    try:
        for episode in range(args.episodes):
            key = seed_of('start', args.seed, suite, task, episode)
            sampler.draw(np.random.default_rng(key)).put(world)
            frames += roll_out(world, policy, policy.contract, args.chunks, key)
    finally:
        world.close()
    return frames


@lru_cache(maxsize=1)  # a process plays one task after another with it
def _policy(name: str, contract: str, model: str, threads: int) -> Policy:
    return make_policy(name, load_contract(contract), PolicySettings(model=model, threads=threads))


def write(path: Path, frames: list[Observation]) -> None:
    """Write a frames file and say how large it is."""
    write_frames(path, frames)
    print(f'{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.1f} MB')
