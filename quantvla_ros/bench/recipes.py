# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench recipes`: every recipe at every precision, on the policy and its stress twin.

Error of the actions on frames that calibrated nothing, against the same noise in float; beside
it what another noise seed and fewer denoising steps do, and the bytes of all linear layers.
Layers are simulated (quant/simulate.py), so it runs on a GPU too. Success comes from reports of
`quantvla eval`, where given.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantvla_ros.bench import recipes_report as report
from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.calibration.pipeline import ask_policy, quantize_policy
from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.calibration.stress import channel_peaks
from quantvla_ros.calibration.stress_twin import stress
from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import Checkpoint, read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_vla import LiberoVlaNet
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.convert import Known
from quantvla_ros.quant.layout import ACTION, BACKBONE, FULL_STACK, SELECTIVE, weight_bytes
from quantvla_ros.quant.literal import LITERALS, put_literal
from quantvla_ros.quant.recipes import RECIPES, Matching, Recipe, find_recipe, variant
from quantvla_ros.quant.scheme import FLOAT, parse_scheme
from quantvla_ros.quant.simulate import simulate
from quantvla_ros.resources import share_path

PRECISIONS = 'w8a8,w4a8,w4a4,w3a4,w3a3'
FEWER_STEPS = (5, 2, 1)
HELD_SEED = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench recipes`."""
    add = parser.add_argument
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--frames', type=Path, required=True, help='frames file made by `quantvla frames`')
    add('--limit', type=int, default=96, help='frames to use: half calibrate, half judge')
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
    add('--json', type=Path, default=None, help='write all rows here, after each one')


@dataclass(frozen=True)
class Row:
    """One line of the table. nbytes: of all linear layers, float ones at two bytes a weight."""

    model: str
    recipe: str
    precision: str
    mean_mrad: float
    p95_mrad: float
    gripper: float
    nbytes: int
    seconds: float


class Subject:
    """One network in float, with what it does on the frames and what it tells recipes."""

    def __init__(
        self,
        name: str,
        contract: Contract,
        settings: PolicySettings,
        checkpoint: Checkpoint,
        net: LiberoVlaNet,
        frames: tuple[Sequence[Observation], Sequence[Observation]],
        seed: int,
    ) -> None:
        self.name, self.contract, self.settings = name, contract, settings
        self.checkpoint, self.net, self.seed = checkpoint, net, seed
        self.fitted, self.held = frames
        self.sites = libero_vla_sites(net)
        self.reference = chunks(self.policy(), self.held, HELD_SEED)
        self._known: Known | None = None

    def policy(self, steps: int = 0) -> LiberoVla:
        """Make a float policy of its own copy of the network."""
        settings = PolicySettings(device=self.settings.device, steps=steps,
                                  threads=self.settings.threads)
        net = copy.deepcopy(self.net)
        return LiberoVla.around(self.contract, settings, self.checkpoint, net)

    @property
    def known(self) -> Known:
        """What one-pass recipes need; measured once."""
        if self._known is None:
            self._known = ask_policy(self.policy(), self.fitted, self.seed)
        return self._known

    def row(
        self, recipe: str, precision: str, found: np.ndarray, nbytes: int, began: float
    ) -> Row:
        """Judge chunks of the held-out frames."""
        error = action_error(found, self.reference, self.contract.action.execute)
        return Row(self.name, recipe, precision, error.mean_mrad, error.p95_mrad, error.gripper,
                   nbytes, time.monotonic() - began)

    def float_rows(self) -> Iterator[Row]:
        """Another noise seed, and fewer denoising steps."""
        nbytes = self.linear_bytes({})
        began = time.monotonic()
        other = chunks(self.policy(), self.held, 2 * HELD_SEED)
        yield self.row('another noise seed', 'float', other, nbytes, began)
        for steps in FEWER_STEPS:
            began = time.monotonic()
            found = chunks(self.policy(steps), self.held, HELD_SEED)
            yield self.row(f'{steps} denoising steps', 'float', found, nbytes, began)

    def linear_bytes(self, stored: dict[str, int]) -> int:
        """Bytes of all linears: those stored as they are, the others at two bytes a weight."""
        return sum(stored.get(s.name, weight_bytes(s, FLOAT)) for s in self.sites.linears)

    def measure(self, recipe: Recipe, precision: str, *, blockwise: bool) -> Row:
        """Quantize a copy by a recipe and judge it."""
        began, policy = time.monotonic(), self.policy()
        result = quantize_policy(
            policy, recipe, parse_scheme(precision), self.fitted, seed=self.seed,
            known=None if blockwise else self.known, blockwise=blockwise, make=simulate,
        )
        nbytes = self.linear_bytes({name: x.nbytes for name, x in result.layers.items()})
        found = chunks(policy, self.held, HELD_SEED)
        return self.row(recipe.name, precision, found, nbytes, began)

    def measure_literal(self, name: str, precision: str) -> Row:
        """Put a published form into a copy and judge it; it has no bytes of its own."""
        began, policy = time.monotonic(), self.policy()
        put_literal(policy.net, self.sites, LITERALS[name], parse_scheme(precision),
                    lambda: None, self.known.seen)
        return self.row(name, precision, chunks(policy, self.held, HELD_SEED), 0, began)


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


def subjects(args: argparse.Namespace) -> Iterator[Subject]:
    """The policy, and its twin made from it."""
    names = args.models.split(',')
    unknown = sorted(set(names) - {'policy', 'twin'})
    if unknown:
        raise ValueError(f'--models {", ".join(unknown)}: known are policy and twin')
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    contract = load_contract(read_settings(model).contract)
    frames = read_frames(args.frames, args.limit).halves()
    if not frames[1]:
        raise ValueError('at least two frames are needed: one calibrates, one judges')
    settings = PolicySettings(device=args.device, threads=args.threads)
    for name in names:
        checkpoint, net = read_checkpoint(model)
        if name == 'twin':
            whole = LiberoVla.around(contract, settings, checkpoint, net)
            peaks = channel_peaks(whole, frames[0][:16])
            net = net.cpu()
            stress(net, peaks, args.seed)
            for parameter in net.parameters():
                parameter.copy_(parameter.half().float())  # as a file would give it back
        yield Subject(name, contract, settings, checkpoint, net, frames, args.seed)


def plan(args: argparse.Namespace, subject: Subject) -> Iterator[Callable[[], Row]]:
    """Every measurement of one subject."""
    def by(recipe: Recipe, precision: str) -> Callable[[], Row]:
        return lambda: subject.measure(recipe, precision, blockwise=args.blockwise)

    def literal(name: str, precision: str) -> Callable[[], Row]:
        return lambda: subject.measure_literal(name, precision)

    if args.ablation:
        yield from (by(recipe, args.ablation) for recipe in ablation())
        return
    names = args.recipes.split(',') if args.recipes else [*RECIPES, *LITERALS]
    for precision in args.precisions.split(','):
        for name in names:
            if name in LITERALS:
                yield literal(name, precision)
            else:
                yield by(find_recipe(name), precision)


def run(args: argparse.Namespace) -> int:
    """Measure, print each row as it comes and the whole table at the end."""
    for precision in (args.ablation or args.precisions).split(','):
        parse_scheme(precision)
    success = report.read_success(args.eval)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(f'{row.model:7s} {row.precision:5s} {row.recipe:28s} {row.mean_mrad:8.3f} mrad  '
              f'{row.nbytes / 1e6:6.2f} MB  {row.seconds:5.0f} s', flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            document: dict[str, Any] = {
                'frames': str(args.frames.name), 'limit': args.limit, 'device': args.device,
                'blockwise': args.blockwise, 'seed': args.seed, 'rows': [asdict(r) for r in rows],
            }
            args.json.write_text(json.dumps(document, indent=1) + '\n')

    with torch.no_grad():
        for subject in subjects(args):
            for row in subject.float_rows():
                add(row)
            for measure in plan(args, subject):
                add(measure())
    print()
    print(report.table([asdict(row) for row in rows], success))
    return 0
