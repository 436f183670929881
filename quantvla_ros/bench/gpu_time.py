# SPDX-License-Identifier: Apache-2.0
"""Time device work honestly: events around graph replays, buffers that rotate past the cache.

Without a GPU everything runs once under the interpreter, and its times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
BEYOND_CACHE = 256 << 20  # bytes that rotate: several times the largest second-level cache
COPIES = 128
REPLAYS = 20


class Deadline:
    """Seconds that are left of a run; what does not fit is named and left out."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left_s(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()


@dataclass
class Bench:
    """What every section shares: the device, how often to repeat, when to end, what was found."""

    device: torch.device
    dry: bool
    quick: bool
    deadline: Deadline
    thorough: bool = False  # sections that were asked for by name leave nothing out
    families: tuple[str, ...] = ()  # networks to run; all where none is named
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Type of models: what the interpreter multiplies rightly, where there is no card."""
        return torch.float32 if self.dry else torch.bfloat16


def copies(bytes_each: int, bench: Bench) -> int:
    """How many sets of buffers rotate."""
    if bench.dry:
        return 1
    return max(1, min(COPIES, -(-BEYOND_CACHE // max(1, bytes_each))))


def microseconds(runs: Sequence[Run], bench: Bench) -> float:
    """Median time of one run, all of them captured into one graph that is replayed.

    Raises what a run raises; a run that cannot be captured is timed launch by launch.
    """
    if bench.dry:
        start = time.perf_counter()
        runs[0]()
        return (time.perf_counter() - start) * 1e6
    rounds = max(1, 20 // len(runs))
    for run in runs[:4]:  # a peer may compile for each of its few layers
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    return 1e3 * milliseconds(graph.replay, REPLAYS) / (rounds * len(runs))


def milliseconds(run: Run, repeats: int) -> float:
    """Median time of device work between two events."""
    run()
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
             for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in pairs)
    return times[len(times) // 2]


def tried(run: Callable[[], Any]) -> tuple[Any, str]:
    """Run something that this machine may lack: its result, or why there is none."""
    try:
        return run(), ''
    except Exception as error:  # a border: a peer may fail in any way, and is then named
        if 'CUDA error' in str(error):
            raise
        text = str(error).strip() or type(error).__name__
        return None, text.splitlines()[0][:160]


def ceilings(bench: Bench) -> dict[str, float]:
    """What this card reaches: bytes a second of a copy, operations a second of its products."""
    if bench.dry:
        return {'copy': 1e9, 'bfloat16': 1e9, 'int8': 1e9}
    found: dict[str, float] = {}
    big = torch.randn(1 << 28, device=bench.device)
    other = torch.empty_like(big)
    found['copy'] = 2 * big.numel() * 4 / milliseconds(partial(other.copy_, big), 20) * 1e3
    del big, other
    n = 8192
    operations = 2.0 * n**3
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    found['bfloat16'] = operations / milliseconds(partial(torch.mm, a, b), 20) * 1e3
    q, w = (torch.randint(-127, 128, (n, n), device=bench.device, dtype=torch.int8)
            for _ in range(2))
    found['_int_mm'] = operations / milliseconds(partial(torch._int_mm, q, w.t()), 20) * 1e3
    # Hopper multiplies both types of 8 bits alike, and no library reaches that with integers
    eight, one = torch.float8_e4m3fn, torch.ones((), device=bench.device)
    run = partial(torch._scaled_mm, a.to(eight), b.to(eight).t(), scale_a=one, scale_b=one,
                  out_dtype=torch.bfloat16)
    took, why = tried(partial(milliseconds, run, 20))
    found['fp8'] = 0.0 if why else operations / took * 1e3
    found['int8'] = max(found['_int_mm'], found['fp8'])
    return found


def card(bench: Bench) -> dict[str, Any]:
    """Name and size of the card, and the versions of what drives it."""
    found: dict[str, Any] = {'torch': torch.__version__, 'dry': bench.dry}
    if bench.dry:
        return {**found, 'name': "no card: Triton's interpreter, times mean nothing"}
    import triton

    p = torch.cuda.get_device_properties(bench.device)
    return {**found, 'name': p.name, 'capability': f'sm_{p.major}{p.minor}',
            'processors': p.multi_processor_count, 'memory_mib': p.total_memory >> 20,
            'cuda': torch.version.cuda, 'triton': triton.__version__}


def relative(seen: Tensor, wanted: Tensor) -> float:
    """|seen - wanted| / |wanted|; infinite where anything is not finite."""
    difference = (seen.double() - wanted.double()).norm() / wanted.double().norm()
    return float(difference) if bool(torch.isfinite(difference)) else float('inf')
