# SPDX-License-Identifier: Apache-2.0
"""Attention as the models use it, at every number of splits, against the vendor's.

The vendor's is told neither a length nor heads that share keys: it attends to all keys, heads of
one group standing side by side as further queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from quantvla_ros.bench.gpu_time import Bench, Run, microseconds, tried
from quantvla_ros.kernels.cuda import launch, launch_attention
from quantvla_ros.kernels.cuda.launch import Take, Tokens, chip_of
from quantvla_ros.kernels.cuda.launch_attention import Keys, Parts, Split, run_attend, run_join
from quantvla_ros.kernels.cuda.tiles import FEW, Chip


@dataclass(frozen=True)
class Case:
    """Queries over keys, heads of which some share keys, width of a head."""

    family: str
    tokens: int
    keys: int
    heads: int
    groups: int
    width: int
    causal: bool = False

    @property
    def rows(self) -> int:
        """Rows that share keys."""
        return self.tokens * self.heads // self.groups

    @property
    def few(self) -> bool:
        """Whether it is one of a denoising step."""
        return self.tokens <= FEW


CASES = {
    'pi0.5, 50 actions': Case('pi05', 50, 1018, 8, 1, 256),
    'pi0.5, 10 actions': Case('pi05', 10, 978, 8, 1, 256),
    'pi0.5, prefix': Case('pi05', 968, 968, 8, 1, 256),
    'GR00T, to the context': Case('groot_n15', 49, 560, 32, 32, 48),
    'GR00T, to itself': Case('groot_n15', 49, 49, 32, 32, 48),
    'GR00T, backbone': Case('groot_n15', 560, 560, 16, 8, 128, causal=True),
    'GR00T, context layers': Case('groot_n15', 560, 560, 32, 32, 64),
}
DRY = {'tiny': Case('pi05', 3, 40, 4, 1, 32)}


def runner(case: Case, split: Split, device: torch.device, dtype: torch.dtype, *,
           early: bool = False, ahead: bool = False) -> Run:
    """One attention and, where it is split, its join into int8 tokens. ahead: compile only."""
    tokens, total, heads, width = case.tokens, case.keys, case.heads, case.width
    q = torch.randn(tokens, heads * width, device=device).to(dtype)
    k, v = (torch.randn(total, case.groups * width, device=device).to(dtype)
            for _ in range(2))
    length = torch.tensor([total], dtype=torch.int32, device=device)
    keys = Keys(k, v, case.groups, width, 0, length, total)
    take = Take(8, heads * width)
    out = Tokens(torch.empty(tokens, heads * width, dtype=torch.int8, device=device),
                 torch.empty(tokens, device=device))
    parts = Parts.make(split.parts, tokens, heads, width, device, dtype)
    seen = torch.empty_like(q)

    def run() -> None:
        if split.parts == 1:
            run_attend(q, keys, heads, seen, split, causal=case.causal, pdl=early, ahead=ahead)
            launch.make_tokens(seen, heads * width, take, out, pdl=early, ahead=ahead)
        else:
            run_attend(q, keys, heads, parts, split, causal=case.causal, pdl=early,
                       ahead=ahead)
            run_join(parts, split.parts, width, take, out, dtype, pdl=early, ahead=ahead)

    return run


def measure(case: Case, split: Split, bench: Bench, *, early: bool = False) -> float:
    """Microseconds of attention up to int8 tokens; early: as launched in a denoising loop."""
    return microseconds([runner(case, split, bench.device, bench.dtype, early=early)], bench)


def candidates(case: Case, chip: Chip) -> list[Split]:
    """Splits worth trying."""
    width, found, small = case.width, [], case.few
    for bq, bs, stages in product((16, 32, 64) if small else (64, 128), (32, 64), (1, 2, 3)):
        warps = 8 if bq == 128 else 4
        # sums and logits of a thread stand in registers; more than these spill
        if bq * (max(16, width) + bs) > 160 * 32 * warps:
            continue
        if 2 * bs * max(16, width) * 2 * stages > chip.shared:
            continue
        programs = -(-case.rows // bq) * case.groups
        for parts in (1, 2, 4, 8, 16, 32) if small else (1,):
            filled = programs * parts / chip.processors
            if parts > 1 and (filled > 2.2 or case.keys // parts < bs):
                continue
            if small and filled < 0.4 and parts < 8:
                continue
            found.append(Split(bq, bs, parts, warps, stages))
    return found


def vendor(case: Case, bench: Bench) -> float:
    """Microseconds of scaled_dot_product_attention."""
    q = torch.randn(1, case.groups, case.rows, case.width, device=bench.device)
    k, v = (torch.randn(1, case.groups, case.keys, case.width, device=bench.device)
            .to(bench.dtype) for _ in range(2))
    call = partial(F.scaled_dot_product_attention, q.to(bench.dtype), k, v)
    return microseconds([call], bench)


def table(bench: Bench) -> dict[str, Any]:
    """Print and return every case."""
    found: dict[str, Any] = {}
    for name, case in (DRY if bench.dry else CASES).items():
        chosen = launch_attention.choose_split(case.rows, case.keys, case.groups, case.width,
                                               chip_of(bench.device))
        rows: dict[str, Any] = {'library': vendor(case, bench), 'chosen': chosen.parts}
        for parts in (1, 2, 4, 8, 16):
            if parts == 1 or case.keys // parts >= 32:
                value, why = tried(partial(measure, case, replace(chosen, parts=parts), bench))
                rows[str(parts)] = why or value
        found[name] = rows
        cells = '  '.join(f'{key}: {value:.2f}' if isinstance(value, float) else f'{key}: {value}'
                          for key, value in rows.items())
        print(f'  {name:<20} microseconds by splits  {cells}', flush=True)
    return found
