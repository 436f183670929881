# SPDX-License-Identifier: Apache-2.0
"""Where the time of a chunk goes: every kernel of both graphs, as torch's profiler sees it.

Launches that begin early count their waiting, so everything is profiled without them.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch

from quantvla_ros.bench import gpu_chunk
from quantvla_ros.bench.gpu_time import Bench
from quantvla_ros.kernels.cuda.tiles import NOWHERE

REPEATS = 3
SHOWN = 14


def profiles(bench: Bench) -> dict[str, Any]:
    """Print and return the kernels of each network's prefix and loop at four precisions."""
    found: dict[str, Any] = {}
    if bench.dry:
        print('  needs a card: the interpreter has no kernels to time')
        return found
    for setting, precision in product(gpu_chunk.first_of_each(bench), gpu_chunk.PRECISIONS[:4]):
        name = f'{setting.family} {precision.name}'
        if bench.deadline.left_s() < 20:
            print(f'  {name}: not profiled, the time is up')
            continue
        graphs = gpu_chunk.build(setting, precision, bench, NOWHERE)
        with torch.inference_mode():
            rows = {part: kernels(run) for part, run in
                    (('prefix', graphs.prefix), ('loop', graphs.denoise))}
        del graphs
        gpu_chunk.free()
        found[name] = rows
        show(name, rows)
    return found


def kernels(run: Callable[[], None]) -> list[dict[str, Any]]:
    """Kernels of one run, those of one name and shape together, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'trace.json'
        seen.export_chrome_trace(str(path))
        return grouped(json.loads(path.read_text())['traceEvents'], REPEATS)


def grouped(events: list[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """Events of a trace -> name, grid, block, calls and microseconds of all calls in one run."""
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for event in events:
        if event.get('cat') == 'kernel':
            arguments = event.get('args', {})
            key = (event['name'], str(arguments.get('grid')), str(arguments.get('block')))
            times[key].append(event['dur'])
    rows = [{'name': name, 'grid': grid, 'block': block, 'calls': len(some) / repeats,
             'us': sum(some) / repeats} for (name, grid, block), some in times.items()]
    return sorted(rows, key=lambda row: -row['us'])


def show(name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print what takes longest."""
    for part, found in rows.items():
        calls, total = (sum(row[key] for row in found) for key in ('calls', 'us'))
        print(f'  {name} {part}: {total / 1e3:.3f} ms in {calls:.0f} kernels')
        for row in found[:SHOWN]:
            print(f'    {row["us"] / 1e3:8.3f} ms {row["calls"]:5.0f} x '
                  f'{row["us"] / row["calls"]:8.2f} us  {row["name"]:<40.40} {row["grid"]}')
