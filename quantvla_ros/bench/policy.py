# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench policy`: how long the shipped policy takes, and how much memory.

Float rows run eager and compiled, integer rows as they are served: one program for the prefix, one
for each denoising step. An integer precision without an artifact is rounded to nearest once.

Every row is measured in a process of its own, so that threads, compiled code and peak memory
belong to that row alone. All of them are loaded first (half a gigabyte each) and then take turns,
so that a machine that slows down for a while slows all rows down and their ratios hold. Inputs are
fixed random frames; the time does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.contract import load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.resources import share_path
from quantvla_ros.sim.report import machine

PARTS = ('prepare', 'step', 'chunk')
MODES = ('eager', 'compile')
DTYPES = ('float', 'bfloat16')
INTEGERS = ('w8a8', 'w4a8')
WARM_UP = 2  # calls before those that count, in each turn
FASTER = 2.0  # goal of an integer chunk against the fastest float form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench policy`."""
    add = parser.add_argument
    add('--model', default='', metavar='FOLDER', help='checkpoint; default: the shipped one')
    add('--contract', default='libero_panda')
    add('--steps', type=int, default=0, help="denoising steps; default: the policy's own")
    add('--threads', default='1,2', metavar='NUMBERS')
    add('--precision', default=','.join([*DTYPES, *INTEGERS]), metavar='NAMES')
    add('--modes', default=','.join(MODES), metavar='NAMES',
        help='of the float rows: eager, compile or both')
    add('--repeats', type=int, default=50, help='chunks of each row, in all turns together')
    add('--turns', type=int, default=5, help='rounds in which all rows are measured one by one')
    add('--json', type=Path, metavar='FILE', help='write the rows there too')


def found(model: str, precision: str) -> str:
    """Return the precision, or the artifact that stands for it where the model has none."""
    from quantvla_ros.calibration.pipeline import nearest_artifact
    from quantvla_ros.policies.libero_quantized import find_artifact
    from quantvla_ros.quant.scheme import parse_scheme

    folder = Path(model) if model else share_path('models/libero_panda')
    if precision in DTYPES:
        return precision
    try:
        return str(find_artifact(folder, precision))
    except ValueError:
        parse_scheme(precision)  # says what schemes there are
        return str(nearest_artifact(folder, precision))


def fixed_observation(contract: Any, instruction: str, state: np.ndarray) -> Observation:
    """Return one observation that every row uses."""
    random = np.random.default_rng(0)
    images = {
        c.name: random.integers(0, 256, (c.policy_height, c.policy_width, 3), dtype=np.uint8)
        for c in contract.cameras
    }
    stamps = dict.fromkeys(images, 0)
    return Observation(images, stamps, contract.joints.names, state, 0, instruction)


def peak_memory_mb() -> float:
    """Most resident memory this process ever held, in MB (10^6 bytes)."""
    for row in Path('/proc/self/status').read_text().splitlines():
        if row.startswith('VmHWM:'):
            return int(row.split()[1]) * 1024 / 1e6
    raise RuntimeError('/proc/self/status has no VmHWM')


def _times_ms(call: Callable[[], Any], repeats: int) -> list[float]:
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def shortened(times_ms: list[float]) -> dict[str, float]:
    """What a row tells of its times."""
    return {
        'p50': float(np.percentile(times_ms, 50)),
        'p95': float(np.percentile(times_ms, 95)),
        'min': min(times_ms),
    }


def load(
    settings: PolicySettings, contract_name: str, mode: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """Load one row in this process: what is timed, by name, and what is known already."""
    import torch

    from quantvla_ros.policies.libero_panda import LiberoVla

    contract = load_contract(contract_name)
    policy = LiberoVla(contract, settings)
    state = policy.door.statistics.state_mean
    seen = fixed_observation(contract, contract.instruction, state)
    if mode == 'compile':
        for name in ('prefix', 'velocity'):
            setattr(policy.net, name, torch.compile(getattr(policy.net, name), fullgraph=True))
    began = time.perf_counter()
    context = policy.prepare(seen)
    chunk = policy.denoise(context, 0)
    ready_s = time.perf_counter() - began
    x = torch.zeros(1, policy.config.chunk, policy.config.action)
    calls: dict[str, Callable[[], Any]] = {
        'prepare': lambda: policy.prepare(seen),
        'step': lambda: policy.velocity(context, x, 0),
        'chunk': lambda: policy.denoise(policy.prepare(seen), 0),
    }
    return calls, {
        'first_chunk_s': ready_s,
        'steps': policy.steps,
        'positions': chunk.positions[:, :-1].tolist(),
    }


def _child(connection: Connection, settings: PolicySettings, contract: str, mode: str) -> None:
    """Load, say what is known, then measure as often as asked: a number of repeats, 0 to end."""
    try:
        calls, known = load(settings, contract, mode)
    except (ValueError, FileNotFoundError) as error:
        connection.send(str(error))
        return
    connection.send(known)
    while repeats := connection.recv():
        times = {part: _times_ms(call, repeats) for part, call in calls.items()}
        connection.send({**times, 'peak_mb': peak_memory_mb()})


class Row:
    """One form of the policy in a process of its own."""

    def __init__(self, settings: PolicySettings, contract: str, mode: str) -> None:
        self.what = f'{settings.precision}, {mode}, {settings.threads} threads'
        context = mp.get_context('spawn')
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_child, args=(theirs, settings, contract, mode), daemon=True
        )
        self._process.start()
        theirs.close()
        self.known = self._answer()
        self.times: dict[str, list[float]] = {part: [] for part in PARTS}

    def _answer(self) -> dict[str, Any]:
        try:
            said = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ValueError(
                f'{self.what}: the process ended with exit code {self._process.exitcode}; '
                'torch.compile needs a C++ compiler (g++). Leave it out with --modes eager'
            ) from None
        if isinstance(said, str):
            raise ValueError(said)
        return dict(said)

    def measure(self, repeats: int) -> None:
        """Take a turn."""
        self._connection.send(repeats)
        said = self._answer()
        self.known['peak_mb'] = said.pop('peak_mb')
        for part, times in said.items():
            self.times[part] += times

    def end(self) -> dict[str, Any]:
        """Let the process go; return what the row shows."""
        self._connection.send(0)
        self._process.join()
        return {**self.known, **{part: shortened(times) for part, times in self.times.items()}}


def _table(rows: list[dict[str, Any]]) -> str:
    head = ('precision', 'mode', 'threads', *(f'{part} p50/p95' for part in PARTS), 'peak MB',
            'to float')
    body = [
        (
            row['precision'],
            row['mode'],
            str(row['threads']),
            *(f'{row[part]["p50"]:.1f} / {row[part]["p95"]:.1f}' for part in PARTS),
            f'{row["peak_mb"]:.0f}',
            f'{row["to_float_mrad"]:.3f}',
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    padded = ('  '.join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in
              [head, *body])
    return '\n'.join(line.rstrip() for line in padded)


def measure_in_turns(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load every combination, then measure all of them in turns."""
    made: list[tuple[dict[str, Any], Row]] = []
    for precision in args.precision.split(','):
        served = found(args.model, precision)
        for mode in args.modes.split(',') if precision in DTYPES else ['served']:
            for threads in map(int, args.threads.split(',')):
                settings = PolicySettings(
                    model=args.model, precision=served, steps=args.steps, threads=threads
                )
                what = {'precision': precision, 'mode': mode, 'threads': threads}
                made.append((what, Row(settings, args.contract, mode)))
                print(f'{precision}, {mode}, {threads} threads: loaded', flush=True)
    turns = max(1, min(args.turns, args.repeats))
    for turn in range(turns):
        for _, row in made:
            row.measure(args.repeats * (turn + 1) // turns - args.repeats * turn // turns)
    return [{**row.end(), **what} for what, row in made]


def run(args: argparse.Namespace) -> int:
    """Measure every combination, print the table and the verdicts."""
    contract = load_contract(args.contract)
    unknown = sorted(set(args.modes.split(',')) - set(MODES))
    if unknown:
        raise ValueError(f'modes {unknown} are unknown; known are {", ".join(MODES)}')
    rows = measure_in_turns(args)
    first = np.array(rows[0]['positions'])
    for row in rows:
        row['to_float_mrad'] = 1e3 * float(np.abs(np.array(row.pop('positions')) - first).max())
    print(f'\n{machine()}; ms, batch 1, {args.repeats} repeats, {rows[0]["steps"]} denoising '
          f'steps; to float: largest joint difference to the first row, mrad\n{_table(rows)}')
    covers_ms = 1e3 * contract.action.execute * contract.action.step_dt_s
    print('\n' + '\n'.join([verdict(rows, covers_ms), *speed_verdicts(rows)]))
    if args.json:
        document = {'machine': machine(), 'covers_ms': covers_ms, 'rows': rows}
        args.json.write_text(json.dumps(document, indent=1) + '\n')
    return 0


def speed_verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Say of each integer precision how much faster its chunk is than the fastest float form.

    Both take the number of threads that serves them best; by medians.
    """
    def fastest(among: list[dict[str, Any]]) -> dict[str, Any]:
        return min(among, key=lambda row: row['chunk']['p50'])

    floats = [row for row in rows if row['precision'] in DTYPES]
    names = dict.fromkeys(row['precision'] for row in rows if row['precision'] not in DTYPES)
    if not floats:
        return []
    best, said = fastest(floats), []
    against = f'{best["precision"]} {best["mode"]} on {best["threads"]} thread(s)'
    for name in names:
        ours = fastest([row for row in rows if row['precision'] == name])
        ratio = best['chunk']['p50'] / ours['chunk']['p50']
        word = 'met' if ratio >= FASTER else 'NOT met'
        said.append(f'{name} on {ours["threads"]} thread(s): {ratio:.2f}x as fast as {against}, '
                    f'the fastest float form measured (goal {FASTER:.1f}x: {word}).')
    return said


def verdict(rows: list[dict[str, Any]], covers_ms: float) -> str:
    """Say whether a float chunk is ready in half of the time that it is executed for."""
    times = [row['chunk']['p50'] for row in rows if row['precision'] == 'float']
    if not times:
        return 'no float row was measured'
    best = min(times)
    word = 'under' if best < 0.5 * covers_ms else 'NOT under'
    return (
        f'The fastest float chunk takes {best:.0f} ms, {word} half of the {covers_ms:.0f} ms that '
        'it is executed for.'
    )
