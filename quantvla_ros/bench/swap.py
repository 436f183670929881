# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench swap`: change the precision of the shipped policy while it moves an arm.

The simulated Panda does tasks over DDS; the precision cycles; every command is judged where it
leaves for the wire. Afterwards the same span without swaps, in the same processes: the baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantvla_ros.bench.ros import machine, percentiles, say, usage
from quantvla_ros.bench.wire_checker import WireChecker
from quantvla_ros.demo import START_S, pack_scenes
from quantvla_ros.graph import Process, environment, graph_named
from quantvla_ros.processes import Supervisor
from quantvla_ros.resources import share_path
from quantvla_ros.up import stopped_by_signals

if TYPE_CHECKING:
    from quantvla_ros.nodes.operator import Operator

Figures = dict[str, Any]
SUITE = 'libero_object'
EPISODE_S = 18.0  # an arm that is done with its task is given the next one
SWAP_S = 60.0
PERIOD_S = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench swap`."""
    parser.add_argument('--swaps', type=int, default=200, help='how many (default 200)')
    parser.add_argument('--precisions', default='w8a8,w4a8',
                        help='schemes or float, taken in turn (default w8a8,w4a8)')
    parser.add_argument('--good-chunks', type=int, default=1,
                        help='chunks that prove a new precision (default 1)')
    parser.add_argument('--baseline', type=float, default=0.0, metavar='SECONDS',
                        help='length of the baseline; 0 takes as long as the swaps took')
    parser.add_argument('--in-process', action='store_true',
                        help='load and run policies in the node itself (policy_process: false)')
    parser.add_argument('--camera-rate', type=float, default=10.0, help='pictures per second')
    parser.add_argument('--json', type=Path, help='write every figure to this file')


def artifacts(names: list[str]) -> list[str]:
    """Return the precisions as the node takes them; rounds what is not there yet, once."""
    from quantvla_ros.calibration.pipeline import nearest_artifact

    model = share_path('models/libero_panda')
    return [name if name == 'float' else str(nearest_artifact(model, name)) for name in names]


def processes(precision: str, out: Path, args: argparse.Namespace) -> list[Process]:
    """Return the simulated robot and the policy node with the tap."""
    found = graph_named('sim').processes({
        'suite': SUITE, 'precision': precision, 'camera_rate': str(args.camera_rate),
        'enable_on_activate': 'false', 'log_level': 'warn',
        'params_file': str(share_path('config/slow_machine.yaml'))})
    return [tapped(process, out, args) if process.name == 'policy' else process
            for process in found]


def tapped(process: Process, out: Path, args: argparse.Namespace) -> Process:
    """Replace the policy node by the one that notes its commands."""
    import sys

    parameters = {**process.parameters, 'swap.good_chunks': args.good_chunks,
                  'policy_process': not args.in_process}
    given = replace(process, parameters=parameters)
    command = (sys.executable, '-u', '-m', 'quantvla_ros.bench.swap_node', str(out),
               *given.ros_arguments())
    return replace(given, command=command)


def memory_mb(pid: int) -> float:
    """Return what a process and all that it started hold, shared pages counted once."""
    parents = {}
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (entry / 'stat').read_text().rsplit(')', 1)[1].split()
                parents[int(entry.name)] = int(fields[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    held = 0
    for member in family:
        with contextlib.suppress(OSError):
            for line in Path(f'/proc/{member}/smaps_rollup').read_text().splitlines():
                held += 1024 * int(line.split()[1]) if line.startswith('Pss:') else 0
    return held / 1e6


class Watch:
    """Keeps the arm busy, and reads counters at the start and the end of a span."""

    def __init__(self, operator: Operator, pid: int, over: Callable[[], bool]) -> None:
        self.operator, self.pid, self.over = operator, pid, over
        self.stops: Counter[str] = Counter()  # cause -> times that the arm was started again
        self._task, self._since = 0, 0.0

    def begin_episode(self) -> None:
        """Give the arm its next task."""
        operator = self.operator
        operator.disable()
        operator.wait(lambda: operator.policy.get('state') in ('silent', 'holding'), 10.0)
        report = operator.start_episode(SUITE, self._task % 3, self._task // 3 % 50)
        self._task += 1
        text = report['instruction']
        operator.wait(lambda: operator.policy.get('instruction') == text, 10.0)
        end = time.monotonic() + 20.0
        while operator.policy.get('state') != 'running' and time.monotonic() < end:
            operator.enable()
            operator.wait(lambda: operator.policy.get('state') == 'running', 0.5)
        self._since = time.monotonic()

    def busy(self) -> None:
        """Start the next episode when one is over, or when the arm has stopped."""
        stopped = self.operator.policy.get('state') != 'running'
        if stopped:
            cause = self.operator.policy.get('cause') or {}
            self.stops[cause.get('kind', 'unknown')] += 1
        if stopped or time.monotonic() > self._since + EPISODE_S:
            self.begin_episode()

    def mark(self) -> Figures:
        """Return what counts now."""
        self.operator.wait(lambda: False, 1.2)  # ~/status comes once a second
        policy = self.operator.policy
        return {'ns': time.monotonic_ns(), 'missed': policy['tick']['missed'],
                'ticks': policy['tick']['ticks'], 'stops': dict(self.stops),
                'p95_ms': policy['inference']['p95_ms'],
                'counts': dict(policy['swap']['counts']), **usage(self.pid),
                'memory_mb': memory_mb(self.pid)}


def cycle(watch: Watch, names: list[str], swaps: int) -> list[Figures]:
    """Swap so many times; return what each took."""
    operator, took = watch.operator, []
    for number in range(swaps):
        if watch.over():
            break
        watch.busy()
        precision = names[(number + 1) % len(names)]
        begun = time.monotonic()
        swap(watch, precision)
        took.append({'first_chunk_s': operator.policy['swap']['latency_s'],
                     'settled_s': time.monotonic() - begun})
    return took


def swap(watch: Watch, precision: str) -> None:
    """Wish for a precision until it runs and the old one is freed; a roll-back is wished again.

    Roll-backs stay in the counts of ~/status, which are printed.
    """
    operator, begun = watch.operator, time.monotonic()

    def state() -> str:
        swap, runs = operator.policy['swap'], operator.policy['precision']
        settled = swap['stage'] == 'active' and swap['requested'] == runs
        return '' if not settled else 'there' if runs == precision else 'back'

    while state() != 'there':
        if watch.over():
            raise ValueError('stopped before the swaps were done')
        if time.monotonic() > begun + SWAP_S:
            raise ValueError(f'no swap to {precision}: {operator.policy["swap"]}, cause '
                             f'{operator.policy["cause"]}')
        refusal = operator.set_parameters('policy_node', precision=precision)
        if refusal:
            raise ValueError(refusal)
        operator.wait(lambda: state() != 'back', 1.0)  # the wish is in ~/status
        while not operator.wait(lambda: state() != '', 1.0) and not watch.over():
            watch.busy()  # an arm that stopped makes no chunks, so it proves nothing


def idle(watch: Watch, seconds: float) -> None:
    """Let the arm work for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not watch.over():
        watch.busy()
        watch.operator.wait(lambda: False, 0.2)


def judge(path: Path, begin: Figures, end: Figures) -> Figures:
    """Judge the commands of a span: gaps, and violations of any limit."""
    data = np.load(path)
    times, positions = data['times'], data['positions']
    checker = WireChecker(*(data[name] for name in ('lower', 'upper', 'velocity',
                                                    'acceleration')))
    inside = (times[:, 0] >= begin['ns']) & (times[:, 0] <= end['ns'])
    # all of them are judged, for a stream may have begun before the span
    broken = [kinds for kinds, within in zip(checker.judge(times, positions), inside, strict=True)
              if within]
    kinds = {kind: sum(each[kind] for each in broken) for kind in checker.violations}
    times = times[inside]
    steps = np.diff(times[:, 0])[np.diff(times[:, 2]) == 0] / 1e6
    return {
        'seconds': (end['ns'] - begin['ns']) / 1e9,
        'commands': len(broken), 'violations': sum(kinds.values()), 'kinds': kinds,
        'longest_gap_ms': float(steps.max()),
        'gaps': int(np.count_nonzero(steps > 2e3 * PERIOD_S)),
        'missed': end['missed'] - begin['missed'], 'ticks': end['ticks'] - begin['ticks'],
        'stops': dict(Counter(end['stops']) - Counter(begin['stops'])),
        'memory_mb': [begin['memory_mb'], end['memory_mb']],
        'threads': [begin['threads'], end['threads']], 'files': [begin['files'], end['files']],
    }


def show(name: str, found: Figures) -> None:
    """Print what was found in one span."""
    print(f'  {name:<14} {found["seconds"]:.0f} s, {found["commands"]} commands, '
          f'{found["violations"]} violations; ticks missed {found["missed"]} of '
          f'{found["ticks"]}; gaps over 20 ms {found["gaps"]}, longest '
          f'{found["longest_gap_ms"]:.1f} ms; stops {found["stops"] or "none"}; memory '
          f'{found["memory_mb"][0]:.0f} -> {found["memory_mb"][1]:.0f} MB')


def run(args: argparse.Namespace) -> int:
    """Swap, rest, and print both spans."""
    names = artifacts(args.precisions.split(','))
    pack_scenes(SUITE, [0, 1, 2])
    facts = machine()
    print(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]:.1f}')
    os.environ.update(environment('local'))
    os.environ.setdefault('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    from quantvla_ros.nodes.operator import Operator

    stop = threading.Event()
    with tempfile.TemporaryDirectory(prefix='quantvla_bench_') as folder:
        out = Path(folder) / 'commands.npz'
        with (Path(folder) / 'log.txt').open('w') as log, stopped_by_signals(stop), \
                Supervisor(log) as supervisor:
            children = {p.name: supervisor.start(p) for p in processes(names[0], out, args)}
            pid = children['policy'].popen.pid

            def over() -> bool:
                return stop.is_set() or supervisor.first_ended() is not None

            with Operator(stop=over) as operator:
                if not operator.wait(lambda: operator.policy.get('lifecycle') == 'active',
                                     START_S):
                    raise ValueError('the policy node did not become active:\n'
                                     + (Path(folder) / 'log.txt').read_text()[-2000:])
                watch = Watch(operator, pid, over)
                spans, took = measure(watch, names, args)
        if not out.is_file():
            raise ValueError('the policy node ended before it could write its commands')
        found: Figures = {name: judge(out, *span) for name, span in spans.items()}
    found.update(machine=facts, number=len(took), counts=spans['swaps'][1]['counts'], took={
        key: percentiles([1e3 * item[key] for item in took])
        for key in ('first_chunk_s', 'settled_s')})
    report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
    return 0


def measure(
    watch: Watch, names: list[str], args: argparse.Namespace
) -> tuple[dict[str, tuple[Figures, Figures]], list[Figures]]:
    """Let the arm move with swaps and without; return the marks of both spans."""
    watch.begin_episode()
    idle(watch, 2.0)
    cycle(watch, names, 2 * len(names))  # each precision was in memory once before anything counts
    begin = watch.mark()
    took = cycle(watch, names, args.swaps)
    middle = watch.mark()
    idle(watch, args.baseline or (middle['ns'] - begin['ns']) / 1e9)
    return {'swaps': (begin, middle), 'without swaps': (middle, watch.mark())}, took


def report(found: Figures) -> None:
    """Print the figures."""
    print(f'{found["number"]} swaps (goal: no tick missed beyond the baseline, no violation, no '
          'gap, memory as before)')
    for name in ('swaps', 'without swaps'):
        show(name, found[name])
    say('wish to first chunk', found['took']['first_chunk_s'], 'ms')
    say('wish to old one freed', found['took']['settled_s'], 'ms')
    print(f'  what became of the wishes: {found["counts"]}')
