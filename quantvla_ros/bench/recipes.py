# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench recipes`: every recipe at every precision, on the policy and its stress twin.

Error of the actions on frames that calibrated nothing, against the same noise in float; beside
it what another noise seed and fewer denoising steps do, and the bytes of all linear layers.
Layers are simulated (quant/simulate.py), so it runs on a GPU too. Cells are independent, so that
they are spread over processes (recipes_work.py). Resumes where it was stopped. Success comes from
reports of `quantvla eval`, where given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from quantvla_ros.bench import recipes_report as report
from quantvla_ros.bench.recipes_cells import Cells, Key, Row, fingerprint
from quantvla_ros.bench.recipes_subject import FLOOR, Setting, Subject
from quantvla_ros.bench.recipes_work import Cell, Wanted, measure_all
from quantvla_ros.calibration.frames_file import Frames, read_all
from quantvla_ros.policies.libero_checkpoint import read_settings
from quantvla_ros.quant.layout import ACTION, BACKBONE, FULL_STACK, SELECTIVE
from quantvla_ros.quant.literal import LITERALS
from quantvla_ros.quant.recipes import RECIPES, Matching, Recipe, find_recipe, variant
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.resources import share_path

PRECISIONS = 'w8a8,w4a8,w4a4,w3a4,w3a3'

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench recipes`."""
    add = parser.add_argument
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--frames', type=Path, default=[], nargs='+', help='files made by `quantvla frames`')
    add('--limit', type=int, default=128,
        help='frames to use: every second episode calibrates, the others judge')
    add('--precisions', default=PRECISIONS, help=f'default: {PRECISIONS}')
    add('--recipes', default='', help='default: all; also the literal forms '
        + ', '.join(LITERALS))
    add('--models', default='policy,twin', help='policy, twin or both')
    add('--ablation', default='', metavar='PRECISION',
        help="also the ablation of QuantVLA's layout and matching at this precision; alone with "
        "--precisions ''")
    add('--blockwise', action='store_true',
        help='calibrate block by block instead of in one pass: slower and better')
    add('--device', default='cpu', help='where the networks run: cpu or cuda')
    add('--workers', type=int, default=1,
        help='processes that measure cells side by side, with several GPUs by turns')
    add('--threads', type=int, default=0,
        help='of each process; default: 1 with several workers, else its own choice')
    add('--seed', type=int, default=0)
    add('--eval', action='append', default=[], metavar='MODEL=REPORT',
        help='report.json of `quantvla eval` on policy or twin, for the table of success')
    add('--write', type=Path, default=None, metavar='PAGE',
        help='put the tables into a page, between its markers')
    add('--json', type=Path, default=None,
        help='keep every cell here as it is done; cells that it holds are not measured again')
    add('--show', action='store_true', help='print what --json holds and measure nothing')
    add('--redo', default='', metavar='RECIPES', help='measure these again all the same')


def ablation() -> list[Recipe]:
    """QuantVLA's layouts without and with matching, and the matchings one by one."""
    base = RECIPES['quantvla']
    layouts = {'backbone': BACKBONE, 'action': ACTION, 'full': FULL_STACK,
               'selective': SELECTIVE}
    found = []
    for name, groups in layouts.items():
        found.append(variant(base, name, groups=groups, matching=None))
        found.append(variant(base, f'{name}+alpha+beta', groups=groups))
    matchings = {
        'alpha': Matching(beta=False),
        'beta': Matching(alpha=False),
        'least squares': Matching(fit='least_squares'),
        'least squares, checked': Matching(fit='least_squares', check=True),
    }
    for name, matching in matchings.items():
        for layout in ('selective', 'full'):
            found.append(variant(base, f'{layout}+{name}', groups=layouts[layout],
                                 matching=matching))
    return found


def models(args: argparse.Namespace) -> list[str]:
    """Names of the subjects that are asked for."""
    names = args.models.split(',')
    unknown = sorted(set(names) - {'policy', 'twin'})
    if unknown:
        raise ValueError(f'--models {", ".join(unknown)}: known are policy and twin')
    return names


def plan(args: argparse.Namespace) -> list[Cell]:
    """Every measurement of one subject, float rows aside."""
    def by(recipe: Recipe, precision: str) -> Cell:
        measure = partial(Subject.measure, recipe=recipe, precision=precision,
                          blockwise=args.blockwise)
        return Cell(recipe.name, precision, fingerprint(recipe), measure, recipe.needs_frames)

    cells = []
    names = args.recipes.split(',') if args.recipes else [*RECIPES, *LITERALS]
    for precision in filter(None, args.precisions.split(',')):
        for name in names:
            if name in LITERALS:
                measure = partial(Subject.measure_literal, name=name, precision=precision)
                cells.append(Cell(name, precision, fingerprint(LITERALS[name]), measure))
            else:
                cells.append(by(find_recipe(name), precision))
    if args.ablation:
        cells += [by(recipe, args.ablation) for recipe in ablation()]
    return cells


def setting_of(args: argparse.Namespace) -> Setting:
    """What every process must know. Raises ValueError on options that do not fit together."""
    if args.workers < 1:
        raise ValueError(f'--workers {args.workers}: at least one process computes')
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    threads = args.threads or (1 if args.workers > 1 else 0)
    return Setting(model, tuple(args.frames), args.limit, args.device, threads, args.seed)


def reports(args: argparse.Namespace) -> dict[str, Path]:
    """Reports of evaluations by model."""
    named = [text.partition('=') for text in args.eval]
    wrong = [name for name, _, path in named if not path]
    if wrong:
        raise ValueError(f'--eval {wrong[0]}: expected policy=REPORT or twin=REPORT')
    return {name: Path(path) for name, _, path in named}


def comparable(setting: Setting, frames: Frames, *, blockwise: bool) -> dict[str, Any]:
    """What must be the same for two cells to stand in one table."""
    return {
        'frames': frames.sha256, 'count': len(frames), 'blockwise': blockwise,
        'seed': setting.seed, 'checkpoint': read_settings(setting.model).sha256,
    }


def missing(
    args: argparse.Namespace, names: Sequence[str], cells: Sequence[Cell], done: Cells
) -> dict[str, Wanted]:
    """What is not measured yet, by subject."""
    redo, found = set(args.redo.split(',')), {}
    for name in names:
        left = [
            cell for cell in cells if cell.recipe in redo
            or done.find((name, cell.recipe, cell.precision), cell.made_by) is None
        ]
        floats = (name, FLOOR, 'float') not in done.rows
        if left or floats:
            found[name] = Wanted(left, floats=floats)
    return found


def measure_missing(
    args: argparse.Namespace, names: Sequence[str], cells: Sequence[Cell], done: Cells
) -> list[str]:
    """Measure what is not there yet, each row stored as it comes; returns what failed."""
    failed, wanted = [], missing(args, names, cells, done)
    say = partial(print, flush=True)
    for found in measure_all(wanted, setting_of(args), args.workers, say) if wanted else ():
        if isinstance(found, Row):
            done.add(found)
        else:
            failed.append(found)
    return failed


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, then print every table."""
    for precision in filter(None, f'{args.ablation},{args.precisions}'.split(',')):
        parse_scheme(precision)
    names, cells, setting = models(args), plan(args), setting_of(args)
    evaluated = reports(args)
    if not (args.frames or args.show):
        raise ValueError('name frames with --frames; `quantvla frames` records them')
    frames = read_all(args.frames, args.limit) if args.frames else None
    same = comparable(setting, frames, blockwise=args.blockwise) if frames else {}
    done = Cells(args.json, same)
    failed = [] if args.show else measure_missing(args, names, cells, done)
    shown: list[Key] = []
    for name in names:
        shown += [key for key in done.rows if key[0] == name and key[2] == 'float']
        shown += [(name, cell.recipe, cell.precision) for cell in cells]
        if args.show:
            shown += [key for key in done.rows if key[0] == name and ':' in key[1]]
    rows = [asdict(done.rows[key]) for key in dict.fromkeys(shown) if key in done.rows]
    print('\n' + report.details(rows))
    tables = report.tables(rows, evaluated)
    for name, table in tables.items():
        print(f'\n{name}\n\n{table}')
    if args.write is not None:
        report.write_tables(args.write, tables)
    for name in failed:
        print(f'not measured: {name}')
    return 1 if failed else 0
