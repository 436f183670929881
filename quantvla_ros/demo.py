# SPDX-License-Identifier: Apache-2.0
"""`quantvla demo`: watch the simulated arm do its tasks over real ROS 2 topics.

Starts sim, policy and recorder as graph.py describes them, runs episodes, prints one line for
each, and makes a film and a plot from the recorded bag. Needs no display.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantvla_ros.contract import load_contract
from quantvla_ros.film import Span, film, plot
from quantvla_ros.graph import environment, graph_named
from quantvla_ros.policies.base import POLICIES
from quantvla_ros.processes import Supervisor
from quantvla_ros.resources import share_path
from quantvla_ros.sim.lighting import parse_lighting
from quantvla_ros.up import stopped_by_signals

if TYPE_CHECKING:
    from quantvla_ros.nodes.operator import Operator

START_S = 180.0  # loading the scene and the policy on a slow machine
EPISODE_S = 90.0
SLOWEST = 0.05
STEPS, STEP_S = 400, 0.05  # LIBERO's control steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla demo`."""
    parser.add_argument('--episodes', type=int, default=3, help='how many (default 3)')
    parser.add_argument('--suite', default='libero_object', help='LIBERO suite')
    parser.add_argument('--task', type=int, default=-1, help='one task; -1 takes all in turn')
    parser.add_argument('--policy', default='',
                        help=f'one of {", ".join(sorted(POLICIES))}; empty takes the shipped one')
    parser.add_argument('--model', default='', help='folder of the checkpoint')
    parser.add_argument('--precision', default='w8a8',
                        help='float, the name of an artifact, or a scheme such as w4a8, which is '
                             'then made by rounding to nearest (default w8a8)')
    parser.add_argument('--out', type=Path, help='folder for film, plot, bag and log')
    parser.add_argument('--pace', type=float, default=default_pace(),
                        help='simulated seconds per second; below 1 is slow motion')
    parser.add_argument('--lighting', default='day', help='day, overcast, lamp, night, ...')
    parser.add_argument('--camera-rate', type=float, default=10.0, help='pictures per second')


def default_pace() -> float:
    """Return real time, or slow motion where simulating, rendering and inferring share a core."""
    return 1.0 if (os.cpu_count() or 1) >= 2 else 0.25


@dataclass(frozen=True)
class Result:
    """One episode and where it is in the bag."""

    span: Span
    line: str
    pauses: int


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when at least one episode succeeded."""
    out = (args.out or Path(time.strftime('runs/demo_%Y%m%d_%H%M%S'))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    policy, model = choose_policy(args.policy, args.model)
    parse_lighting(args.lighting)
    tasks = [args.task if args.task >= 0 else number % 10 for number in range(args.episodes)]
    pack_scenes(args.suite, tasks)
    precision = choose_precision(policy, model, args.precision)
    contract = 'libero_expert' if policy == 'expert' else 'libero_panda'
    given = {
        'contract': contract, 'suite': args.suite, 'task': str(tasks[0]),
        'lighting': args.lighting,
        'policy': policy, 'model': model,
        'precision': precision, 'camera_rate': str(args.camera_rate), 'record': 'true',
        'pace': str(args.pace), 'recorder': 'record_node', 'bag': str(out / 'bag'),
        'enable_on_activate': 'false',
        'params_file': str(share_path('config/slow_machine.yaml')),
    }
    graph = graph_named('sim')
    processes = graph.processes(given)
    os.environ.update(environment('local'))  # the operator speaks over the same transport
    from quantvla_ros.nodes.operator import Operator

    stop = threading.Event()
    results: list[Result] = []
    log_path = out / 'log.txt'
    with log_path.open('w') as log, stopped_by_signals(stop), Supervisor(log) as supervisor:
        for process in processes:
            supervisor.start(process)
        print(f'Starting {", ".join(p.name for p in processes)} (their words: {log_path})')
        if args.pace < 1.0:
            print(f'In slow motion, {args.pace:g} simulated seconds per second (--pace).')
        over = _over(stop, supervisor)
        with Operator(stop=over, sim_time=args.pace < 1.0) as operator:
            _await_policy(operator, over, log_path)
            for number, task in enumerate(tasks):
                if over():
                    break
                result = _episode(operator, args.suite, task, number // 10, over, args.pace)
                results.append(result)
                print(f'  {number + 1} of {len(tasks)}: {result.line}', flush=True)
        ended = supervisor.first_ended()
        if ended is not None and not stop.is_set():
            print(f'{ended.name} {ended.fate()}; the last lines of {log_path}:\n{tail(log_path)}')
    return _finish(args, out, load_contract(contract), results)


def _over(stop: threading.Event, supervisor: Supervisor) -> Callable[[], bool]:
    return lambda: stop.is_set() or supervisor.first_ended() is not None


def choose_policy(name: str, model: str) -> tuple[str, str]:
    """Return (policy, model): what is asked for, or the best that can run here, and say so."""
    if name:
        return name, model
    try:
        if not model:
            share_path('models/libero_panda/model.safetensors')
        return 'libero_panda', model
    except FileNotFoundError:
        print('No trained weights in models/: the scripted expert drives the arm. It reads the '
              "simulator's state; a policy sees only cameras and joints.")
        return 'expert', ''


def choose_precision(policy: str, model: str, precision: str) -> str:
    """Return a precision that the policy can load; makes an artifact where there is none yet."""
    if policy != 'libero_panda' or precision in ('float', 'bfloat16'):
        return precision if policy == 'libero_panda' else 'float'
    from quantvla_ros.calibration.pipeline import nearest_artifact
    from quantvla_ros.policies.libero_quantized import find_artifact

    folder = Path(model) if model else share_path('models/libero_panda')
    try:
        find_artifact(folder, precision)
    except ValueError:
        print(f'Rounding the policy to {precision}, once on this machine.', flush=True)
        return str(nearest_artifact(folder, precision))
    return precision


def pack_scenes(suite: str, tasks: list[int]) -> None:
    """Take the scenes out of the LIBERO wheels once, with a line for each."""
    from quantvla_ros.sim.scenes import is_packed, pack, scenes_folder

    wanted = [(suite, task) for task in sorted(set(tasks))]
    missing = [task for task in wanted if not is_packed(*task, scenes_folder())]
    if missing:
        print(f'Packing {len(missing)} scene(s) of LIBERO, once on this machine:', flush=True)
        pack(wanted, say=lambda line: print(f'  {line}', flush=True))


def _await_policy(operator: Operator, over: Callable[[], bool], log: Path) -> None:
    if operator.wait(lambda: operator.policy.get('lifecycle') == 'active', START_S) or over():
        return
    raise ValueError(f'the policy was not ready within {START_S:g} s; the last lines of {log}:\n'
                     + tail(log))


def tail(log: Path, lines: int = 12) -> str:
    """Return the last lines of a log."""
    return '\n'.join('  ' + line for line in log.read_text().splitlines()[-lines:])


def _episode(
    operator: Operator,
    suite: str,
    task: int,
    init: int,
    over: Callable[[], bool],
    pace: float,
) -> Result:
    """Run one episode to its success, its step limit or its time limit."""
    operator.disable()
    report = operator.start_episode(suite, task, init)
    instruction = report['instruction']
    operator.wait(lambda: operator.policy.get('instruction') == instruction, 10.0)
    start_ns, begun, pauses = operator.now_ns(), time.monotonic(), 0
    cause = _enable(operator, over)
    while not over() and time.monotonic() - begun < EPISODE_S / pace:
        operator.spin(0.2)
        report = operator.episode
        if report['success'] or report['step'] >= STEPS:
            break
        if operator.policy.get('state') not in ('running', 'stopping'):
            cause = (operator.policy.get('cause') or {}).get('sentence', cause)
            pauses += 1
            _enable(operator, over)
    operator.wait(lambda: False, 0.3)  # the last pictures
    took = operator.episode['step'] * STEP_S
    success = bool(operator.episode['success'])
    span = Span(instruction, start_ns, operator.now_ns(), success)
    line = f'{instruction}: {"done" if success else "not done"} after {took:.1f} s'
    if pauses:
        line += f'; stopped {pauses} times and went on ({cause})'
    return Result(span, line, pauses)


def _enable(operator: Operator, over: Callable[[], bool]) -> str:
    """Enable, again and again for a while: data may be stale for a moment after a reset."""
    end, reason = time.monotonic() + 20.0, 'not tried'
    while reason and not over() and time.monotonic() < end:
        reason = operator.enable()
        operator.wait(lambda: operator.policy.get('state') == 'running', 0.5)
    return reason


def _finish(
    args: argparse.Namespace, out: Path, contract: Any, results: list[Result]
) -> int:
    """Make film and plot from the bag, and say what came of it all."""
    spans = [result.span for result in results]
    successes = sum(span.success for span in spans)
    if not spans:
        print('No episode was finished.')
        return 1
    best = next((span for span in spans if span.success), spans[0])
    frames = film(out / 'bag', contract, spans, out / 'cameras.gif')
    gap = plot(out / 'bag', contract, best, out / 'joints.png')
    if not successes and args.pace > SLOWEST and any(result.pauses for result in results):
        print(f'This machine does not keep up; try slow motion: --pace {args.pace / 2:g}')
    head = 'SUCCESS' if successes else 'NO SUCCESS'
    print(f'{head}: the arm did its task in {successes} of {len(spans)} episodes.')
    print(f'  film  {out / "cameras.gif"} ({frames} frames)')
    print(f'  plot  {out / "joints.png"} (arm at most {gap:.3f} rad from its commands)')
    print(f'  bag   {out / "bag"}')
    return 0 if successes else 1
