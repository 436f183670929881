# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench calibration`: how long it takes, and what a policy node beside it feels.

`--beside SECONDS` runs a policy node with constant work alone and then beside a calibration as
calibration_node starts it, over real DDS. Without it one calibration is timed, as fast as the
machine goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.bench.ros import WARM_S, Figures, Node, answer, machine, say
from quantvla_ros.calibration.frames_file import write_frames
from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.nodes.calibrating import CALIBRATION_NODE, Calibrating
from quantvla_ros.nodes.parameters import defaults
from quantvla_ros.observation import Observation

WORK_S = 0.05  # of a chunk, of the 100 ms until the next one is needed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench calibration`."""
    add = parser.add_argument
    add('--bag', default='', help='recording to use; default: made-up pictures')
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--precision', default='w4a8', help='artifact; a plain scheme is rounded once')
    add('--learn', default='activations,alpha,beta', help='what is tried')
    add('--beside', type=float, default=0.0, metavar='SECONDS',
        help='measure a policy node alone and beside a calibration for so long each')
    add('--threads', type=int, default=0, help='torch threads; default: its own choice')
    add('--json', type=Path, help='write every figure to this file')


def made_up(contract: Contract, count: int = 200) -> list[Observation]:
    """Make observations of noise: what is in a picture does not change what it costs."""
    drawn = np.random.default_rng(0)
    names = contract.joints.names
    found = []
    for number in range(count):
        images = {c.name: drawn.integers(0, 256, (c.policy_height, c.policy_width, 3), np.uint8)
                  for c in contract.cameras}
        stamp = number * 50_000_000
        found.append(Observation(images, dict.fromkeys(images, stamp), names,
                                 drawn.normal(0.0, 0.3, len(names)), stamp,
                                 contract.instruction))
    return found


def child(args: argparse.Namespace, bag: str, out: Path, nice: int) -> Calibrating:
    """Start a calibration as calibration_node does."""
    return Calibrating({
        **defaults(CALIBRATION_NODE), 'bag': bag, 'model': args.model,
        'precision': args.precision, 'learn': args.learn, 'threads': args.threads,
        'nice': nice, 'output': str(out / 'calibration')})


def timed(args: argparse.Namespace, bag: str, out: Path) -> Figures:
    """Calibrate once at normal priority."""
    began = time.monotonic()
    work = child(args, bag, out, nice=0)
    try:
        while work.running:
            work.poll()
            time.sleep(0.05)
    finally:
        work.finish()
    told = work.report()
    if told['state'] != 'done':
        raise ValueError(f'the calibration {told["state"]}: {told["sentence"]}')
    seconds, measured = time.monotonic() - began, told['result']['measured']
    print(f'  128 + 32 frames at {args.precision}: {seconds:.0f} s (goal 180), '
          f'{measured["reading_s"]:.0f} of them reading the bag; peak memory '
          f'{measured["peak_mb"]} MB, {measured["before_models_mb"]} of it before a model was '
          f'read; {measured["threads"]} threads, {measured["kernel"]}')
    print(f'  {told["sentence"].partition(";")[0]}')
    return {'seconds': seconds, **measured, 'evidence': told['result']['evidence']}


def node_figures(seconds: float) -> Figures:
    """Run the policy node with constant work and return what it says of its timing."""
    with Node('work', WORK_S, seconds) as node:
        state = node.state_at_the_end()
        answer(node.robot)
        notes = node.notes()
    tick = state['tick']
    if not tick or not notes:
        raise ValueError(f'the policy node did not run; its status was {state}')
    own = [(note['end_ns'] - note['start_ns']) / 1e6 for note in notes]
    return {
        'late_ms': {key: tick[f'late_{key}_ms'] for key in ('p50', 'p95', 'p99', 'worst')},
        'ticks': tick['ticks'], 'missed': tick['missed'],
        'work_ms': dict(zip(('p50', 'p95', 'p99'),
                            np.percentile(own, [50, 95, 99]).tolist(), strict=True)),
        'chunks': len(own), 'state': state['state'], 'cause': state['cause'],
    }


def beside(args: argparse.Namespace, bag: str, out: Path) -> Figures:
    """Measure the policy node alone, then beside a calibration at the lowest priority."""
    found: Figures = {'alone': node_figures(args.beside)}
    work = child(args, bag, out, nice=19)
    try:
        found['beside'] = node_figures(args.beside)
        work.poll()
        told = work.report()
    finally:
        work.finish()
    if told['state'] == 'failed':
        raise ValueError(f'the calibration failed: {told["sentence"]}')
    found['progress'] = {'state': told['state'], 'share': told['share'], 'stage': told['stage']}
    for name in ('alone', 'beside'):
        figures = found[name]
        say(f'control tick late, {name} (goal p99 2)', figures['late_ms'], 'ms')
        say(f'{1e3 * WORK_S:.0f} ms of work took, {name}', figures['work_ms'], 'ms')
        print(f'  missed ticks {figures["missed"]} of {figures["ticks"]}; {figures["chunks"]} '
              f'chunks; {figures["state"]}')
    print(f'  the calibration was {told["state"]}, {100 * told["share"]:.0f} % done after '
          f'{args.beside + WARM_S:.0f} s')
    return found


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    facts = machine()
    print(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]:.1f}, '
          f'Linux {facts["kernel"]}, Python {facts["python"]}', flush=True)
    found: dict[str, Any] = {'machine': facts}
    with tempfile.TemporaryDirectory(prefix='quantvla_bench_') as name:
        folder, bag = Path(name), args.bag
        if not bag:
            bag = str(folder / 'frames.npz')
            write_frames(Path(bag), made_up(load_contract('libero_panda')))
        if args.beside:
            found['beside'] = beside(args, bag, folder)
        else:
            found['timed'] = timed(args, bag, folder)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))
        print(f'figures in {args.json}')
    return 0
