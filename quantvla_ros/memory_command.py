# SPDX-License-Identifier: Apache-2.0
"""`quantvla memory`: the papers' memory tables recounted, what is really held, and measured.

Counting allocates nothing. `--measure` writes a full-size random checkpoint in its real format
into a scratch folder, quantizes it streamed and serves one chunk, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from quantvla_ros.bench.full_checkpoint import CONTRACTS, checkpoint_bytes, write_checkpoint
from quantvla_ros.policies.full_size import (
    MAKERS,
    NEVER_BUILT,
    STEPS,
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
    PUBLISHED,
    RESIDUALS,
    find_plan,
    held,
    published_counts,
)
from quantvla_ros.quant.recipe_memory import recipe_memory
from quantvla_ros.quant.recipes import RECIPES, find_recipe
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.sites import PolicySites
from quantvla_ros.resources import peak_bytes

GOAL_GIB = {'pi05': 2.1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add('family', choices=sorted(MAKERS), help='which published network')
    add('--recipe', default='', help=f'a recipe ({", ".join(RECIPES)}) or a layout '
        f'({", ".join(PLANS)}); all if empty')
    add('--precision', default='w4a8', help='of recipes and of --measure; default: w4a8')
    add('--measure', action='store_true', help='serve one chunk of a full-size checkpoint')
    add('--folder', default='', help='with --measure: of this folder, not of random weights')
    add('--contract', default='', help='with --folder: the robot to serve; default: LIBERO')
    add('--scratch', default='', help='with --measure: where 10 GB may lie for a while')


def run(args: argparse.Namespace) -> int:
    """Print the report, or measure."""
    if args.measure:
        return measure(args)
    recipes = [args.recipe] if args.recipe in RECIPES else [] if args.recipe else list(RECIPES)
    plans = list(PLANS) if not args.recipe else [args.recipe] if args.recipe in PLANS else []
    if not recipes and not plans:
        raise ValueError(f'recipe {args.recipe!r} is unknown; known are '
                         f'{", ".join([*RECIPES, *PLANS])}')
    model = full_size(args.family)
    whole = policy_sites(model)
    print(f'{args.family}: {parameters(model) / 1e6:.1f} M parameters without unused heads, '
          f'{parameters(model) * 2 / GIB:.3f} GiB in bfloat16')
    _print_published(args.family, whole)
    _print_savings(args.family)
    if recipes:
        _print_recipes(args.family, recipes, args.precision, whole)
    if plans:
        rows = [held(served(args.family)[0], served(args.family)[1], find_plan(p)) for p in plans]
        rows.append(held(whole, extras(args.family, model, whole), PUBLISHED))
        print('\nheld by the model as it is served, GiB by part:')
        _print_held([*plans, PUBLISHED.name], rows)
    print(f'beside the model, this interpreter with torch: {peak_bytes() / MIB:.0f} MiB (measured '
          'here); activations of a chunk: a few MiB in the expert, tens in the prefix')
    return 0


def _print_published(family: str, sites: PolicySites) -> None:
    counts = published_counts(family, sites)
    if not counts:
        return
    print('\nas the papers count (linears of backbone and action layers only), GiB:')
    for count in counts:
        seen = '' if count.published is None else (
            f'   paper {count.published / GIB:.3f}   residual {count.residual:+.3f}')
        print(f'  {count.name:28s} {count.counted / GIB:8.4f}{seen}')
    print(f'  {RESIDUALS[family]}')


def _print_savings(family: str) -> None:
    print('\nexact savings (same chunk, proven by tests):')
    for name, number in NEVER_BUILT.get(family, {}).items():
        print(f'  {name:52s} {number * 2 / MIB:9.1f} MiB')
    _, rest, found = served(family)
    for saving in found:
        print(f'  {saving.name:52s} {saving.bytes() / MIB:9.1f} MiB'
              f' {saving.operations * 2 / 1e9:9.1f} GFLOP a chunk')
    words = 2 * rest.embedding[0] * rest.embedding[1]
    print(f'  {"table of words, read row by row from disk":52s} {words / MIB:9.1f} MiB')


def _print_recipes(family: str, names: list[str], precision: str, whole: PolicySites) -> None:
    sites, rest, _ = served(family)
    print(f'\nrecipes at {precision}, GiB:')
    print(f'  {"":14s}{"as papers count":>17s}{"held in all":>14s}')
    for name in names:
        found = recipe_memory(family, find_recipe(name), parse_scheme(precision), whole, sites,
                              rest, STEPS[family])
        print(f'  {name:14s}{found.papers / GIB:17.3f}{found.total / GIB:14.3f}')
        if len(names) == 1:
            for part, size in found.held.items():
                print(f'      {part:30s} {size / GIB:8.3f}')


def _print_held(names: list[str], rows: list[dict[str, int]]) -> None:
    parts = list(dict.fromkeys(part for row in rows for part in row))
    print('  ' + ' ' * 28 + ''.join(f'{name:>14s}' for name in names))
    for part in parts:
        print(f'  {part:28s}' + ''.join(f'{row.get(part, 0) / GIB:14.3f}' for row in rows))
    print(f'  {"in all":28s}' + ''.join(f'{sum(row.values()) / GIB:14.3f}' for row in rows))


def measure(args: argparse.Namespace) -> int:
    """Quantize and serve in child processes; print what each held at most."""
    contract = args.contract or CONTRACTS.get(args.family, '')
    if not contract:
        raise ValueError(f'{args.family} cannot be measured; {", ".join(CONTRACTS)} can')
    if args.folder:
        return _measured(args, Path(args.folder), contract)
    with tempfile.TemporaryDirectory(dir=args.scratch or None) as place:
        print(f'writing a random {args.family} of {checkpoint_bytes(args.family) / 1e9:.1f} GB '
              f'into {place}', flush=True)
        write_checkpoint(args.family, Path(place))
        return _measured(args, Path(place), contract)


def _measured(args: argparse.Namespace, folder: Path, contract: str) -> int:
    python = [sys.executable, '-m']
    with tempfile.TemporaryDirectory(dir=args.scratch or None) as place:
        artifact = f'{place}/{args.precision}'
        subprocess.run([*python, 'quantvla_ros', 'quantize', str(folder), '--recipe', 'rtn',
                        '--precision', args.precision, '--out', artifact], check=True)
        done = subprocess.run([*python, 'quantvla_ros.policies.measured', str(folder), contract,
                               artifact], check=True, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.stdout.strip().split('\n')[-1])
    peak = figures['peak_bytes'] / GIB
    print(f'served one chunk at {args.precision}: peak of the whole process {peak:.2f} GiB '
          f'(imports {figures["imports_bytes"] / GIB:.2f}, loaded '
          f'{figures["loaded_bytes"] / GIB:.2f}); loading {figures["loaded_s"]:.0f} s, chunk '
          f'{figures["chunk_s"]:.0f} s')
    goal = GOAL_GIB.get(args.family, 0.0)
    if goal:
        print(f'goal: at most {goal} GiB held in all: {"met" if peak <= goal else "missed"}')
    return int(bool(goal) and peak > goal)
