# SPDX-License-Identifier: Apache-2.0
"""Time every tile of every shape on this card, and write what is fastest to tiles.json.

Worker processes compile ahead on the other cores and run nothing, so that only the timing
process uses the card. Shapes come in the order of what they take of a chunk, and the file is
written after each: a run that is cut keeps what it has. Nothing wrong is timed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from quantvla_ros.bench import gpu_attention, gpu_gemm
from quantvla_ros.bench.gpu_product import Call, Products, Shape
from quantvla_ros.bench.gpu_time import Bench, tried
from quantvla_ros.kernels.cuda import launch, tiles
from quantvla_ros.kernels.cuda.ahead import hollow_weight, pretend
from quantvla_ros.kernels.cuda.launch import Tokens
from quantvla_ros.kernels.cuda.launch_attention import Split
from quantvla_ros.kernels.cuda.pack import padded_columns

# (tokens, rows, columns, what follows: see tiles.Problem), by what they take of a chunk;
# 'turned': heads of 256, one of keys
PI05 = (
    (968, 32768, 2048, 'pair'), (968, 2048, 16384, ''), (50, 8192, 1024, 'pair'),
    (50, 1024, 4096, 'raw'), (50, 2560, 1024, 'turned'), (50, 1024, 2048, 'raw'),
    (968, 2560, 2048, 'turned'), (968, 16384, 2048, 'gated'), (50, 4096, 1024, 'gated'),
    (50, 1024, 4096, ''), (50, 2560, 1024, ''), (50, 1024, 2048, ''),
    (768, 4304, 1152, ''), (768, 1152, 4304, ''), (768, 3456, 1152, ''),
    (768, 1152, 1152, ''), (968, 2560, 2048, ''), (968, 2048, 2048, ''),
    (968, 16384, 2048, ''), (50, 4096, 1024, ''), (50, 2048, 1024, ''),
)
TEN = (
    (10, 8192, 1024, 'pair'), (10, 1024, 4096, 'raw'), (10, 2560, 1024, 'turned'),
    (10, 1024, 2048, 'raw'), (10, 4096, 1024, 'gated'), (10, 1024, 4096, ''),
    (10, 2560, 1024, ''), (10, 1024, 2048, ''), (10, 4096, 1024, ''),
)
GROOT = (
    (49, 4608, 1536, ''), (49, 6144, 1536, ''), (49, 1536, 6144, 'raw'),
    (49, 1536, 1536, 'raw'), (560, 12288, 2048, 'pair'), (560, 2048, 6144, ''),
    (512, 4304, 1152, ''), (512, 1152, 4304, ''), (512, 3456, 1152, ''), (512, 1152, 1152, ''),
    (560, 4096, 2048, ''), (560, 2048, 2048, ''), (560, 8192, 2048, ''), (560, 2048, 8192, ''),
    (560, 24576, 2048, ''), (560, 6144, 2048, ''), (512, 2048, 1152, ''),
    (49, 1536, 6144, ''), (49, 1536, 1536, ''), (560, 6144, 2048, 'gated'),
    (560, 1024, 2048, ''), (560, 1536, 2048, ''),
)
ALONE = ((1, 4096, 4096, ''), (1, 11008, 4096, ''), (1, 4096, 11008, ''),
         (1, 16384, 2048, ''))
SHAPES = (('pi05', PI05), ('groot_n15', GROOT), ('pi05', TEN), ('openvla', ALONE))
WAY_OF = {'pair': 'pair', 'turned': 'turn', 'raw': 'raw'}  # tuned where asked for
DRY = ((5, 96, 256, ''),)
CPU = torch.device('cpu')
TOGETHER = 4  # tiles that a worker compiles in one task


def capability(bench: Bench) -> int:
    """90 for a Hopper card."""
    major, minor = torch.cuda.get_device_capability(bench.device)
    return 10 * major + minor


# what the workers do ---------------------------------------------------------------------------


def compile_products(shape: Shape, some: list[tiles.Tile]) -> None:
    """Leave kernels in Triton's cache on disk; one that does not compile is found out later."""
    weight = hollow_weight(shape.bits, shape.group, shape.n, shape.k)
    tokens = Tokens(torch.empty(shape.m, weight.padded[1], dtype=torch.int8),
                    torch.empty(shape.m))
    for tile in some:
        with suppress(Exception):
            Call(shape, tile, torch.bfloat16, CPU, ahead=True).run(
                tokens, weight, weight if shape.gated else None)


def compile_attention(name: str, early: bool, some: list[Split]) -> None:
    """The same for attention."""
    for split in some:
        with suppress(Exception):
            gpu_attention.runner(gpu_attention.CASES[name], split, CPU, torch.bfloat16,
                                 early=early, ahead=True)()


class Ahead:
    """A pool of processes that compile, one core left to who times."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.pool = None if bench.dry else ProcessPoolExecutor(
            max(1, (os.cpu_count() or 2) - 1), mp_context=get_context('spawn'),
            initializer=pretend, initargs=(capability(bench),))

    def start(self, what: Callable[..., None], some: list[Any]) -> list[Future[None]]:
        """Compile candidates, a few in each task."""
        if self.pool is None:
            return []
        return [self.pool.submit(what, some[i:i + TOGETHER])
                for i in range(0, len(some), TOGETHER)]

    def end(self) -> None:
        """Give up what has not begun."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def wait(futures: list[Future[None]], bench: Bench) -> bool:
    """Wait for compilations; whether they ended in time."""
    for future in futures:
        left = bench.deadline.left_s() - 5.0
        if left <= 0:
            return False
        _, why = tried(partial(future.result, timeout=left))
        if why and bench.deadline.left_s() <= 5.0:
            return False
    return True


def compile_chosen(shapes: Sequence[tuple[int, int, int]], bench: Bench) -> None:
    """Compile the products of a table, with the tiles that they will take, on other cores."""
    ahead, chip = Ahead(bench), launch.chip_of(bench.device)
    futures = []
    for (m, n, k), (kind, (_, group)) in product(shapes, gpu_gemm.OURS.items()):
        if not group or k % group == 0:
            shape = Shape(m, n, k, kind, '')
            tile = tiles.choose(_problem(shape, bench), chip)
            futures += ahead.start(partial(compile_products, shape), [tile])
    wait(futures, bench)
    ahead.end()


# the timing process ----------------------------------------------------------------------------


def fastest(
    candidates: list[Any], time: Callable[[Any], float], bench: Bench
) -> tuple[Any, float]:
    """The fastest of what runs and is right, and its microseconds."""
    best, least, whys = None, float('inf'), []
    for candidate in candidates:
        if bench.deadline.left_s() < 5:
            break
        value, why = tried(partial(time, candidate))
        whys += [why] if why else []
        if not why and value < least:
            best, least = candidate, value
    if whys:
        print(f'    {len(whys)} of {len(candidates)} do not run: {whys[0]}', flush=True)
    return best, least


def shapes(bench: Bench) -> Iterator[Shape]:
    """By what they take of a chunk; groups last."""
    table = tuple(shape for family, some in SHAPES for shape in some
                  if not bench.families or family in bench.families)
    if bench.dry or bench.quick:
        table = DRY if bench.dry else PI05[:7]
    chip = launch.chip_of(bench.device)
    taken = tiles.ways(chip)
    table = tuple(s for s in table if WAY_OF.get(s[3], s[3]) in {'', 'gated', *taken})
    for kinds in (('w8a8', 'w4a8'), ('w4a8g128',)):
        for m, n, k, follows in table:
            for kind in kinds:
                group = gpu_gemm.OURS[kind][1]
                if not group or (k % group == 0 and n > 1024):
                    early = m <= tiles.FEW and tiles.early(kind.partition('g')[0], chip).loop
                    yield Shape(m, n, k, kind, follows, early)


def tune(bench: Bench, file: Path, *, attention: bool = True) -> None:
    """Tune until the time is up; a chip's entries in the file are replaced one by one."""
    chip = launch.chip_of(bench.device)
    ahead = Ahead(bench)
    cut = 2 if bench.dry else None
    names = [] if bench.dry or not attention else [
        name for name, case in gpu_attention.CASES.items()
        if not bench.families or case.family in bench.families]
    early = {name: gpu_attention.CASES[name].few and
             tiles.early('w8a8', chip).loop for name in names}
    splits = {name: gpu_attention.candidates(gpu_attention.CASES[name], chip) for name in names}
    waiting: dict[Any, tuple[list[Any], list[Future[None]]]] = {}

    def begin(name: str) -> None:
        waiting[name] = splits[name], ahead.start(
            partial(compile_attention, name, early[name]), splits[name])

    for name in names[:3]:
        begin(name)
    for shape in shapes(bench):
        problem = _problem(shape, bench)
        found = [tile for tile in tiles.candidates(problem, chip)
                 if tile.split == 1 or problem.follows not in ('pair', 'turned')][:cut]
        waiting[shape] = found, ahead.start(partial(compile_products, shape), found)
    for name in names[3:]:
        begin(name)
    try:
        for what, (candidates, futures) in waiting.items():
            if not wait(futures, bench) or bench.deadline.left_s() < 10:
                print('  the time is up', flush=True)
                break
            entry = (_tune_attention(what, early[what], candidates, bench)
                     if isinstance(what, str) else _tune_product(what, candidates, bench))
            if entry is not None:
                print('  ' + json.dumps(entry), flush=True)
                keep(file, chip.name, entry)
            torch.cuda.empty_cache()
    finally:
        ahead.end()


def _problem(shape: Shape, bench: Bench) -> tiles.Problem:
    del bench
    group = shape.group
    pack = (2 * group if shape.bits == 4 else group) if group else (
        256 if shape.k % 256 == 0 else 128)
    return tiles.Problem(shape.bits, shape.m, shape.n,
                         padded_columns(shape.bits, shape.k, group), group, pack, shape.follows)


def _tune_product(shape: Shape, candidates: list[tiles.Tile], bench: Bench) -> Any:
    products = Products(shape, bench)
    wanted = products.wanted()
    best, least = fastest(candidates, lambda tile: products.time(tile, wanted), bench)
    if best is None:
        return None
    p = products.problem
    return {'kind': p.kind, 'm': p.m, 'n': p.n, 'k': p.kp, 'tile': list(astuple(best)),
            'us': round(least, 2), 'tried': len(candidates)}


def _tune_attention(name: str, early: bool, candidates: list[Split], bench: Bench) -> Any:
    case = gpu_attention.CASES[name]
    best, least = fastest(
        candidates, lambda s: gpu_attention.measure(case, s, bench, early=early), bench)
    if best is None:
        return None
    return {'rows': case.rows, 'keys': case.keys, 'heads': case.groups, 'width': case.width,
            'split': list(astuple(best)), 'us': round(least, 2), 'tried': len(candidates)}


def keep(file: Path, chip: str, entry: dict[str, Any]) -> None:
    """Put an entry in the place of the one for the same shape."""
    whole = json.loads(file.read_text()) if file.is_file() else {}
    own = whole.setdefault(chip, {'early': {}, 'tiles': [], 'attention': []})
    own['source'] = 'quantvla bench gpu --tune'
    where, names = (('attention', ('rows', 'keys', 'heads', 'width')) if 'split' in entry
                    else ('tiles', ('kind', 'm', 'n', 'k')))
    others = [old for old in own.get(where, [])
              if any(old[name] != entry[name] for name in names)]
    own[where] = [*others, {k: v for k, v in entry.items() if k != 'tried'}]
    file.write_text(written(whole))


def written(whole: dict[str, Any]) -> str:
    """A line for each entry."""
    chips = []
    for chip, own in whole.items():
        lists = ',\n'.join(
            f'  "{name}": [\n' + ',\n'.join(f'   {json.dumps(e)}' for e in own.get(name, ()))
            + '\n  ]' for name in ('tiles', 'attention'))
        chips.append(f' "{chip}": {{\n  "source": {json.dumps(own["source"])},\n'
                     f'  "early": {json.dumps(own.get("early", {}))},\n'
                     f'  "ways": {json.dumps(own.get("ways", []))},\n{lists}\n }}')
    return '{\n' + ',\n'.join(chips) + '\n}\n'
