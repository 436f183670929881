# SPDX-License-Identifier: Apache-2.0
"""Which tile a product runs with: stored per chip and shape, nearest neighbour, or a rule.

Nothing is tried out on a robot. `quantvla bench gpu --tune` measures candidates and writes
tiles.json; an entry belongs to a chip ('sm_90'), a kind ('w4a8'), and a shape (m, n, k).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name('tiles.json')
# shared memory that one program may take, bytes; larger chips than these take the last line's
SHARED = {'sm_75': 64 << 10, 'sm_80': 163 << 10, 'sm_86': 99 << 10, 'sm_87': 163 << 10,
          'sm_89': 99 << 10, 'sm_90': 227 << 10, 'sm_100': 227 << 10, 'sm_110': 227 << 10,
          'sm_120': 99 << 10}
SMALLEST = 64 << 10  # for a chip that is not in the table
OVERLAPPED = 2  # a tile's `bulk` that asks for overlapped.py
FEW = 128  # tokens of a denoising step at most
FAR = 3.0  # octaves of m, n and k together beyond which a stored tile says nothing


@dataclass(frozen=True)
class Tile:
    """bm tokens, bn rows, bk bytes of a row of W in each step; stages, warps; splits of K.

    bulk: 1 where the copy engine of Hopper and later fetches the tiles, 2 where steps overlap too.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int
    bulk: int = 0


@dataclass(frozen=True)
class Problem:
    """What decides on a tile. kp: padded columns; pack: columns of a block; see pack.py.

    follows: '', 'gated' (a second weight), or what fused.py does: 'pair', 'turned', 'raw'.
    """

    bits: int
    m: int
    n: int
    kp: int
    group: int = 0
    pack: int = 128
    follows: str = ''

    @property
    def gated(self) -> bool:
        """Whether two weights are multiplied side by side."""
        return self.follows == 'gated'

    @property
    def kind(self) -> str:
        """Name in the file."""
        group = f'g{self.group}' if self.group else ''
        return f'w{self.bits}a8{group}{self.follows and "-" + self.follows}'

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of W."""
        return self.kp * self.bits // 8


@dataclass(frozen=True)
class Chip:
    """A compute capability, and the multiprocessors that work is spread over."""

    name: str
    processors: int

    @property
    def hopper(self) -> bool:
        """Whether its matrix units read shared memory by themselves, and sums are 64 rows wide."""
        return self.name == 'sm_90'

    @property
    def bulk(self) -> bool:
        """Whether it has an engine that copies whole tiles."""
        return self.name in ('sm_90', 'sm_100', 'sm_110', 'sm_120', 'interpreted')

    @property
    def shared(self) -> int:
        """Shared memory of one program, bytes."""
        return SHARED.get(self.name, SMALLEST)


@lru_cache(maxsize=1)
def stored() -> Mapping[str, Any]:
    """Read the file that ships."""
    return json.loads(FILE.read_text())


def choose(problem: Problem, chip: Chip, table: Mapping[str, Any] | None = None) -> Tile:
    """Return a tile that can run: the nearest stored one, else the rule's, made to fit."""
    found = _nearest(problem, chip, stored() if table is None else table)
    return fit(found or by_rule(problem, chip), problem, chip)


def _nearest(problem: Problem, chip: Chip, table: Mapping[str, Any]) -> Tile | None:
    def distance(entry: Mapping[str, Any]) -> float:
        m = 2.0 * abs(math.log2(entry['m'] / problem.m))  # tokens decide more than the others
        return m + sum(abs(math.log2(a / b)) for a, b in
                       ((entry['n'], problem.n), (entry['k'], problem.kp)))

    entries = [entry for entry in table.get(chip.name, {}).get('tiles', [])
               if entry['kind'] == problem.kind]
    best = min(entries, key=distance, default=None)
    if best is None or distance(best) > FAR:
        return None
    return Tile(*best['tile'])


def programs_of(tile: Tile, problem: Problem) -> int:
    """Programs of a tile, before they are split."""
    return -(-problem.n // tile.bn) * -(-problem.m // tile.bm)


def by_rule(problem: Problem, chip: Chip) -> Tile:
    """A tile for a chip that nobody has tuned: smaller, then split, until it fills the chip."""
    if problem.m > 128:
        two = problem.gated or problem.group  # two accumulators
        warps = 4 if problem.bits == 8 and not two else 8  # by the compiler's count of registers
        tile = Tile(64 if two else 128, 128, 128 if problem.bits == 8 else 64, 3, warps, 1)
        if programs_of(tile, problem) < chip.processors:
            tile = replace(tile, bn=64, warps=4)
        if programs_of(tile, problem) * 2 <= chip.processors and steps_of(tile, problem) >= 8:
            tile = replace(tile, split=2)
        return tile
    bm = min(64, max(16, 1 << (problem.m - 1).bit_length()))
    tile = Tile(bm, 64, 128, 4, 4, 1)
    programs = programs_of(tile, problem)
    steps = problem.row_bytes // tile.bk
    split = 1
    while programs * split * 2 <= 2 * chip.processors and steps // (split * 2) >= 4:
        split *= 2
    return replace(tile, split=split)


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Shared memory that the pipeline of a tile takes: what its stages hold."""
    weights = tile.bn * tile.bk * (2 if problem.gated else 1)
    tokens = tile.bm * tile.bk * (2 if problem.bits == 4 else 1)
    return tile.stages * (weights + tokens)


def widest(problem: Problem) -> int:
    """Most bytes of a row of W that one step may take."""
    if problem.bits == 4:
        return problem.pack // 2
    return problem.group or (256 if problem.kp % 256 == 0 else 128)


def overlaps(problem: Problem, chip: Chip) -> bool:
    """Whether overlapped.py has a kernel for it."""
    return chip.hopper and not problem.group and problem.follows != 'gated'


def fit(tile: Tile, problem: Problem, chip: Chip) -> Tile:
    """Make a tile runnable: steps divide blocks and groups, stages fit into shared memory."""
    bk = min(tile.bk, widest(problem))
    steps = problem.row_bytes // bk
    # rows are padded to 128, and their scales are read without a mask
    tile = replace(tile, bn=min(tile.bn, 128), bk=bk, split=max(1, min(tile.split, steps)),
                   bulk=tile.bulk if chip.bulk else 0)
    if tile.bulk == OVERLAPPED and (
            not overlaps(problem, chip) or (tile.split > 1 and problem.follows != 'raw')):
        tile = replace(tile, bulk=1)
    while shared_bytes(tile, problem) > chip.shared and tile.stages > 1:
        tile = replace(tile, stages=tile.stages - 1)
    return tile


def candidates(problem: Problem, chip: Chip) -> list[Tile]:
    """Tiles worth trying for a shape, for `--tune`: each costs a compilation."""
    few = problem.m <= FEW
    bm = min(64, max(16, 1 << (problem.m - 1).bit_length()))
    shapes = [(bm, 64, 4), (bm, 128, 8)] if few else [
        (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 128, 8), (256, 64, 4)]
    wide = problem.bits == 8
    # Triton waits for every integer product, so that of many tokens long steps, or several
    # programs on a processor, which few stages leave room for, keep the matrix units busy
    depths = [(128, 3), (128, 6), (256, 3)] if wide else [(64, 4), (128, 3), (128, 4)]
    if not few:
        depths = [(128, 2), (128, 3), (256, 3)] if wide else [(64, 3), (128, 2), (128, 3)]
    found = list(_overlapped(problem, chip))
    for (bm, bn, warps), (bk, stages), bulk in product(shapes, depths, (1, 0)):
        sums = bm * bn * (2 if problem.gated else 1) // (32 * warps)
        if sums > 128 or bulk > chip.bulk or (
                chip.bulk and not few and not bulk and (bm, bn, stages) != (128, 128, 3)):
            continue
        programs = programs_of(Tile(bm, bn, bk, stages, warps, 1), problem)
        for split in (1, 2, 4, 8, 16) if few else (1, 2):
            # more than the chip holds at once only costs the sums, less leaves it idle
            filled = programs * split / chip.processors
            if (split > 1 and filled > 2.2) or (filled < 0.25 and few and split < 16):
                continue
            tile = Tile(bm, bn, bk, stages, warps, split, bulk)
            if fit(tile, problem, chip) == tile and steps_of(tile, problem) >= 2:
                found.append(tile)
    return found


# bm, bn, warps, bk and numbers of stages that overlapped.py's many tokens are tried with, by bits:
# what an H100 chose for one shape or another, and what lies beside it
MANY: dict[int, tuple[tuple[int, int, int, int, tuple[int, ...]], ...]] = {
    8: ((256, 128, 8, 128, (4,)), (128, 128, 8, 128, (3, 4, 6)), (128, 64, 4, 128, (3, 4, 6)),
        (64, 128, 4, 128, (3, 6)), (64, 128, 8, 128, (3,)), (64, 64, 4, 128, (3, 4, 6))),
    4: ((128, 128, 8, 64, (3, 4)), (128, 128, 8, 128, (3, 4)), (128, 64, 4, 64, (3, 4, 6)),
        (64, 128, 4, 64, (3,)), (64, 128, 8, 128, (3,)), (64, 64, 4, 64, (4,)),
        (64, 64, 4, 128, (3,))),
}


def _overlapped(problem: Problem, chip: Chip) -> Iterable[Tile]:
    """Tiles of overlapped.py worth trying."""
    if not overlaps(problem, chip):
        return
    shapes, splits = MANY[problem.bits], [1]
    if problem.m <= FEW:
        bm = min(64, max(16, 1 << (problem.m - 1).bit_length()))
        shapes = tuple((bm, bn, warps, 128, (3, 4, 6, 8)) for bn, warps in ((64, 4), (128, 8)))
        splits = [2, 4, 8] if problem.follows == 'raw' else [1]
    tried = (Tile(bm, bn, bk, stages, warps, split, OVERLAPPED)
             for (bm, bn, warps, bk, depths), split in product(shapes, splits)
             for stages in depths)
    for tile in tried:
        filled = programs_of(tile, problem) * tile.split / chip.processors
        crowded = filled > (2.2 if tile.split > 1 else 4.0) and tile.bm * tile.bn <= 4096
        idle = filled < 0.25 and problem.m <= FEW and tile.split < 8
        if not (crowded or idle) and fit(tile, problem, chip) == tile and (
                steps_of(tile, problem) >= tile.stages - 1):
            yield tile


def steps_of(tile: Tile, problem: Problem) -> int:
    """Steps of one program."""
    return problem.row_bytes // tile.bk // tile.split


@dataclass(frozen=True)
class Early:
    """In which graphs a launch begins before the one ahead of it has ended (sm_90 and later)."""

    prefix: bool = False
    loop: bool = False


NOWHERE = Early()
# what fused.py offers beyond product.py
WAYS = {
    'pair': 'gate and up in one product, in eights of rows',
    'turn': 'positions and the cache in the epilogue of queries, keys and values',
    'raw': 'sums of split products added up by the next norm',
    'fetch': 'weights of a denoising step asked for before the kernel ahead has ended',
}
_asked: set[str] = set()


def ask(ways: Iterable[str]) -> None:
    """Take these ways besides the stored ones, in this process; for the bench and for tests."""
    wanted = set(ways)
    if wanted - set(WAYS):
        raise ValueError(f'no such ways: {", ".join(sorted(wanted - set(WAYS)))}; known are '
                         + ', '.join(WAYS))
    _asked.clear()
    _asked.update(wanted)


def asked() -> list[str]:
    """What `ask` was told, for a process that is to do the same."""
    return sorted(_asked)


def ways(chip: Chip) -> frozenset[str]:
    """Ways that plans for a chip take: the stored ones, which were measured, and asked ones."""
    return frozenset(stored().get(chip.name, {}).get('ways', ())) | _asked


def early(kind: str, chip: Chip, family: str = '') -> Early:
    """What was measured to be faster for networks of a kind ('w8a8', 'float').

    A family has an entry of its own ('groot_n15 w8a8') where it differs.
    """
    entries = stored().get(chip.name, {}).get('early', {})
    graphs = entries.get(f'{family} {kind}', entries.get(kind, ()))
    return Early('prefix' in graphs, 'loop' in graphs)
