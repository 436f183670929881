# SPDX-License-Identifier: Apache-2.0
"""What each way of kernels/cuda/fused.py is worth in a whole chunk of pi0.5, alone and together.

`ways` of a chip in tiles.json should hold what wins here, after `--tune --ways all`. Those that
stand there already are taken in every row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from quantvla_ros.bench import gpu_chunk
from quantvla_ros.bench.gpu_chunk import FLOAT, LOOP, NOWHERE
from quantvla_ros.bench.gpu_source import Precision
from quantvla_ros.bench.gpu_time import Bench, tried
from quantvla_ros.kernels.cuda import launch, tiles

PRECISIONS = (Precision('w8a8'), Precision('w4a8'))
ALL = tuple(tiles.WAYS)
SETS: tuple[tuple[str, ...], ...] = (
    ALL, (), *((way,) for way in ALL), *(tuple(w for w in ALL if w != way) for way in ALL))


def compare(bench: Bench) -> dict[str, Any]:
    """Print and return milliseconds of every set of ways, the best bfloat16 first."""
    setting = gpu_chunk.SETTINGS[0]
    before = tiles.asked()
    found: dict[str, Any] = {}
    chip = launch.chip_of(bench.device)
    for some in () if bench.dry else ((), ALL):
        tiles.ask(some)
        gpu_chunk.warm_caches((setting,), bench)
    floats = [_one(bench, FLOAT, (), early, found) for early in
              ((NOWHERE, LOOP) if chip.hopper else (NOWHERE,))]
    base = min(floats)
    print(f'  {setting.name}: the best bfloat16 takes {base:.3f} ms')
    for precision in PRECISIONS:
        early = tiles.early(precision.kind, chip, setting.family)
        times = {some: _one(bench, precision, some, early, found, base) for some in SETS}
        best = min(times, key=lambda some: times[some])
        print(f'  {precision.name}: fastest with {" ".join(best) or "none"}')
    tiles.ask(before)
    return found


def _one(bench: Bench, precision: Precision, some: tuple[str, ...], early: tiles.Early,
         found: dict[str, Any], base: float = float('nan')) -> float:
    """Milliseconds of one plan, infinite where it was not measured."""
    tiles.ask(some)
    name = f'{precision.name}, {" ".join(some) or "none"}, {gpu_chunk.begin(early)}'
    if bench.deadline.left_s() < 10:
        print(f'    {name}: not measured, the time is up')
        return float('inf')
    row, why = tried(partial(
        gpu_chunk.measure, gpu_chunk.SETTINGS[0], precision, bench, early))
    gpu_chunk.free()
    if why:
        found[name] = {'missing': why}
        print(f'    {name}: {why}', flush=True)
        return float('inf')
    found[name] = row
    print(f'    {name:<44} {row["whole"]:8.3f} ms  {base / row["whole"]:5.2f}x  '
          f'prefix {row["prefix"]:7.3f}  loop {row["loop"]:7.3f}', flush=True)
    return float(row['whole'])
