# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench recipes`: every recipe at every precision, on the policy and its stress twin.

Error of the actions on frames that calibrated nothing, against the same noise in float; beside
it what another noise seed and fewer denoising steps do, and the bytes of all linear layers.
Layers are simulated (quant/simulate.py), so it runs on a GPU too. Resumes where it was stopped.
Success comes from reports of `quantvla eval`, where given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantvla_ros.bench import recipes_report as report
from quantvla_ros.bench.recipes_cells import Cells, Key, Row, fingerprint
from quantvla_ros.bench.recipes_subject import FLOOR, Subject
from quantvla_ros.calibration.frames_file import Frames, read_all
from quantvla_ros.calibration.stress import channel_peaks
from quantvla_ros.calibration.stress_twin import stress
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.quant.layout import ACTION, BACKBONE, FULL_STACK, SELECTIVE
from quantvla_ros.quant.literal import LITERALS
from quantvla_ros.quant.recipes import RECIPES, Matching, Recipe, find_recipe, variant
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.resources import share_path

PRECISIONS = 'w8a8,w4a8,w4a4,w3a4,w3a3'
MATRICES = {
    'mean_mrad': 'Mean joint difference to float, mrad',
    'few_mrad': 'The same at 2 denoising steps, against float at 2 steps, mrad',
    'nbytes': 'Bytes of all linear layers, MB',
}
TWIN_FRAMES = 16  # that tell which channels of the twin shall stand out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench recipes`."""
    add = parser.add_argument
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--frames', type=Path, required=True, nargs='+',
        help='files made by `quantvla frames`')
    add('--limit', type=int, default=128,
        help='frames to use: every second episode calibrates, the others judge')
    add('--precisions', default=PRECISIONS, help=f'default: {PRECISIONS}')
    add('--recipes', default='', help='default: all; also the literal forms '
        + ', '.join(LITERALS))
    add('--models', default='policy,twin', help='policy, twin or both')
    add('--ablation', default='', metavar='PRECISION',
        help="the ablation of QuantVLA's layout and matching at this precision, instead")
    add('--blockwise', action='store_true',
        help='calibrate block by block instead of in one pass: slower and better')
    add('--device', default='cpu', help='where the networks run: cpu or cuda')
    add('--threads', type=int, default=0)
    add('--seed', type=int, default=0)
    add('--eval', type=Path, action='append', default=[], metavar='REPORT',
        help='report.json of `quantvla eval`, to fill the success column')
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


def subject(args: argparse.Namespace, frames: Frames, name: str) -> Subject:
    """Make the policy, or its twin from it."""
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    contract = load_contract(read_settings(model).contract)
    fitted, held = frames.halves()
    if not held:
        raise ValueError('at least two frames are needed: one calibrates, one judges')
    settings = PolicySettings(device=args.device, threads=args.threads)
    checkpoint, net = read_checkpoint(model)
    if name == 'twin':
        whole = LiberoVla.around(contract, settings, checkpoint, net)
        peaks = channel_peaks(whole, fitted[:: max(1, len(fitted) // TWIN_FRAMES)][:TWIN_FRAMES])
        net = net.cpu()
        stress(net, peaks, args.seed)
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())  # as a file would give it back
    return Subject(name, contract, settings, checkpoint, net, (fitted, held), args.seed)


class Cell(NamedTuple):
    """A measurement that may have been made before: its key, who makes it, and how."""

    recipe: str
    precision: str
    made_by: str
    measure: Callable[[Subject], Row]


def plan(args: argparse.Namespace) -> Iterator[Cell]:
    """Every measurement of one subject, float rows aside."""
    def by(recipe: Recipe, precision: str) -> Cell:
        measure = partial(Subject.measure, recipe=recipe, precision=precision,
                          blockwise=args.blockwise)
        return Cell(recipe.name, precision, fingerprint(recipe), measure)

    if args.ablation:
        yield from (by(recipe, args.ablation) for recipe in ablation())
        return
    names = args.recipes.split(',') if args.recipes else [*RECIPES, *LITERALS]
    for precision in args.precisions.split(','):
        for name in names:
            if name in LITERALS:
                measure = partial(Subject.measure_literal, name=name, precision=precision)
                yield Cell(name, precision, fingerprint(LITERALS[name]), measure)
            else:
                yield by(find_recipe(name), precision)


def settings_of(args: argparse.Namespace, frames: Frames) -> dict[str, Any]:
    """What must be the same for two cells to stand in one table."""
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    return {
        'frames': frames.sha256, 'count': len(frames), 'blockwise': args.blockwise,
        'seed': args.seed, 'checkpoint': read_settings(model).sha256,
    }


def run(args: argparse.Namespace) -> int:
    """Measure what is not there yet, print each row as it comes and the whole table at the end."""
    for precision in (args.ablation or args.precisions).split(','):
        parse_scheme(precision)
    names, cells, redo = models(args), list(plan(args)), set(args.redo.split(','))
    success = report.read_success(args.eval)
    frames = read_all(args.frames, args.limit)
    done = Cells(args.json, settings_of(args, frames))
    shown: list[Key] = []

    def add(row: Row) -> None:
        done.add(row)
        print(f'{row.model:7s} {row.precision:5s} {row.recipe:28s} {row.mean_mrad:8.3f} mrad  '
              f'{row.nbytes / 1e6:6.2f} MB  {row.seconds:5.0f} s', flush=True)

    with torch.no_grad():
        for name in names:
            one: Subject | None = None
            if (name, FLOOR, 'float') not in done.rows and not args.show:
                one = subject(args, frames, name)
                for row in one.float_rows():
                    add(row)
            shown += [key for key in done.rows if key[0] == name and key[2] == 'float']
            for cell in cells:
                key = (name, cell.recipe, cell.precision)
                shown.append(key)
                found = done.find(key, cell.made_by) is not None and cell.recipe not in redo
                if not found and not args.show:
                    one = one or subject(args, frames, name)
                    add(cell.measure(one))
    rows = [asdict(done.rows[key]) for key in shown if key in done.rows]
    print('\n' + report.table(rows, success))
    for column, title in MATRICES.items():
        print(f'{title}\n\n{report.matrix(rows, column, floats=column == "mean_mrad")}')
    return 0
