# SPDX-License-Identifier: Apache-2.0
"""A roofline ESTIMATE for boards that are not here: no kernel runs, nothing is measured.

Every layer takes the longer of its bytes over the bandwidth and its operations over the rate.
Attention, norms and launches are left out, so a real chunk takes longer. Bandwidths and rates are
assumptions from memory of the vendor's descriptions; they were not checked against data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantvla_ros.policies import savings
from quantvla_ros.policies.full_size import STEPS, TOKENS, full_size
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.layout import EVERYTHING


@dataclass(frozen=True)
class Board:
    """Assumed: bytes a second from memory, dense operations a second at two widths."""

    name: str
    bandwidth: float
    bfloat16: float
    int8: float


BOARDS = (
    Board('Jetson AGX Orin 64 GB', 204.8e9, 42e12, 85e12),
    Board('Jetson AGX Orin 32 GB', 204.8e9, 27e12, 54e12),
    Board('Jetson AGX Thor', 273e9, 250e12, 500e12),
)
PRECISIONS = {'bfloat16': (2.0, False), 'w8a8': (1.0, True), 'w4a8': (0.5, True)}
ACTIONS = {'pi05': (50, 10), 'groot_n15': (49,)}
CAMERAS = {'pi05': 3, 'groot_n15': 2}


@dataclass(frozen=True)
class Product:
    """One linear: tokens, weights, how often it runs in a chunk."""

    tokens: int
    weights: int
    times: int


def products(family: str, actions: int, steps: int) -> list[Product]:
    """Every linear of a served model that runs in a chunk."""
    model = full_size(family)
    savings.drop_unused(model, steps, TOKENS[family])
    seen = CAMERAS[family] * model.config.vision.tokens
    found = []
    for site in policy_sites(model).in_groups(EVERYTHING):
        tokens, times = TOKENS[family], 1
        if site.group in ('vision', 'projector') and not site.name.startswith('context'):
            tokens = seen
        if site.group.startswith('action'):
            tokens, times = actions, steps
            parts = site.name.split('.')
            cross = family == 'groot_n15' and int(parts[1]) % 2 == 0
            if cross and parts[-1] in ('k_proj', 'v_proj'):  # made once, over the context
                tokens, times = TOKENS[family], 1
        found.append(Product(tokens, site.out_features * site.in_features, times))
    return found


def seconds(found: list[Product], board: Board, precision: str) -> float:
    """Shortest time of all products, one after the other."""
    width, integer = PRECISIONS[precision]
    rate = board.int8 if integer else board.bfloat16
    return sum(
        p.times * max(p.weights * width / board.bandwidth, 2.0 * p.tokens * p.weights / rate)
        for p in found)


def estimate() -> dict[str, Any]:
    """Print the table and return it."""
    print('  ESTIMATE, not measured: assumed bandwidths and rates, products alone, shortest time')
    rows: dict[str, Any] = {}
    for board in BOARDS:
        print(f'  {board.name}: assumed {board.bandwidth / 1e9:.0f} GB/s, '
              f'{board.bfloat16 / 1e12:.0f} TFLOP/s bfloat16, {board.int8 / 1e12:.0f} TOP/s int8')
        for family, counts in ACTIONS.items():
            for actions in counts:
                found = products(family, actions, STEPS[family])
                times = {p: 1e3 * seconds(found, board, p) for p in PRECISIONS}
                rows[f'{board.name}, {family}, {actions} action tokens'] = times
                text = '  '.join(f'{name} {ms:6.1f} ms ({times["bfloat16"] / ms:.2f}x)'
                                 for name, ms in times.items())
                print(f'    {family:<10} {STEPS[family]} steps of {actions:>2} tokens   {text}')
    return rows
