# SPDX-License-Identifier: Apache-2.0
"""What the width of a layer's weights costs in time: measured on this machine, kept as a file.

A robot measures its own times; the file says of which machine they are, so that weights can be
quantized elsewhere. Times are of integer layers alone, tokens quantized inside, minima of many
calls. Chooses no width (quant/spend.py does).
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from quantvla_ros.kernels import dispatch, weights
from quantvla_ros.quant.layout import Layout
from quantvla_ros.quant.observe import run_watched
from quantvla_ros.quant.sites import PolicySites
from quantvla_ros.quant.spend import CONTAINERS, units_of

FORMAT = 1
CELL_S = 0.03  # for one shape at one width

Work = Mapping[str, Mapping[int, int]]  # linear -> rows of a call -> calls in one chunk


@dataclass(frozen=True)
class Times:
    """Milliseconds that each unit of layers takes in one chunk, by the width of its weights.

    kernels, threads, machine: what they were measured with.
    """

    ms: Mapping[str, Mapping[int, float]]
    kernels: str
    threads: int
    machine: str

    def equal(self, width: int) -> float:
        """All units at one width."""
        return sum(by_width[CONTAINERS.get(width, width)] for by_width in self.ms.values())

    def write(self, path: Path) -> None:
        """Keep them as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({'format': FORMAT, **asdict(self)}, indent=1) + '\n')


def read_times(path: Path) -> Times:
    """Read what write() wrote. Raises ValueError with a sentence."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; leave --times out to measure this machine')
    try:
        document = json.loads(path.read_text())
        if document.pop('format') != FORMAT:
            raise ValueError(f'this version reads format {FORMAT}')
        ms = {unit: {int(width): float(x) for width, x in by_width.items()}
              for unit, by_width in document.pop('ms').items()}
        found = Times(ms, **document)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} holds no times of layers: {error}') from error
    if not all(math.isfinite(x) and x > 0 for by_width in ms.values() for x in by_width.values()):
        raise ValueError(f'{path} holds a time that is not a positive number')
    return found


def watch_work(net: nn.Module, names: Sequence[str], run: Callable[[], None]) -> Work:
    """Run one chunk and count the calls of every linear, by the tokens of a call."""
    found: dict[str, Counter[int]] = {name: Counter() for name in names}

    def see(name: str, x: torch.Tensor) -> None:
        found[name][x.shape[:-1].numel()] += 1

    run_watched(net, names, see, run)
    return found


def measure_times(sites: PolicySites, layout: Layout, work: Work) -> Times:
    """Time every unit that the layout quantizes, at every width that kernels store.

    Layers of a unit read the same input and run as one product, as in a recorded program.
    Raises ValueError where no kernel can be loaded: the reference's time says nothing.
    """
    if dispatch.library() is None:
        raise ValueError('no integer kernel can be loaded here, so there is nothing to time; '
                         f'build them ({dispatch.REBUILD}) or give the times of the robot')
    found = {}
    names = [name for name, scheme in layout.items() if scheme.act_bits < 16]
    for unit, members in units_of(sites, names).items():
        first = sites.linear(members[0])
        rows = sum(sites.linear(name).out_features for name in members)
        by_width = dict.fromkeys(CONTAINERS.values(), 0.0)
        for tokens, calls in work[members[0]].items():
            cell = layer_ms(first.in_features, rows, tokens, layout[members[0]].act_bits)
            by_width = {width: x + calls * cell[width] for width, x in by_width.items()}
        found[unit] = by_width
    return Times(found, dispatch.path_name(), dispatch.threads(), processor())


@cache
def layer_ms(
    columns: int, rows: int, tokens: int, act_bits: int, seconds: float = CELL_S
) -> dict[int, float]:
    """Time one layer of random integers by width, in turns; milliseconds of a call."""
    x = torch.randn(tokens, columns)
    layers, best = {}, {}
    for width in sorted(set(CONTAINERS.values())):
        low, high = weights.RANGES[width]
        q = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
        packed = weights.pack(q, torch.rand(rows, 1), width, 0)
        layers[width], best[width] = dispatch.prepare(packed, act_bits=act_bits), math.inf
    end = time.perf_counter() + seconds * len(layers)
    while time.perf_counter() < end or math.inf in best.values():
        for width, layer in layers.items():
            for _ in range(3):
                began = time.perf_counter()
                layer(x)
                best[width] = min(best[width], 1e3 * (time.perf_counter() - began))
    return best


def processor() -> str:
    """Name of the processor, as the system tells it."""
    path = Path('/proc/cpuinfo')
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith('model name'):
            return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()
