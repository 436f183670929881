# SPDX-License-Identifier: Apache-2.0
"""`quantvla up` and `quantvla record`: start a graph without ros2 launch and stop it cleanly.

The exit status tells what ended: 0 after Ctrl-C or SIGTERM, 10 + n when the n-th process of the
graph, counted from 0, ended by itself; 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from quantvla_ros.graph import GRAPHS, Graph, graph_named
from quantvla_ros.processes import Supervisor

ENDED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the graph and its arguments in the words of ros2 launch."""
    parser.add_argument('graph', choices=sorted(GRAPHS), help='which processes to start')
    add_assignments(parser)


def add_assignments(parser: argparse.ArgumentParser) -> None:
    """Take name:=value words."""
    parser.add_argument('arguments', nargs='*', metavar='name:=value', help='as in ros2 launch')
    parser.add_argument('-s', '--show-args', action='store_true', help='list the arguments')


def parse_assignments(words: Sequence[str]) -> dict[str, str]:
    """Read name:=value words. Raises ValueError that shows the form."""
    given = {}
    for word in words:
        name, sign, value = word.partition(':=')
        if not sign or not name:
            raise ValueError(f'{word!r} is not of the form name:=value')
        given[name] = value
    return given


def show(graph: Graph) -> str:
    """Describe the arguments of a graph, as `ros2 launch --show-args` does."""
    lines = [f'{graph.name}: {graph.description}']
    for argument in graph.arguments:
        allowed = f' One of: {", ".join(argument.choices)}.' if argument.choices else ''
        lines.append(f'  {argument.name}:={argument.text}\n      {argument.description}{allowed}')
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> int:
    """Start the graph and stay until it ends or is stopped."""
    graph = graph_named(args.graph)
    if args.show_args:
        print(show(graph))
        return 0
    processes = graph.processes(parse_assignments(args.arguments))
    stop = threading.Event()
    with stopped_by_signals(stop), Supervisor() as supervisor:
        for process in processes:
            supervisor.start(process)
        ended = supervisor.wait(stop)
    if ended is None:
        return 0
    print(f'quantvla up: {ended.name} {ended.fate()}, so everything was stopped', file=sys.stderr)
    return ENDED + [process.name for process in processes].index(ended.name)


class stopped_by_signals:  # noqa: N801  (a context manager, read as a verb)
    """Set an event on SIGINT, SIGTERM and SIGHUP while the context lasts.

    A handler is set even where SIGINT came in as ignored (a job in the background of a script):
    children inherit an ignored signal, and would not hear Ctrl-C either.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._old: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._old[number] = signal.signal(number, lambda *_: self._stop.set())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
