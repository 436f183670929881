# SPDX-License-Identifier: Apache-2.0
"""`quantvla quantize`: a checkpoint and some frames in, an artifact beside the checkpoint out.

Every second frame calibrates, the others judge the result. Interrupted, it leaves nothing behind;
the same model, frames and seed give the same bytes on the same machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import resource
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from quantvla_ros.calibration import family
from quantvla_ros.calibration.frames_file import Frames, read_frames
from quantvla_ros.calibration.pipeline import quantize_policy, time_layers
from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.contract import load_contract
from quantvla_ros.exit_status import INTERRUPTED
from quantvla_ros.kernels import dispatch
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import SETTINGS, read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import Provenance, write_artifact
from quantvla_ros.quant.convolutions import round_convolutions
from quantvla_ros.quant.linear import Make, QuantLinear
from quantvla_ros.quant.recipes import Recipe, find_recipe
from quantvla_ros.quant.scheme import Scheme, parse_scheme
from quantvla_ros.quant.simulate import simulate
from quantvla_ros.quant.spend import spent_ms
from quantvla_ros.quant.times import Times, read_times
from quantvla_ros.resources import share_path

JUDGED_FRAMES = 32  # held-out frames that are run before and after
OTHER_NOISE = 1 << 20  # seeds that no calibration frame has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla quantize`."""
    add = parser.add_argument
    add('model', nargs='?', default='', help='checkpoint folder; default: the shipped one')
    add('--recipe', default='onboard', help='recipe; default: onboard')
    add('--precision', default='w4a8', help='scheme such as w8a8, w4a8, w4a4; default: w4a8')
    add('--frames', type=Path, default=None, help='frames file made by `quantvla frames`; '
        'rtn needs none for a published checkpoint')
    add('--contract', default='', help='of a published checkpoint: the robot of the frames')
    add('--limit', type=int, default=0, help='use at most so many frames, evenly spread')
    add('--seed', type=int, default=0, help='of the noise the frames are run with')
    add('--out', type=Path, default=None,
        help='artifact folder; default: MODEL/<precision>, or MODEL/<recipe>-<precision>')
    add('--one-pass', action='store_true',
        help='run the frames once for all layers instead of once for each block')
    add('--budget', type=float, default=0.0, metavar='MB',
        help='of all linear layers, for a recipe that spends them; default: as of equal widths')
    add('--budget-ms', type=float, default=None, metavar='MS',
        help='spend the time of the linear layers in a chunk instead of bytes; 0: that of equal '
        'widths')
    add('--times', type=Path, default=None, metavar='FILE',
        help='times of the layers: read where it exists, else measured here and written')
    add('--threads', type=int, default=0, help='torch threads; default: its own choice')


def default_folder(model: Path, recipe: Recipe, precision: Scheme) -> Path:
    """Where an artifact goes: our own recipe has the short name."""
    name = precision.name
    return model / (name if recipe.name == 'onboard' else f'{recipe.name}-{name}')


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def version() -> str:
    """The installed version, or 'source' in a source tree."""
    try:
        return importlib.metadata.version('quantvla_ros')
    except importlib.metadata.PackageNotFoundError:
        return 'source'


def layer_maker() -> Make:
    """Integer layers while calibrating; the same numbers in floats where no kernel is built."""
    return simulate if dispatch.library() is None else QuantLinear


def _tell(name: str, done: int, total: int) -> None:
    end = '\n' if done == total else ''
    if sys.stderr.isatty():
        print(f'\r\033[K{done}/{total} layers  {name}', end=end, file=sys.stderr, flush=True)
    elif done == total or done % 20 == 0:
        print(f'{done}/{total} layers', file=sys.stderr, flush=True)


def with_budget(args: argparse.Namespace) -> Recipe:
    """The recipe that is asked for, and the bytes or milliseconds that it may spend."""
    recipe = find_recipe(args.recipe)
    in_time = args.budget_ms is not None
    if not args.budget and not in_time:
        return recipe
    if recipe.spend is None:
        raise ValueError(f'--budget: recipe {recipe.name!r} gives every layer the same width')
    if args.budget and in_time:
        raise ValueError('--budget and --budget-ms: spend bytes or time, not both')
    return replace(recipe, spend=replace(
        recipe.spend, budget_mb=args.budget, in_time=in_time, budget_ms=args.budget_ms or 0.0))


def times_for(
    args: argparse.Namespace, recipe: Recipe, precision: Scheme, policy: LiberoVla,
    observation: Observation,
) -> Times | None:
    """Times of the layers where the recipe spends them: from a file, or measured."""
    if recipe.spend is None or not recipe.spend.in_time:
        return None
    if args.times is not None and args.times.is_file():
        times = read_times(args.times)
    else:
        times = time_layers(policy, recipe, precision, observation)
        if args.times is not None:
            times.write(args.times)
    print(f'linear layers of a chunk on {times.machine} ({times.kernels}, {times.threads} '
          f'threads): ' + ', '.join(f'{times.equal(w):.2f} ms at {w} bits' for w in (8, 4, 2)))
    return times


def run(args: argparse.Namespace) -> int:
    """Quantize, judge, write."""
    recipe, precision = with_budget(args), parse_scheme(args.precision)
    if precision.is_float:
        raise ValueError('precision float leaves nothing to quantize; take one such as w4a8')
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    folder = args.out or default_folder(model, recipe, precision)
    if not (model / SETTINGS).is_file():
        if args.budget or args.budget_ms is not None:
            raise ValueError('budgets are for the shipped policy: nothing asks a published '
                             'checkpoint, which is streamed, what its action feels')
        return family.run(family.FamilyJob(
            model, recipe, precision, folder, args.contract, args.frames, args.limit, args.seed,
            args.threads, version(), _tell))
    if args.frames is None:
        raise ValueError('name calibration frames with --frames; `quantvla frames` records them')
    frames = read_frames(args.frames, args.limit)
    if len(frames) < 2:
        raise ValueError('at least two frames are needed: one calibrates, one judges')
    try:
        return _work(args, recipe, precision, model, frames, folder)
    except KeyboardInterrupt:
        print(f'\ninterrupted; {folder} is as it was', file=sys.stderr)
        return INTERRUPTED


def _work(
    args: argparse.Namespace,
    recipe: Recipe,
    precision: Scheme,
    model: Path,
    frames: Frames,
    folder: Path,
) -> int:
    torch.manual_seed(args.seed)
    contract = load_contract(read_settings(model).contract)
    began, before_mb = time.monotonic(), peak_mb()
    checkpoint, net = read_checkpoint(model)
    float_mb = sum(p.numel() for p in net.parameters()) * 4 / 1e6
    policy = LiberoVla.around(contract, PolicySettings(threads=args.threads), checkpoint, net)
    del net
    fitted, held = frames.halves()
    held = held[:: max(1, len(held) // JUDGED_FRAMES)][:JUDGED_FRAMES]
    reference = chunks(policy, held, OTHER_NOISE)
    floor = chunks(policy, held, 2 * OTHER_NOISE)
    sites = libero_vla_sites(policy.net)
    times = times_for(args, recipe, precision, policy, fitted[0])
    # simulated: matching copies the network, which layers of the kernels do not take
    stem = round_convolutions(policy.net, sites, simulate)
    result = quantize_policy(
        policy, recipe, precision, fitted, seed=args.seed, blockwise=not args.one_pass,
        make=layer_maker(), progress=_tell, times=times,
    )
    execute = contract.action.execute
    error = action_error(chunks(policy, held, OTHER_NOISE), reference, execute)
    other = action_error(floor, reference, execute)
    provenance = Provenance(
        checkpoint=checkpoint.sha256,
        recipe=recipe.name,
        precision=precision.name,
        frames=frames.sha256,
        seed=args.seed,
        version=version(),
        settings={**asdict(recipe), 'blockwise': not args.one_pass, 'frames': len(fitted)},
        measured={
            'action_error_mrad': round(error.mean_mrad, 6),
            'action_error_p95_mrad': round(error.p95_mrad, 6),
            'action_error_worst_mrad': round(float(error.frames.max()), 6),
            'other_seed_mrad': round(other.mean_mrad, 6),
            'other_seed_p95_mrad': round(other.p95_mrad, 6),
            'other_seed_worst_mrad': round(float(other.frames.max()), 6),
            'judged_frames': len(held),
        },
    )
    layers = {**stem, **result.layers}
    sha256 = write_artifact(folder, layers, provenance)
    nbytes = sum(layer.nbytes for layer in layers.values())
    print(
        f'{folder}: {recipe.name} {precision.name}, {len(layers)} layers, '
        f'{nbytes / 1e6:.2f} MB, sha256 {sha256[:16]}\n'
        f'action error on {len(held)} held-out frames: {error.mean_mrad:.2f} mrad (p95 '
        f'{error.p95_mrad:.2f}, gripper {100 * error.gripper:.2f} %); another noise seed: '
        f'{other.mean_mrad:.2f} mrad\n'
        f'peak memory {peak_mb():.0f} MB, {before_mb:.0f} MB of it before the model was read '
        f'(float weights {float_mb:.0f} MB); {time.monotonic() - began:.0f} s'
    )
    if times is not None:
        schemes = {name: layer.scheme for name, layer in result.layers.items()}
        print(f'linear layers at their own widths: {spent_ms(sites, schemes, times.ms):.2f} ms')
    kept = int(np.sum([not f.neutral for f in result.factors.values()]))
    if recipe.matching is not None:
        print(f'alpha or beta differ from 1 at {kept} of {len(result.factors)} attentions')
    return 0
