# SPDX-License-Identifier: Apache-2.0
"""`quantvla train STAGE`: make the shipped policy again from nothing, stage by stage.

demos: demonstrations and their frames. fit: train, go on, or fine-tune. takeover: roll the policy
out and let the expert go on where it failed. render: frames of what lacks them. select: play
models from drawn starts, never official ones, and name the best. card: the log of it all for the
model card. all: everything in its order, side by side where there are GPUs for it. All stages
share one work folder and can be interrupted and repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from quantvla_ros.policies.libero_checkpoint import read_checkpoint
from quantvla_ros.policies.libero_vla import VlaConfig
from quantvla_ros.policies.vocabulary import Vocabulary
from quantvla_ros.sim.gpus import gpu_count, side_by_side
from quantvla_ros.sim.scenes import MAIN_SUITES, load_scene, parse_tasks
from quantvla_ros.training.dataset import load_demonstrations, statistics_of
from quantvla_ros.training.fit import (
    STATE,
    FitSettings,
    Trainer,
    export,
    fit,
    statistics_from_json,
    statistics_to_json,
    warm_up_compilation,
)
from quantvla_ros.training.generate import generate, render

STAGES = ('demos', 'fit', 'takeover', 'render', 'select', 'card', 'all')
ABLATIONS = ('augmentation', 'average', 'noise', 'preludes')
SELECT_SEED = 90_000  # added to --seed: starts that nothing was trained on
PLAIN_KINDS = ('none', 'elsewhere')  # nothing to recover from
WORDS = 20
CONTRACT = 'libero_panda'
SMALL = {'vision_width': 64, 'vision_layers': 1, 'vision_mlp': 64, 'width': 64, 'layers': 1,
         'heads': 1, 'kv_heads': 1, 'mlp': 64, 'action_width': 64, 'action_layers': 1,
         'action_heads': 1, 'action_kv_heads': 1, 'action_mlp': 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla train`."""
    add = parser.add_argument
    add('stage', choices=STAGES)
    add('--work', type=Path, required=True, help='folder of data, checkpoints and the model')
    add('--suites', default=','.join(MAIN_SUITES), help='suites or tasks, as in libero_goal/3')
    add('--textures', default='512,0', metavar='PX,...',
        help='texture limits, mixed by file and attempt; 0: originals (default 512,0)')
    add('--seed', type=int, default=0)
    add('--limit', type=float, default=3600.0, metavar='S', help='stop data stages after this')
    add('--cores', type=int, default=0, help='processes that simulate; default: most cores')
    add('--renderers', type=int, default=0, help='processes that render; default: five per GPU')
    add('--attempts', default='160', metavar='N,...',
        help='per task; or a number for the tasks of each suite, in the order of --suites')
    add('--data', default='demos', help='folders in the work folder, joined by commas')
    add('--model', default='model', metavar='NAME',
        help='folder of the model in the work folder; several, joined by commas, for select')
    add('--init', type=Path, default=None, help='fine-tune this model instead of a fresh one')
    add('--resume', action='store_true', help='go on from the last checkpoint')
    add('--gpus', type=int, default=-1, help='default: all there are')
    add('--seconds', type=float, default=300.0,
        help='of the schedule, on the wall clock; all: of the whole training')
    add('--seeds', type=int, default=3, help='all: models that are trained from --seed on')
    add('--steps', type=int, default=0, help='of the schedule, instead of seconds')
    add('--batch', type=int, default=512, help='per GPU')
    add('--rate', type=float, default=6e-4)
    add('--warm-up', type=int, default=200)
    add('--later-weight', type=float, default=1.0,
        help='how often frames of the second and later data folders are drawn')
    add('--compile', action='store_true')
    add('--small', action='store_true',
        help='a tiny network that knows the words of --suites alone, to try the stages out')
    add('--without', default='', metavar='NAMES',
        help=f'fit: leave out, to see what it is worth: {", ".join(ABLATIONS)}')
    add('--shard', default='0/1', help='takeover: part i/n of the attempts')


def say(line: str) -> None:
    """Print a line of progress at once."""
    print(f'[{time.strftime("%H:%M:%S")}] {line}', flush=True)


def instructions(args: argparse.Namespace) -> dict[str, str]:
    """Return task name -> instruction of all four suites: the vocabulary never shrinks."""
    tasks = parse_tasks(args.suites if args.small else ','.join(MAIN_SUITES))
    texture = textures_of(args)[0]
    return {f'{s}_{n}': load_scene(s, n, texture).instruction for s, n in tasks}


def textures_of(args: argparse.Namespace) -> list[int]:
    """Return the texture limits. Raises ValueError for what is no number."""
    parts = args.textures.split(',')
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f'--textures {args.textures!r}: expected numbers of pixels such as 512,0')
    return [int(part) for part in parts]


def attempts_of(args: argparse.Namespace) -> dict[tuple[str, int], int]:
    """Return task -> attempts. Raises ValueError where the numbers do not fit the suites."""
    tasks, parts = parse_tasks(args.suites), args.attempts.split(',')
    suites = list(dict.fromkeys(suite for suite, _ in tasks))
    if not all(part.strip().isdecimal() for part in parts) or len(parts) not in (1, len(suites)):
        raise ValueError(f'--attempts {args.attempts!r}: expected a number, or one for each of '
                         f'{", ".join(suites)}')
    numbers = dict(zip(suites, map(int, parts * len(suites)), strict=False))
    return {task: numbers[task[0]] for task in tasks}


def without(args: argparse.Namespace) -> set[str]:
    """Return what --without leaves out. Raises ValueError that lists what may be."""
    names = set(filter(None, args.without.split(',')))
    if not names <= set(ABLATIONS):
        raise ValueError(f'--without {args.without!r}: known are {", ".join(ABLATIONS)}')
    return names


def run(args: argparse.Namespace) -> int:
    """Run one stage."""
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    {'demos': run_demos, 'fit': run_fit, 'takeover': run_takeover, 'render': run_render,
     'select': run_select, 'card': run_card, 'all': run_all}[args.stage](args)
    say(f'{args.stage} took {time.monotonic() - started:.0f} s')
    return 0


def _processes(args: argparse.Namespace) -> tuple[int, int]:
    cores, gpus = os.cpu_count() or 1, gpu_count()
    renderers = args.renderers or (5 * gpus if gpus else max(1, cores // 4))
    return args.cores or max(1, cores - renderers), renderers


def run_demos(args: argparse.Namespace) -> None:
    """Make demonstrations and render them."""
    simulators, renderers = _processes(args)
    generate(attempts_of(args), args.work / args.data, args.seed,
             simulators, renderers, textures_of(args), args.limit, say)


def run_render(args: argparse.Namespace) -> None:
    """Render what lacks frames."""
    _, renderers = _processes(args)
    for folder in args.data.split(','):
        render(parse_tasks(args.suites), args.work / folder, renderers, textures_of(args),
               args.limit, say)


def _shares(
    args: argparse.Namespace, processes: int
) -> list[list[tuple[tuple[str, int], int]]]:
    """Divide the attempts of this shard among processes, few tasks for each."""
    part, _, parts = args.shard.partition('/')
    counts = attempts_of(args)
    attempts = sorted((number, task) for task, most in counts.items() for number in range(most))
    mine = sorted((task, number) for number, task in attempts[int(part) :: int(parts)])
    size = -(-len(mine) // processes)
    return [mine[i : i + size] for i in range(0, len(mine), size)]


def run_takeover(args: argparse.Namespace) -> None:
    """Roll the policy out and record the expert."""
    from quantvla_ros.training.takeover import gather

    folder = args.work / args.data
    found = gather(_shares(args, _processes(args)[0]), str(args.work / args.model), folder,
                   args.seed, _device(), textures_of(args), args.limit, say)
    (folder / f'takeover_{args.shard.partition("/")[0]}.json').write_text(
        json.dumps(found, indent=1))


def _device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def run_select(args: argparse.Namespace) -> None:
    """Play every model from the same drawn starts; write selection.json and name the best."""
    from quantvla_ros.training.card import choose

    names = args.model.split(',')
    found = dict(zip(names, side_by_side(partial(_play_alone, args, len(names)), names),
                     strict=True))
    selection = choose(found, args.seed + SELECT_SEED)
    (args.work / 'selection.json').write_text(json.dumps(selection, indent=1))
    for name, row in selection['models'].items():
        say(f'{name}: {row["solved"]}/{row["attempts"]} from drawn starts')
    say(f'best: {selection["best"]}')


def _play_alone(args: argparse.Namespace, models: int, name: str) -> dict[str, list[int]]:
    """Play one of the models from the drawn starts, on its share of the processes."""
    from quantvla_ros.training.takeover import gather

    shares = _shares(args, max(1, _processes(args)[0] // models))
    return gather(shares, str(args.work / name), args.work / 'select', args.seed + SELECT_SEED,
                  _device(), textures_of(args), args.limit, say, alone=True)


def run_all(args: argparse.Namespace) -> None:
    """Run every stage and write the card of the model that was chosen."""
    from quantvla_ros.training.campaign import Campaign
    from quantvla_ros.training.card import write_card

    Campaign(args, torch.cuda.device_count(), say).run()
    best = json.loads((args.work / 'selection.json').read_text())['best']
    say(f'wrote {write_card(args.work, best)}; {best} is the best from drawn starts')


def run_card(args: argparse.Namespace) -> None:
    """Write the log of the training into the model's card."""
    from quantvla_ros.training.card import write_card

    say(f'wrote {write_card(args.work, args.model)}')


# -- fit ---------------------------------------------------------------------------------------


def run_fit(args: argparse.Namespace) -> None:
    """Train on all GPUs, or on the CPU where there is none."""
    gpus = torch.cuda.device_count() if args.gpus < 0 else args.gpus
    if gpus <= 1:
        fit_process(0, 1, args)
        return
    meeting = args.work / f'.meeting-{os.getpid()}'
    meeting.unlink(missing_ok=True)
    torch.multiprocessing.start_processes(
        _fit_rank, args=(gpus, args, str(meeting)), nprocs=gpus, start_method='spawn')
    meeting.unlink(missing_ok=True)


def _fit_rank(rank: int, ranks: int, args: argparse.Namespace, meeting: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group('nccl', init_method=f'file://{meeting}', rank=rank,
                            world_size=ranks, timeout=timedelta(seconds=300))
    fit_process(rank, ranks, args)
    dist.destroy_process_group()


def fit_process(rank: int, ranks: int, args: argparse.Namespace) -> None:
    """One process of training."""
    device = torch.device('cuda', rank) if torch.cuda.is_available() else torch.device('cpu')
    torch.set_float32_matmul_precision('high')
    texts, left_out = instructions(args), without(args)
    vocabulary = Vocabulary.of(texts.values(), WORDS)
    folders = [args.work / name for name in args.data.split(',')]
    kinds = PLAIN_KINDS if 'preludes' in left_out else ()
    data = load_demonstrations(
        folders, texts, vocabulary, device, rank, ranks, args.later_weight, kinds)
    config = VlaConfig(words=WORDS, vocabulary=-(-len(vocabulary.words) // 64) * 64,
                       **(SMALL if args.small else {}))
    statistics, weights = _statistics(args, data, rank, ranks, config), None
    if args.init is not None:
        checkpoint, net = read_checkpoint(args.init)
        config, statistics, weights = checkpoint.config, checkpoint.statistics, net.state_dict()
    settings = FitSettings(
        seconds=args.seconds, steps=args.steps, batch=args.batch, rate=args.rate,
        warm_up=args.warm_up, seed=args.seed, later_weight=args.later_weight,
        compiled=args.compile, bfloat16=device.type == 'cuda',
        ema=0.0 if 'average' in left_out else 0.999,
        augment='augmentation' not in left_out, state_noise='noise' not in left_out)
    trainer = Trainer(config, data, statistics, settings, device, rank, ranks)
    if weights is not None:
        trainer.start_from({name: value.to(device) for name, value in weights.items()})
    if rank == 0:
        say(f'{len(data.first) * ranks} frames or so of {data.episodes * ranks} episodes on '
            f'{ranks} x {torch.cuda.get_device_name() if device.type == "cuda" else "CPU"}, '
            f'{trainer.net.parameter_count / 1e6:.2f} M parameters')
    if args.compile:
        began = time.monotonic()
        warm_up_compilation(trainer)
        say(f'process {rank}: compiled in {time.monotonic() - began:.0f} s')
    out = args.work / 'fit' / args.model
    if args.resume and (out / STATE).exists():
        trainer.load(out)
        trainer.settings = replace(settings, seconds=max(settings.seconds, trainer.spent_s))
    if ranks > 1:
        dist.barrier()
    began_at = time.strftime('%Y-%m-%d')
    fit(trainer, out, say, {
        'date': began_at, 'data': args.data, 'init': args.init.name if args.init else '',
        'without': sorted(left_out), 'frames': len(data.first) * ranks,
        'episodes': data.episodes * ranks, 'cores': os.cpu_count()})
    if rank == 0:
        digest = export(trainer, vocabulary, CONTRACT, args.work / args.model)
        say(f'wrote {args.work / args.model}, sha256 {digest[:16]}')


def _statistics(
    args: argparse.Namespace, data: Any, rank: int, ranks: int, config: VlaConfig
) -> Any:
    """Compute statistics once per work folder; all processes and later runs use the same."""
    path = args.work / 'statistics.json'
    if rank == 0 and not path.exists():
        # other seeds may be trained beside this one: what they read is whole
        part = path.with_name(f'{path.name}.{os.getpid()}.part')
        part.write_text(json.dumps(statistics_to_json(statistics_of(data, config.chunk))))
        part.replace(path)
    if ranks > 1:
        dist.barrier()
    return statistics_from_json(json.loads(path.read_text()))


