# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench kernels`: every integer path against the peak of this core and against peers.

Times are minima of many calls, taken in turns, so that all candidates of a row see the same
machine. The peak is measured again in each row. The machine should be otherwise idle.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.bench.kernel_goals import judge
from quantvla_ros.bench.kernel_peers import peers
from quantvla_ros.kernels import dispatch, native, weights
from quantvla_ros.kernels.layer import NativeLayer, Options

SHAPES = ((384, 1536), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 1024), (2048, 16384))
TOKENS = (1, 16, 50, 256, 800)
# name -> (weight bits, group, activation bits)
SCHEMES = {'w4a8': (4, 0, 8), 'w4a8 g128': (4, 128, 8), 'w4a4': (4, 0, 4), 'w8a8': (8, 0, 8)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument('--quick', action='store_true', help='two shapes, three token counts')
    parser.add_argument('--paths', default='', help='by comma; default: all here but scalar')
    parser.add_argument('--shapes', default='', metavar='KxN,...', help='instead of the table')
    parser.add_argument('--tokens', default='', metavar='M,...', help='instead of the table')
    parser.add_argument('--seconds', type=float, default=0.15, help='for each cell')
    parser.add_argument('--no-amx', action='store_true', help='neither here nor in oneDNN, which '
                        'torch uses: as on a machine without it')
    parser.add_argument('--no-peers', action='store_true', help='no other libraries')
    parser.add_argument('--no-chunk', action='store_true', help='leave the whole policy out')
    parser.add_argument('--json', type=Path, help='write all figures to this file')


def processor() -> str:
    """Return the processor's name as the system tells it."""
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def in_turns(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Call everything in turns for `seconds` each; the shortest time of each, in seconds."""
    best = dict.fromkeys(runs, float('inf'))
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds * len(runs)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            for _ in range(3):
                begin = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - begin)
        rounds += 1
    return best


def _without_amx() -> str:
    """The best path of this machine but AMX."""
    return next(p for p in native.PATHS if p != 'amx' and not native.why_not(p))


def make_layer(library: ctypes.CDLL, scheme: str, rows: int, columns: int) -> NativeLayer:
    """Make a layer of random integers; speed does not depend on their values."""
    bits, group, act_bits = SCHEMES[scheme]
    low, high = weights.RANGES[bits]
    q = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, columns // group if group else 1)
    weight = weights.pack(q, scales, bits, group)
    return NativeLayer(library, weight, None, Options(act_bits), None, None)


def inside(layer: NativeLayer, library: ctypes.CDLL, x: Tensor, repeats: int) -> Callable[[], int]:
    """Run the layer `repeats` times in one call of C: the kernel without the interpreter."""
    y = torch.empty(len(x), layer.n)
    call = native.Call(kind=0, dtype=0, layer=layer.handle, rows=len(x), x=x.data_ptr(),
                       ldx=layer.k, y=y.data_ptr(), ldy=layer.n)
    calls = (native.Call * repeats)(*[call] * repeats)

    def run(kept: Any = (x, y, layer)) -> int:
        del kept
        return int(library.qv_run(calls, repeats))

    return run


def measure_row(
    paths: dict[str, ctypes.CDLL], columns: int, rows: int, tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one shape and token count, all paths and peers side by side, one thread."""
    x = torch.randn(tokens, columns)
    repeats = max(1, min(32, 200_000_000 // (tokens * columns * rows)))
    runs: dict[str, Callable[[], object]] = {}
    operations = 2.0 * tokens * columns * rows
    for path, library in paths.items():
        library.qv_set_threads(1)
        for scheme in SCHEMES:
            layer = make_layer(library, scheme, rows, columns)
            runs[f'{path} {scheme}'] = inside(layer, library, x, repeats)
            if path == next(iter(paths)):
                runs[f'call {scheme}'] = lambda layer=layer: layer(x)  # type: ignore[misc]
    missing: dict[str, str] = {}
    if not args.no_peers:
        found, missing = peers(x, torch.randn(rows, columns), 1)
        runs.update(found)
    best = in_turns(runs, args.seconds)
    peaks = {path: library.qv_peak() for path, library in paths.items()}
    seconds = {name: best[name] / (repeats if name.split()[0] in paths else 1) for name in runs}
    row = {
        'k': columns, 'n': rows, 'm': tokens, 'seconds': seconds, 'missing': missing,
        'gops': {name: operations / s / 1e9 for name, s in seconds.items()},
        'peak_gops': {path: peak / 1e9 for path, peak in peaks.items()},
    }
    first = next(iter(paths))
    if tokens == 1:
        data = torch.empty(columns * rows // 2, dtype=torch.uint8).fill_(1)
        rate = paths[first].qv_read_rate(data.data_ptr(), data.numel())
        row['read_mib'] = data.numel() / 2**20
        row['read_share'] = data.numel() / seconds[f'{first} w4a8'] / rate
    else:
        row['two_threads'] = two_threads(paths[first], x, rows, args.seconds)
    return row


def two_threads(library: ctypes.CDLL, x: Tensor, rows: int, seconds: float) -> float:
    """Return how much faster two threads are than one, W4A8 per row; 0 where there is one core."""
    if len(os.sched_getaffinity(0)) < 2:
        return 0.0
    run = inside(make_layer(library, 'w4a8', rows, x.shape[1]), library, x, 8)
    best = {1: float('inf'), 2: float('inf')}
    end = time.perf_counter() + 4 * seconds
    while time.perf_counter() < end:
        for count in best:  # in turns, so that both see the same machine
            library.qv_set_threads(count)
            run()  # starts the second thread
            for _ in range(5):
                begin = time.perf_counter()
                run()
                best[count] = min(best[count], time.perf_counter() - begin)
    library.qv_set_threads(1)
    return best[1] / best[2]


def two_cores(library: ctypes.CDLL) -> float:
    """Return the peak of two threads at once over that of one; 0 where there is one core.

    In registers, so that nothing but the cores themselves is shared: two threads of one core, as
    many rented machines count them, stay far below 2.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return 0.0

    def peak(_: int) -> float:
        return statistics.median(library.qv_peak() for _ in range(15))

    alone = peak(0)
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(peak, range(2))) / alone


def show(row: dict[str, Any], paths: list[str]) -> None:
    """Print one row of the table."""
    two = row.get('two_threads')
    print(f'\nK {row["k"]}  N {row["n"]}  tokens {row["m"]}   '
          + (f'(two threads: {two:.2f}x one)' if two else ''))
    for name, gops in row['gops'].items():
        path = name.split()[0]
        share = f'{100 * gops / row["peak_gops"][path]:5.1f} % of peak' if path in paths else ''
        print(f'  {name:<24}{row["seconds"][name] * 1e3:10.4f} ms {gops:8.1f} GOP/s  {share}')
    for name, reason in row['missing'].items():
        print(f'  {name:<24}not measured: {reason}')


def _wanted_rows(args: argparse.Namespace) -> tuple[list[tuple[int, int]], list[int]]:
    """(K, N) of each layer, and the token counts."""
    shapes = list(SHAPES[1:4:2] if args.quick else SHAPES)
    tokens = list((1, 50, 256) if args.quick else TOKENS)
    if args.shapes:
        pairs = [shape.split('x') for shape in args.shapes.split(',')]
        shapes = [(int(k), int(n)) for k, n in pairs]
    if args.tokens:
        tokens = [int(m) for m in args.tokens.split(',')]
    return shapes, tokens


def run(args: argparse.Namespace) -> int:
    """Print the table, the goals and whether each is met."""
    torch.set_num_threads(1)
    if args.no_amx:  # oneDNN reads this before its first product
        os.environ['ONEDNN_MAX_CPU_ISA'] = 'AVX512_CORE_BF16'
        os.environ.setdefault(dispatch.FORCE, _without_amx())
    wanted = [p for p in args.paths.split(',') if p] or [p for p in native.PATHS if p != 'scalar']
    unknown = sorted(set(wanted) - set(native.PATHS))
    if unknown:
        raise ValueError(f'--paths names {unknown}; known are {", ".join(native.PATHS)}')
    paths = {}
    for name in wanted:
        reason = native.why_not(name)
        if args.no_amx and name == 'amx':
            reason = '--no-amx'
        if reason:
            print(f'path {name}: left out, {reason}')
        else:
            paths[name] = native.load(name)
    if not paths:
        raise ValueError('no kernel path runs here; build them: '
                         'python -m quantvla_ros.kernels.cpu.build')
    vector = next((name for name in paths if name != 'amx'), next(iter(paths)))
    print(f'{processor()}, {os.cpu_count()} cores, torch {torch.__version__}; one thread, '
          f'minimum of many calls; peaks of a core in GOP/s:',
          ', '.join(f'{name} {library.qv_peak() / 1e9:.0f}' for name, library in paths.items()))
    cores = two_cores(paths[vector])
    print(f'two threads at once reach {cores:.2f}x the peak of one, {vector}, in registers')
    shapes, token_counts = _wanted_rows(args)
    rows = []
    for columns, count in shapes:
        for tokens in token_counts:
            rows.append(measure_row(paths, columns, count, tokens, args))
            show(rows[-1], list(paths))
    chunk = {}
    if not args.no_chunk:
        from quantvla_ros.bench.kernel_chunk import measure

        chunk = measure(seconds=2.0 if args.quick else 5.0)
    goals = judge(rows, next(iter(paths)), vector, chunk, cores)
    print('\ngoals')
    for goal in goals:
        print(f'  {"met    " if goal["met"] else "NOT MET"}  {goal["text"]}: {goal["seen"]}')
    if args.json:
        args.json.write_text(json.dumps(
            {'processor': processor(), 'rows': rows, 'chunk': chunk, 'goals': goals}, indent=1))
    return 0
