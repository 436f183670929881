# SPDX-License-Identifier: Apache-2.0
"""Generate demonstrations on all cores and render their frames, both at once.

Simulating processes write files of episodes; rendering processes pick them up as they appear.
Seeds are a function of task, number and --seed, so a run can be repeated and continued: files
that are there already are not made again. A process whose own share is done takes from those of
others, since an episode of a long task costs three times that of a short one.
"""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from quantvla_ros.sim.scenes import load_scene
from quantvla_ros.sim.starts import StartSampler
from quantvla_ros.sim.world import World
from quantvla_ros.training.demonstrations import Demonstration, demonstrate
from quantvla_ros.training.processes import Say, run_jobs
from quantvla_ros.training.store import (
    episode_files,
    frames_path,
    read_episodes,
    write_episodes,
)

Task = tuple[str, int]
PER_FILE = 5  # attempts
TASKS_PER_PROCESS = 5  # worlds a process keeps in memory
IMAGE = 128
CAMERAS = ('agentview', 'wrist')
DONE = 'simulated'
TAKEN = '.taken'  # beside a file of episodes: some process makes it


class Worlds:
    """Keeps the worlds of a few tasks; loading one takes a second or two.

    textures: texture limits (see sim.scenes); where there are several, the number of a file or
    an attempt decides which one it shows, so that the policy learns all of them.
    """

    def __init__(self, textures: Sequence[int], most: int = TASKS_PER_PROCESS + 1) -> None:
        self.textures, self.most = tuple(textures), most
        self._kept: dict[tuple[Task, int], World] = {}

    def world(self, task: Task, number: int = 0) -> World:
        """Return the world of a task, in the look of this number."""
        key = task, self.textures[number % len(self.textures)]
        if key not in self._kept:
            if len(self._kept) >= self.most:
                self._kept.pop(next(iter(self._kept))).close()
            self._kept[key] = World(load_scene(*task, key[1]))
        return self._kept[key]


def task_of(name: str) -> Task:
    """Split libero_goal_3 into suite and number."""
    suite, _, number = name.rpartition('_')
    return suite, int(number)


def rng_of(task: Task, number: int, seed: int) -> np.random.Generator:
    """Return the random numbers of one attempt at one task."""
    return np.random.default_rng([zlib.crc32(f'{task[0]}_{task[1]}'.encode()), number, seed])


def file_jobs(attempts: Mapping[Task, int]) -> list[tuple[Task, int]]:
    """List (task, first attempt) of every file; at any cut all tasks are equally far on."""
    jobs = [((first + PER_FILE) / most, task, first)
            for task, most in attempts.items() for first in range(0, most, PER_FILE)]
    return [(task, first) for _, task, first in sorted(jobs)]


def shares(jobs: Sequence[tuple[Task, int]], tasks: Sequence[Task], processes: int) -> list[
    list[tuple[Task, int]]
]:
    """Divide files among processes so that each meets few tasks and all get the same number."""
    groups: dict[Task, list[tuple[Task, int]]] = {task: [] for task in tasks}
    for job in jobs:
        groups[job[0]].append(job)
    found: list[list[tuple[Task, int]]] = [[] for _ in range(processes)]
    takers: dict[Task, list[int]] = {task: [] for task in tasks}
    width = min(TASKS_PER_PROCESS, len(tasks))
    for process in range(processes):
        for k in range(width):
            takers[tasks[(process * width + k) % len(tasks)]].append(process)
    for task, group in groups.items():
        who = takers[task] or list(range(processes))
        for index, job in enumerate(group):
            found[who[index % len(who)]].append(job)
    place = {job: index for index, job in enumerate(jobs)}
    return [sorted(share, key=place.__getitem__) for share in found]


def take(path: Path) -> bool:
    """Whether this process is the first that wants to make a file."""
    try:
        path.with_suffix(TAKEN).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def simulate(share: Sequence[tuple[Task, int]], others: Sequence[tuple[Task, int]], folder: str,
             seed: int, textures: Sequence[int], until: float) -> None:
    """Make the files of one process, then those that others have not begun; until time is up."""
    worlds = Worlds(textures[:1])  # physics knows no texture
    samplers: dict[Task, StartSampler] = {}
    for task, first in (*share, *others):
        path = Path(folder) / f'{task[0]}_{task[1]}_{seed}_{first:05d}.npz'
        if time.time() > until:
            return
        if path.exists() or not take(path):
            continue
        world = worlds.world(task)
        sampler = samplers.setdefault(task, StartSampler(world))
        sampler.world = world
        found: list[Demonstration] = []
        for number in range(first, first + PER_FILE):
            try:
                episode = demonstrate(world, sampler, rng_of(task, number, seed))
            except (ValueError, np.linalg.LinAlgError, OverflowError):
                episode = None  # physics blew up or no start was found: not a demonstration
            if episode is not None:
                found.append(episode)
        if found:
            write_episodes(path, world.scene.name, found)
        with (Path(folder) / f'{DONE}.txt').open('a') as file:
            file.write(f'{world.scene.name} {len(found)} {PER_FILE}\n')


def render_files(folder: str, tasks: Sequence[Task], textures: Sequence[int], stop: str) -> None:
    """Render frames of files of some tasks as they appear, until the stop file does."""
    worlds, mine = Worlds(textures, most=3), {f'{s}_{n}' for s, n in tasks}
    while True:
        finished = Path(stop).exists()
        waiting = [
            path for path in episode_files(Path(folder))
            if path.stem.rsplit('_', 2)[0] in mine and not frames_path(path).exists()
        ]
        for path in sorted(waiting, key=lambda p: p.stem.rsplit('_', 2)[0]):
            _render_file(path, worlds)
        if finished and not waiting:
            return
        if not waiting:
            time.sleep(0.3)


def look_of(path: Path) -> int:
    """Return the number that decides which textures a file of episodes shows."""
    return zlib.crc32(path.name.encode())


def _render_file(path: Path, worlds: Worlds) -> None:
    episodes = read_episodes(path)
    world = worlds.world(task_of(episodes[0].task), look_of(path))
    frames = []
    for episode in episodes:
        for qpos in episode.qpos:
            world.show(qpos, episode.fixtures)
            frames.append([world.render(camera, IMAGE).copy() for camera in CAMERAS])
    target = frames_path(path)
    temporary = target.with_name(target.name + '.part')
    with temporary.open('wb') as file:
        np.save(file, np.array(frames, np.uint8))
    temporary.rename(target)


def _entry(role: str, *arguments: object) -> None:
    """Start one process in its role; spawn needs a function it can find."""
    {'simulate': simulate, 'render': render_files}[role](*arguments)  # type: ignore[operator]


def generate(
    attempts: Mapping[Task, int],
    folder: Path,
    seed: int,
    simulators: int,
    renderers: int,
    textures: Sequence[int],
    limit_s: float,
    say: Say,
) -> None:
    """Make so many attempts of each task and render them. Raises ValueError if none is solved."""
    folder.mkdir(parents=True, exist_ok=True)
    for taken in folder.glob(f'*{TAKEN}'):  # by a run that was cut off
        taken.unlink()
    tasks, stop = list(attempts), folder / 'stop'
    stop.unlink(missing_ok=True)
    until = time.time() + limit_s
    files = file_jobs(attempts)
    parts = shares(files, tasks, simulators)
    jobs: list[tuple[object, ...]] = [
        ('simulate', part, files, str(folder), seed, tuple(textures), until) for part in parts]
    jobs += [
        ('render', str(folder), tasks[index::renderers], tuple(textures), str(stop))
        for index in range(min(renderers, len(tasks)))
    ]
    log = folder / f'{DONE}.txt'
    log.touch()

    def count() -> int:
        done = len(log.read_text().splitlines())
        if done >= len(files) or time.time() > until:
            stop.touch()
        return sum(1 for path in episode_files(folder) if frames_path(path).exists())

    run_jobs(_entry, jobs, count, len(files), limit_s + 60, 'episode files', say)
    say(summary(folder))


def render(
    tasks: Sequence[Task], folder: Path, renderers: int, textures: Sequence[int], limit_s: float,
    say: Say,
) -> None:
    """Render the frames of every file of episodes that lacks them."""
    stop = folder / 'stop'
    stop.touch()
    jobs = [
        ('render', str(folder), list(tasks[index::renderers]), tuple(textures), str(stop))
        for index in range(min(renderers, len(tasks)))
    ]

    def count() -> int:
        return sum(1 for path in episode_files(folder) if frames_path(path).exists())

    run_jobs(_entry, jobs, count, len(episode_files(folder)), limit_s, 'episode files', say)


def summary(folder: Path) -> str:
    """Say how many attempts were solved, per task."""
    tried: Counter[str] = Counter()
    solved: Counter[str] = Counter()
    for line in (folder / f'{DONE}.txt').read_text().splitlines():
        name, good, all_of = line.split()
        solved[name] += int(good)
        tried[name] += int(all_of)
    if not sum(solved.values()):
        raise ValueError(f'no demonstration was solved in {folder}')
    lines = [f'{name}: {solved[name]}/{tried[name]}' for name in sorted(tried)]
    (folder / 'summary.json').write_text(json.dumps({'solved': solved, 'tried': tried}, indent=1))
    return f'{sum(solved.values())}/{sum(tried.values())} kept; ' + ', '.join(lines)
