# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench ros`: what the graph costs, measured over real DDS between real processes.

Sections: frames, overhead, reaction, jitter, cpu, soak. Each prints goal and figure, and --json
keeps them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from quantvla_ros.bench.ros_policy import first_commands
from quantvla_ros.contract import load_contract
from quantvla_ros.graph import environment, graph_named
from quantvla_ros.processes import command_of, environment_of
from quantvla_ros.resources import share_path

Figures = dict[str, Any]
SLEEP_S = 0.05
QUICK_S = 0.012  # a chunk of a large policy on a GPU
WARM_S = 6.0  # from start to a node that moves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench ros`."""
    parser.add_argument('--only', choices=list(SECTIONS), action='append',
                        help='one section, may be repeated; soak runs only when asked for')
    parser.add_argument('--seconds', type=float, default=30.0, help='length of each section')
    parser.add_argument('--soak', type=float, default=0.0, metavar='SECONDS',
                        help='length of the soak; 600 for the published figure')
    parser.add_argument('--json', type=Path, help='write every figure to this file')


def machine() -> Figures:
    """Return what the figures were taken on."""
    lines = Path('/proc/cpuinfo').read_text().split('\n')
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    return {'cpu': names[0] if names else 'unknown CPU', 'cores': os.cpu_count(),
            'load': os.getloadavg()[0], 'kernel': os.uname().release,
            'python': sys.version.split()[0]}


def percentiles(values: Any) -> Figures:
    """Return p50, p95, p99 and the worst."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError('nothing was measured: no message arrived')
    points = np.percentile(array, [50, 95, 99])
    return dict(zip(('p50', 'p95', 'p99', 'worst'), [*points.tolist(), float(array.max())],
                    strict=True))


def say(name: str, figures: Mapping[str, Any], unit: str) -> None:
    """Print one row of percentiles."""
    row = '  '.join(f'{key} {value:7.2f}' for key, value in figures.items())
    print(f'  {name:<36} {row}  {unit}')


# processes -------------------------------------------------------------------------------------


def variables(dds: str) -> dict[str, str]:
    """Return the variables of a child with a profile, on a domain of this run's own."""
    domain = {'ROS_DOMAIN_ID': str(1 + os.getpid() % 100)}
    kept = {k: v for k, v in os.environ.items() if k != 'FASTRTPS_DEFAULT_PROFILES_FILE'}
    range_ = {'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    os.environ.pop('FASTRTPS_DEFAULT_PROFILES_FILE', None)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH', '')])
    return {**kept, **environment(dds), **range_, **domain, 'PYTHONPATH': path.rstrip(os.pathsep)}


def part(name: str, seconds: float, dds: str, *rest: str) -> subprocess.Popen[str]:
    """Start one process of ros_robot."""
    command = [sys.executable, '-m', 'quantvla_ros.bench.ros_robot', name, str(seconds), *rest]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables(dds))


def answer(process: subprocess.Popen[str]) -> Figures:
    """Return what a part measured."""
    out, _ = process.communicate(timeout=3600)
    if process.returncode:
        raise ValueError(f'{process.args!r} ended with status {process.returncode}')
    return json.loads(out)


class Node:
    """A policy node with a test policy beside the bench's robot; a context."""

    def __init__(
        self, kind: str, policy_s: float, seconds: float, policy: str = 'constant_time',
        device: str = 'cpu',
    ) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix='quantvla_bench_')
        root = Path(self.folder.name)
        self.log = root / 'policy.jsonl'
        self.log.touch()
        contract = _contract(root)
        model = f'{kind} {policy_s} {self.log}'
        (process,) = graph_named('robot').processes({
            'contract': contract, 'policy': policy, 'model': model, 'dds': 'local',
            'log_level': 'fatal', 'params_file': _parameters(root, device)})
        self.seconds = seconds
        self.robot = part('robot', seconds + WARM_S, 'local', contract)
        self.node = subprocess.Popen(
            command_of(process), env={**environment_of(process), **variables('local')})

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.node, self.robot):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process in (self.node, self.robot):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.folder.cleanup()

    def state_at_the_end(self) -> Figures:
        """Wait until shortly before the robot ends, and return the node's status."""
        time.sleep(WARM_S + self.seconds - 4.0)
        return status()

    def notes(self) -> list[Figures]:
        """Return what the policy logged."""
        notes = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [note for note in notes if note['picture_age_ms'] < 60_000]  # not the warm-up


def _contract(root: Path) -> str:
    """Write the shipped contract with two raw 640x480 cameras and a chunk every 100 ms."""
    data = yaml.safe_load(share_path('config/contracts/libero_panda.yaml').read_text())
    for camera in data['cameras'].values():
        camera.update(width=640, height=480, policy={'width': 224, 'height': 224})
    data['action'].update(horizon=16, execute=2)
    path = root / 'bench.yaml'
    path.write_text(yaml.safe_dump(data))
    load_contract(path)
    return str(path)


def _parameters(root: Path, device: str) -> str:
    """Write the patient parameters, without blending: a command then shows its chunk at once."""
    data = yaml.safe_load(share_path('config/slow_machine.yaml').read_text())
    (values,) = data.values()
    values['ros__parameters']['player'] = {'blend_s': 0.001}
    values['ros__parameters']['device'] = device
    path = root / 'parameters.yaml'
    path.write_text(yaml.safe_dump(data))
    return str(path)


def status(dds: str = 'local') -> Figures:
    """Read policy_node/status once, as a process of its own would."""
    code = ('import json\nfrom quantvla_ros.nodes.operator import Operator\n'
            'with Operator() as o:\n'
            '    assert o.wait(lambda: bool(o.policy), 20), "no status"\n'
            '    print(json.dumps(o.policy))')
    done = subprocess.run([sys.executable, '-c', code], env=variables(dds), text=True,
                          capture_output=True, timeout=60)
    if done.returncode:
        raise ValueError('the policy node published no status within 20 s; it did not start')
    return json.loads(done.stdout)


def usage(pid: int) -> Figures:
    """Return CPU seconds, resident MB, threads and open files of a process."""
    fields = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()
    return {
        'cpu_s': (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK'),
        'rss_mb': int(fields[21]) * os.sysconf('SC_PAGE_SIZE') / 1e6,
        'threads': int(fields[17]),
        'files': len(os.listdir(f'/proc/{pid}/fd')),
    }


# sections --------------------------------------------------------------------------------------


def frames(seconds: float) -> Figures:
    """Count lost pictures with the shipped profile, and with Fast DDS as it comes."""
    found: Figures = {}
    for label, dds in (('shipped profile', 'local'), ('no profile', 'none')):
        listener = part('listen', seconds + 8.0, dds)
        sender = part('cameras', seconds, dds)
        sent, heard = answer(sender), answer(listener)
        lost = sent['sent'] - heard['received']
        late = percentiles(heard['late_ms'])
        found[label] = {'sent': sent['sent'], 'lost': lost, 'late_ms': late,
                        'sender_cpu': sent['cpu']}
        print(f'  {label:<16} lost {lost} of {sent["sent"]} pictures'
              + ('  (goal 0)' if dds == 'local' else ''))
        say('published to received', late, 'ms')
    return found


def overhead(seconds: float) -> Figures:
    """Measure what the node adds to a policy of constant time."""
    with Node('sleep', SLEEP_S, seconds) as node:
        state = node.state_at_the_end()
        commands = answer(node.robot)['commands']
        notes = node.notes()
    if not commands or not notes:
        raise ValueError(f'the policy node sent no command; its status was {state}')
    own = np.array([note['end_ns'] - note['start_ns'] for note in notes]) / 1e6
    figures = state['inference']
    extra = {key: figures[f'{key}_ms'] - float(np.median(own)) for key in ('p50', 'p95', 'p99')}
    wire = [(when - note['end_ns']) / 1e6 for note, when in first_commands(notes, commands)]
    found: Figures = {'policy_ms': percentiles(own), 'node_ms': extra,
                      'picture_age_ms': percentiles([n['picture_age_ms'] for n in notes])}
    say('policy itself (constant)', found['policy_ms'], 'ms')
    say('node beyond the policy (goal p95 5)', extra, 'ms')
    say('age of the newest picture', found['picture_age_ms'], 'ms, up to one period of 33')
    if wire:
        found['chunk_to_command_ms'] = percentiles(wire)
        say('chunk to its first command', found['chunk_to_command_ms'], 'ms, up to one tick of 10')
    return found


def reaction(seconds: float) -> Figures:
    """Measure how old what is seen is when the arm is told of it, with a quick policy."""
    with Node('sleep', QUICK_S, seconds) as node:
        state = node.state_at_the_end()
        commands = answer(node.robot)['commands']
        notes = node.notes()
    return seen_to_told(notes, commands, state)


def seen_to_told(
    notes: list[Figures], commands: list[tuple[int, float]], state: Figures, name: str = ''
) -> Figures:
    """Print and return a picture's age when a chunk begins, and when a command is made of it."""
    if not commands or not notes:
        raise ValueError(f'the policy node sent no command; its status was {state}')
    found = {
        'picture_age_ms': percentiles([note['picture_age_ms'] for note in notes]),
        'picture_to_command_ms': percentiles([
            (when - note['start_ns']) / 1e6 + note['picture_age_ms']
            for note, when in first_commands(notes, commands)]),
    }
    say(f'{name}picture when a chunk begins', found['picture_age_ms'], 'ms old')
    say(f'{name}picture to command', found['picture_to_command_ms'], 'ms')
    return found


def jitter(seconds: float) -> Figures:
    """Measure the lateness of the control tick while inference keeps a core busy."""
    with Node('busy', 0.09, seconds) as node:
        state = node.state_at_the_end()
        answer(node.robot)
    tick = state['tick']
    if not tick:
        raise ValueError(f'the policy node did not tick; its status was {state}')
    late = {key: tick[f'late_{key}_ms'] for key in ('p50', 'p95', 'p99', 'worst')}
    share = 100.0 * tick['missed'] / max(1, tick['ticks'] + tick['missed'])
    say('control tick late (goal p99 2)', late, 'ms')
    print(f'  missed ticks {tick["missed"]} of {tick["ticks"]}: {share:.3f} % (goal 0.1)')
    return {'late_ms': late, 'ticks': tick['ticks'], 'missed': tick['missed']}


def cpu(seconds: float) -> Figures:
    """Measure the share of one core that the node takes beside a policy that sleeps."""
    with Node('sleep', SLEEP_S, seconds) as node:
        time.sleep(WARM_S)
        before, start = usage(node.node.pid), time.monotonic()
        time.sleep(max(2.0, seconds - 3.0))
        after, took = usage(node.node.pid), time.monotonic() - start
    share = 100.0 * (after['cpu_s'] - before['cpu_s']) / took
    print(f'  policy node: {share:.1f} % of one core, {after["rss_mb"]:.0f} MB, two raw 640x480 '
          'cameras at 30 Hz, commands at 100 Hz')
    return {'share_percent': share, **after}


def soak(seconds: float) -> Figures:
    """Watch memory, threads and file handles of a node at work."""
    samples = []
    with Node('sleep', SLEEP_S, seconds + 10.0) as node:
        time.sleep(WARM_S)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            samples.append(usage(node.node.pid))
            time.sleep(min(5.0, seconds / 20))
    first, last = samples[len(samples) // 10], samples[-1]
    growth = {key: last[key] - first[key] for key in ('rss_mb', 'threads', 'files')}
    print(f'  {seconds:.0f} s: memory {first["rss_mb"]:.1f} -> {last["rss_mb"]:.1f} MB, threads '
          f'{first["threads"]} -> {last["threads"]}, files {first["files"]} -> {last["files"]}')
    return {'seconds': seconds, 'first': first, 'last': last, 'growth': growth}


SECTIONS: dict[str, Callable[[float], Figures]] = {
    'frames': frames, 'overhead': overhead, 'reaction': reaction, 'jitter': jitter, 'cpu': cpu,
    'soak': soak,
}


def run(args: argparse.Namespace) -> int:
    """Run the sections that were asked for."""
    wanted = args.only or [name for name in SECTIONS if name != 'soak' or args.soak]
    facts = machine()
    print(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]:.1f}, '
          f'Linux {facts["kernel"]}, Python {facts["python"]}')
    found: Figures = {'machine': facts}
    for name in wanted:
        seconds = (args.soak or 600.0) if name == 'soak' else args.seconds
        print(f'{name}, {seconds:g} s: {(SECTIONS[name].__doc__ or "").splitlines()[0]}',
              flush=True)
        found[name] = SECTIONS[name](seconds)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
        print(f'figures in {args.json}')
    return 0
