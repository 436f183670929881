# SPDX-License-Identifier: Apache-2.0
"""`quantvla memory`: the papers' memory tables recounted, and what is really held, by part."""

from __future__ import annotations

import argparse
import resource

from quantvla_ros.policies.full_size import (
    MAKERS,
    NEVER_BUILT,
    extras,
    full_size,
    parameters,
    served,
)
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.quant.memory import (
    GIB,
    MIB,
    PLANS,
    RESIDUALS,
    find_plan,
    held,
    published_counts,
)

GOAL_GIB = {'pi05': 2.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument('family', choices=sorted(MAKERS), help='which published network')
    parser.add_argument('--recipe', default='', help=f'one of {", ".join(PLANS)}; all if empty')


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    names = [args.recipe] if args.recipe else list(PLANS)
    plans = [find_plan(name) for name in names]
    model = full_size(args.family)
    whole = policy_sites(model)
    print(f'{args.family}: {parameters(model) / 1e6:.1f} M parameters without unused heads, '
          f'{parameters(model) * 2 / GIB:.3f} GiB in bfloat16')
    _print_published(args.family, whole)
    sites, rest, found = served(args.family)
    print('\nexact savings (same chunk, proven by tests):')
    for name, number in NEVER_BUILT.get(args.family, {}).items():
        print(f'  {name:52s} {number * 2 / MIB:9.1f} MiB')
    for saving in found:
        print(f'  {saving.name:52s} {saving.bytes() / MIB:9.1f} MiB'
              f' {saving.operations * 2 / 1e9:9.1f} GFLOP a chunk')
    print('\nheld by the model as it is served, GiB by part:')
    rows = [held(sites, rest, plan) for plan in plans]
    rows.append(held(whole, extras(args.family, model, whole), PLANS['float']))
    _print_held([*names, 'as published'], rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f'beside the model, this interpreter with torch: {peak / MIB:.0f} MiB (measured here); '
          'activations of a chunk: a few MiB in the expert, tens in the prefix')
    goal = GOAL_GIB.get(args.family)
    if goal:
        totals = {name: sum(row.values()) / GIB for name, row in zip(names, rows, strict=False)}
        best = min(totals, key=lambda name: totals[name])
        print(f'goal: at most {goal} GiB held in all; {best} takes {totals[best]:.2f} GiB, '
              f'{totals[best] + peak / GIB:.2f} GiB with the interpreter')
    return 0


def _print_published(family: str, sites: object) -> None:
    counts = published_counts(family, sites)  # type: ignore[arg-type]
    if not counts:
        return
    print('\nas the papers count (linears of backbone and action layers only), GiB:')
    for count in counts:
        seen = '' if count.published is None else (
            f'   paper {count.published / GIB:.3f}   residual {count.residual:+.3f}')
        print(f'  {count.name:28s} {count.counted / GIB:8.4f}{seen}')
    print(f'  {RESIDUALS[family]}')


def _print_held(names: list[str], rows: list[dict[str, int]]) -> None:
    parts = list(dict.fromkeys(part for row in rows for part in row))
    print('  ' + ' ' * 28 + ''.join(f'{name:>14s}' for name in names))
    for part in parts:
        print(f'  {part:28s}' + ''.join(f'{row.get(part, 0) / GIB:14.3f}' for row in rows))
    print(f'  {"in all":28s}' + ''.join(f'{sum(row.values()) / GIB:14.3f}' for row in rows))
