# SPDX-License-Identifier: Apache-2.0
"""The cells of `quantvla bench recipes` as independent tasks, on as many processes as are given.

First each subject is prepared once (float chunks, what enters its layers, what the action feels);
then every cell is a task that reads this. The longest cells go first, so that none is left alone
at the end. A cell that fails is told by name and ends no other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from quantvla_ros.bench.recipes_cells import Row
from quantvla_ros.bench.recipes_subject import Setting, Subject, prepare, prepared
from quantvla_ros.parallel import Failed, Task, run_tasks

Say = Callable[..., None]

# seconds of one core for a cell on 64 frames, as measured; only their ratios count
EXPECTED_S = {'omniquant': 110, 'duquant': 55, 'onboard': 45, 'awq': 25, 'quantvla': 20,
              'omega_qvla': 18, 'omega_literal': 18, 'gptq': 12}
OTHERS_S = 8
PREPARING_THREADS = 8  # one frame at a time goes back through the network; more only wait


class Cell(NamedTuple):
    """A measurement that may have been made before: its key, who makes it, and how."""

    recipe: str
    precision: str
    made_by: str
    measure: Callable[[Subject], Row]
    needs_frames: bool = True

    @property
    def expected_s(self) -> float:
        """About how long it takes."""
        return EXPECTED_S.get(self.recipe.partition(':')[0], OTHERS_S)


@dataclass(frozen=True)
class Wanted:
    """Cells of one subject to measure, and whether its float rows are missing too."""

    cells: Sequence[Cell]
    floats: bool


def measure_all(
    wanted: Mapping[str, Wanted], setting: Setting, workers: int, say: Say
) -> Iterator[Row | str]:
    """Measure by subject what is wanted; yields rows as they come, and names of what failed."""
    with tempfile.TemporaryDirectory(prefix='quantvla-recipes-') as scratch:
        paths = {name: Path(scratch) / name for name in wanted}
        say(f'preparing {", ".join(wanted)}')
        jobs: dict[str, tuple[str, Cell]] = {}
        for task, found in run_tasks(_preparations(wanted, setting, paths, workers), workers):
            if isinstance(found, Failed):
                say(found.text)
                yield f'{task.name}, of which nothing can be measured: {found.cause}'
                continue
            for row in found:
                say(line(row))
                yield row
            jobs.update({f'{task.name} {cell.precision} {cell.recipe}': (task.name, cell)
                         for cell in wanted[task.name].cells})
        if workers > 1:
            jobs = dict(sorted(jobs.items(), key=lambda job: -job[1][1].expected_s))
        yield from _measure(jobs, setting, paths, workers, say)


def _measure(
    jobs: Mapping[str, tuple[str, Cell]], setting: Setting, paths: Mapping[str, Path],
    workers: int, say: Say,
) -> Iterator[Row | str]:
    tasks = [Task(key, partial(measure, setting, name, paths[name], cell))
             for key, (name, cell) in jobs.items()]
    start = partial(place, setting.device, max(setting.threads, 1)) if workers > 1 else None
    left = _Left({key: cell.expected_s for key, (_, cell) in jobs.items()})
    for count, (task, found) in enumerate(run_tasks(tasks, workers, start), 1):
        told = f'{count}/{len(tasks)}, {left.after(task.name) / 60:.1f} min left'
        if isinstance(found, Failed):
            say(f'{found.text}{task.name} failed   {told}')
            yield f'{task.name}: {found.cause}'
        else:
            say(f'{line(found)}   {told}')
            yield found


def _preparations(
    wanted: Mapping[str, Wanted], setting: Setting, paths: Mapping[str, Path], workers: int
) -> list[Task]:
    """One task for each subject, before there is anything else to do for the other workers."""
    wide = setting
    if workers > 1:
        share = workers * max(setting.threads, 1) // len(wanted)
        wide = replace(setting, threads=max(1, min(share, PREPARING_THREADS)))
    return [
        Task(name, partial(prepare, wide, name, paths[name], floats=of.floats,
                           known=any(cell.needs_frames for cell in of.cells)))
        for name, of in wanted.items()
    ]


def place(device: str, threads: int, number: int) -> None:
    """Give a process its threads, and its GPU where there are several."""
    torch.set_num_threads(threads)
    if device == 'cuda':
        torch.cuda.set_device(number % torch.cuda.device_count())


@torch.no_grad()
def measure(setting: Setting, name: str, path: Path, cell: Cell) -> Row:
    """Measure one cell of a prepared subject."""
    return cell.measure(prepared(setting, name, path))


def line(row: Row) -> str:
    """One row as it is told on the way."""
    return (f'{row.model:7s} {row.precision:5s} {row.recipe:36s} {row.mean_mrad:8.3f} mrad  '
            f'{row.nbytes / 1e6:6.2f} MB  {row.seconds:5.0f} s')


class _Left:
    """Estimates the time left from what was expected of the tasks that are done."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self.expected_s, self.began = dict(expected_s), time.monotonic()
        self.whole = sum(expected_s.values())

    def after(self, name: str) -> float:
        """Seconds left once this task is done too."""
        self.expected_s.pop(name)
        left = sum(self.expected_s.values())
        return (time.monotonic() - self.began) * left / max(self.whole - left, 1e-9)
