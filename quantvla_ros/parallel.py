# SPDX-License-Identifier: Apache-2.0
"""Independent tasks on processes of their own: one that fails is told and ends no other.

A task is a name and a function without arguments that can be sent to a process, and so can what
it returns. Results come as they are done, in no order. Processes that render are spread over the
GPUs. Knows nothing of what is computed.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from quantvla_ros.sim.gpus import renders_on

Start = Callable[[int], None]  # called once in each process, with its number


class Task(NamedTuple):
    """Something to compute, and what to call it."""

    name: str
    work: Callable[[], Any]


@dataclass(frozen=True)
class Failed:
    """Why a task gave nothing: a traceback, or how its process ended.

    sentence: what the user can mend, '' for anything else.
    """

    text: str
    sentence: str = ''

    @property
    def cause(self) -> str:
        """The last line, which says what happened."""
        return self.text.strip().splitlines()[-1]


def attempt(task: Task) -> Any:
    """Return what a task gives, or Failed."""
    try:
        return task.work()
    except (ValueError, FileNotFoundError) as error:
        return Failed(traceback.format_exc(), str(error))
    except Exception:  # a border: the other tasks go on, and this one is told of
        return Failed(traceback.format_exc())


def run_tasks(
    tasks: Sequence[Task], workers: int, start: Start | None = None
) -> Iterator[tuple[Task, Any]]:
    """Yield every task with its result or Failed; with one worker, here and in the order given.

    A process that dies takes its task with it and is replaced.
    """
    if workers <= 1:
        for task in tasks:
            yield task, attempt(task)
        return
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # read by the children; tasks may ask for more
    waiting = list(reversed(tasks))
    team = [_Worker(number, start) for number in range(min(workers, len(tasks)))]
    try:
        for worker in team:
            worker.give(waiting.pop())
        while busy := {w.connection: w for w in team if w.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                done, result = worker.task, worker.result()
                assert done is not None
                if worker.dead:
                    team[team.index(worker)] = worker = _Worker(worker.number, start)
                worker.give(waiting.pop() if waiting else None)
                yield done, result
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            worker.process.join()


def _serve(connection: Connection, number: int, start: Start | None) -> None:
    if start is not None:
        start(number)
    while (task := connection.recv()) is not None:
        connection.send(attempt(task))


class _Worker:
    """One process and the task that it is at."""

    def __init__(self, number: int, start: Start | None) -> None:
        context = mp.get_context('spawn')
        self.number, self.dead = number, False
        self.task: Task | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, number, start), daemon=True)
        with renders_on(number):
            self.process.start()
        theirs.close()

    def give(self, task: Task | None) -> None:
        """Send the next task, or tell the process to end."""
        self.task = task
        self.connection.send(task)

    def result(self) -> Any:
        """Receive what the task gave; Failed where the process has died."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.dead = True
            self.process.join()
            return Failed(f'its process ended with exit code {self.process.exitcode}')
