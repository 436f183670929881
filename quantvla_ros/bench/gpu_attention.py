# SPDX-License-Identifier: Apache-2.0
"""Attention as the models use it, at every number of splits, against the vendor's.

The vendor's is told neither a length nor heads that share keys: it attends to all keys, heads of
one group standing side by side as further queries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from quantvla_ros.bench.gpu_time import Bench, Run, microseconds, tried
from quantvla_ros.kernels.cuda import launch, launch_attention
from quantvla_ros.kernels.cuda.launch import Take, Tokens, chip_of
from quantvla_ros.kernels.cuda.launch_attention import Keys, Parts, Split, run_attend, run_join
from quantvla_ros.kernels.cuda.tiles import Chip

# name -> (queries, keys, heads, key-value heads, width of a head)
CASES = {
    'pi0.5, 50 actions': (50, 1018, 8, 1, 256), 'pi0.5, 10 actions': (10, 978, 8, 1, 256),
    'pi0.5, prefix': (968, 968, 8, 1, 256), 'GR00T, context': (49, 560, 32, 32, 48),
    'GR00T, itself': (49, 49, 32, 32, 48),
}
DRY = {'tiny': (3, 40, 4, 1, 32)}


def runner(case: tuple[int, int, int, int, int], split: Split, device: torch.device,
           dtype: torch.dtype, *, early: bool = False, ahead: bool = False) -> Run:
    """One attention and, where it is split, its join into int8 tokens. ahead: compile only."""
    tokens, total, heads, groups, width = case
    q = torch.randn(tokens, heads * width, device=device).to(dtype)
    k, v = (torch.randn(total, groups * width, device=device).to(dtype)
            for _ in range(2))
    length = torch.tensor([total], dtype=torch.int32, device=device)
    keys = Keys(k, v, groups, width, 0, length, total)
    take = Take(8, heads * width)
    out = Tokens(torch.empty(tokens, heads * width, dtype=torch.int8, device=device),
                 torch.empty(tokens, device=device))
    parts = Parts.make(split.parts, tokens, heads, width, device, dtype)
    seen = torch.empty_like(q)

    def run() -> None:
        if split.parts == 1:
            run_attend(q, keys, heads, seen, split, pdl=early, ahead=ahead)
            launch.make_tokens(seen, heads * width, take, out, pdl=early, ahead=ahead)
        else:
            run_attend(q, keys, heads, parts, split, pdl=early, ahead=ahead)
            run_join(parts, split.parts, width, take, out, dtype, pdl=early, ahead=ahead)

    return run


def few(case: tuple[int, int, int, int, int]) -> bool:
    """Whether it is one of a denoising step."""
    tokens, _, heads, groups, _ = case
    return tokens * heads // groups <= 1024


def measure(case: tuple[int, int, int, int, int], split: Split, bench: Bench,
            *, early: bool = False) -> float:
    """Microseconds of attention up to int8 tokens; early: as launched in a denoising loop."""
    return microseconds([runner(case, split, bench.device, bench.dtype, early=early)], bench)


def candidates(case: tuple[int, int, int, int, int], chip: Chip) -> list[Split]:
    """Splits worth trying."""
    tokens, total, heads, groups, width = case
    rows = tokens * heads // groups
    found = []
    small = few(case)
    for bq, bs, stages in product((16, 32, 64) if small else (64, 128), (32, 64), (1, 2, 3)):
        warps = 8 if bq == 128 else 4
        # sums and logits of a thread stand in registers; more than these spill
        if bq * (max(16, width) + bs) > 160 * 32 * warps:
            continue
        if 2 * bs * max(16, width) * 2 * stages > chip.shared:
            continue
        programs = -(-rows // bq) * groups
        for parts in (1, 2, 4, 8, 16, 32) if small else (1,):
            filled = programs * parts / chip.processors
            if parts > 1 and (filled > 2.2 or total // parts < bs):
                continue
            if small and filled < 0.4 and parts < 8:
                continue
            found.append(Split(bq, bs, parts, warps, stages))
    return found


def vendor(case: tuple[int, int, int, int, int], bench: Bench) -> float:
    """Microseconds of scaled_dot_product_attention."""
    tokens, total, heads, groups, width = case
    q = torch.randn(1, groups, heads // groups * tokens, width, device=bench.device)
    k, v = (torch.randn(1, groups, total, width, device=bench.device).to(bench.dtype)
            for _ in range(2))
    call = partial(F.scaled_dot_product_attention, q.to(bench.dtype), k, v)
    return microseconds([call], bench)


def table(bench: Bench) -> dict[str, Any]:
    """Print and return every case."""
    found: dict[str, Any] = {}
    for name, case in (DRY if bench.dry else CASES).items():
        tokens, total, heads, groups, width = case
        chosen = launch_attention.choose_split(tokens * heads // groups, total, groups, width,
                                               chip_of(bench.device))
        rows: dict[str, Any] = {'library': vendor(case, bench), 'chosen': chosen.parts}
        for parts in (1, 2, 4, 8, 16):
            if parts == 1 or total // parts >= 32:
                value, why = tried(partial(measure, case, replace(chosen, parts=parts), bench))
                rows[str(parts)] = why or value
        found[name] = rows
        cells = '  '.join(f'{key}: {value:.2f}' if isinstance(value, float) else f'{key}: {value}'
                          for key, value in rows.items())
        print(f'  {name:<20} microseconds by splits  {cells}', flush=True)
    return found
