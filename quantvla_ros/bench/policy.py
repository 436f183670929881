# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench policy`: how long the shipped policy takes, and how much memory.

Float rows run eager and compiled, integer rows as they are served: one program for the prefix, one
for each denoising step. An integer precision without an artifact is rounded to nearest once.

Every row is measured in a process of its own, so that threads, compiled code and peak memory
belong to that row alone. Inputs are fixed random frames; the time does not depend on them.
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
WARM_UP = 3


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
    add('--repeats', type=int, default=50, help='chunks in each row')
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


def _times_ms(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return {
        'p50': float(np.percentile(found, 50)),
        'p95': float(np.percentile(found, 95)),
        'min': min(found),
    }


def measure(
    settings: PolicySettings, contract_name: str, mode: str, repeats: int
) -> dict[str, Any]:
    """Measure one row in this process."""
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

    def one_step() -> None:
        policy.velocity(context, x, 0)

    return {
        'prepare': _times_ms(lambda: policy.prepare(seen), repeats),
        'step': _times_ms(one_step, repeats),
        'chunk': _times_ms(lambda: policy.denoise(policy.prepare(seen), 0), repeats),
        'first_chunk_s': ready_s,
        'peak_mb': peak_memory_mb(),
        'steps': policy.steps,
        'positions': chunk.positions[:, :-1].tolist(),
    }


def _child(
    connection: Connection, settings: PolicySettings, contract: str, mode: str, repeats: int
) -> None:
    try:
        connection.send(measure(settings, contract, mode, repeats))
    except (ValueError, FileNotFoundError) as error:
        connection.send(str(error))


def measure_alone(
    settings: PolicySettings, contract: str, mode: str, repeats: int
) -> dict[str, Any]:
    """Measure one row in a process of its own. Raises ValueError with what that one refused."""
    context = mp.get_context('spawn')
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_child, args=(theirs, settings, contract, mode, repeats), daemon=True
    )
    process.start()
    theirs.close()
    try:
        row = ours.recv()
    except EOFError:
        process.join()
        raise ValueError(
            f'{settings.precision}, {mode}: the process ended with exit code {process.exitcode}; '
            'torch.compile needs a C++ compiler (g++). Leave it out with --modes eager'
        ) from None
    process.join()
    if isinstance(row, str):
        raise ValueError(row)
    return row


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


def run(args: argparse.Namespace) -> int:
    """Measure every combination, print the table and the verdict on real time."""
    contract = load_contract(args.contract)
    rows: list[dict[str, Any]] = []
    unknown = sorted(set(args.modes.split(',')) - set(MODES))
    if unknown:
        raise ValueError(f'modes {unknown} are unknown; known are {", ".join(MODES)}')
    for precision in args.precision.split(','):
        served = found(args.model, precision)
        for mode in args.modes.split(',') if precision in DTYPES else ['served']:
            for threads in map(int, args.threads.split(',')):
                settings = PolicySettings(
                    model=args.model, precision=served, steps=args.steps, threads=threads
                )
                row = measure_alone(settings, args.contract, mode, args.repeats)
                row.update(precision=precision, mode=mode, threads=threads)
                rows.append(row)
                print(f'{precision}, {mode}, {threads} threads: measured', flush=True)
    first = np.array(rows[0]['positions'])
    for row in rows:
        row['to_float_mrad'] = 1e3 * float(np.abs(np.array(row.pop('positions')) - first).max())
    print(f'\n{machine()}; ms, batch 1, {args.repeats} repeats, {rows[0]["steps"]} denoising '
          f'steps; to float: largest joint difference to the first row, mrad\n{_table(rows)}')
    covers_ms = 1e3 * contract.action.execute * contract.action.step_dt_s
    print('\n' + verdict(rows, covers_ms))
    if args.json:
        document = {'machine': machine(), 'covers_ms': covers_ms, 'rows': rows}
        args.json.write_text(json.dumps(document, indent=1) + '\n')
    return 0


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
