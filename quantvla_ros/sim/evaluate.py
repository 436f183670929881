# SPDX-License-Identifier: Apache-2.0
"""`quantvla eval`: success rates on LIBERO's official initial states.

Every variant (precision, denoising steps) plays the same episodes with the same noise. Finished
episodes go to an append-only log at once, keyed by a hash of everything that decides them, so an
interrupted run goes on where it stopped and a changed setting never meets an old outcome. An
episode that crashed is played again by the next run and is reported as crashed until then.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.contract import load_contract
from quantvla_ros.sim import report, through_ros
from quantvla_ros.sim.episode_log import Keys, Log
from quantvla_ros.sim.episodes import (
    Episode,
    Outcome,
    Settings,
    Variant,
    cap_of,
    check_contract,
)
from quantvla_ros.sim.gpus import visible_gpus
from quantvla_ros.sim.lighting import DAY, parse_lighting
from quantvla_ros.sim.players import Player, play_in_processes, play_on_ray
from quantvla_ros.sim.scenes import MAX_TEXTURE, SUITES, check_task, pack

PROGRESS_S = 10.0
NONE = 'none'  # the word for no calibration
SHARED = ('contract', 'execute', 'seed', 'max_texture', 'noise_rad', 'slip', 'lighting')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla eval`."""
    add = parser.add_argument
    add('--suite', default='libero_object,libero_spatial', metavar='NAMES',
        help='suites, joined by commas; also LIBERO-PRO ones such as libero_object_swap')
    add('--tasks', default='', metavar='RANGES', help='task numbers in each suite, as in 0,3-5')
    add('--inits', default='0-49', metavar='RANGES', help='official initial states, as in 0-9')
    add('--precision', default='float', metavar='NAMES', help='precisions to compare')
    add('--calibration', default=NONE, metavar='NAMES',
        help='calibrations to compare, with every precision: names, newest, or none (default)')
    add('--steps', default='0', metavar='NUMBERS',
        help="denoising steps to compare, as in 10,2; 0, the default, is the policy's own")
    add('--policy', default='libero_panda')
    add('--model', default='', metavar='FOLDER', help='checkpoint; default: the shipped one')
    add('--contract', default='libero_panda')
    add('--cap', type=int, default=0, metavar='STEPS',
        help='most control steps of an episode; default: 220 spatial, 280 object, 300 goal, 520 '
        'libero_10, 400 libero_90')
    add('--execute', type=int, default=0, metavar='STEPS',
        help="steps of a chunk that are executed; default: the contract's")
    add('--seed', type=int, default=0, help='of all noise')
    add('--perturb', default='', metavar='noise=RAD',
        help='add normal noise of this standard deviation to every joint target')
    add('--recovery', action='store_true',
        help='force the gripper open once, just after it has lifted the object')
    add('--real', action='store_true',
        help='play in robosuite and LIBERO themselves, with the original textures')
    add('--through-ros', action='store_true',
        help='play through sim_node and policy_node over DDS and compare their chunks bit for bit')
    add('--max-texture', type=int, default=MAX_TEXTURE, metavar='PX',
        help='scale textures down to this; 0: originals (default: %(default)s)')
    add('--lighting', default='day', metavar='WORDS',
        help='day, overcast, lamp, night, or numbers such as light=0.5,warmth=0.8,noise=6')
    add('--device', default='cpu', help='where the policy computes: cpu or cuda')
    add('--batch', type=int, default=0, metavar='N',
        help='compute in one process per GPU, in batches of N; default: 1 on a CPU, as many as '
        'players share a GPU elsewhere')
    add('--workers', type=int, default=len(os.sched_getaffinity(0)), help='player processes')
    add('--ray', default='', metavar='ADDRESS', help='play on a Ray cluster instead')
    add('--out', type=Path, default=Path('runs/eval'), metavar='FOLDER')
    add('--against', action='append', default=[], metavar='NAME=FOLDER',
        help="compare with another evaluation's outcomes of the same starts and noise: another "
        'model, or the same one on another machine; the first is what the others are paired with')
    add('--video', default='', metavar='EPISODE',
        help='write a video of one episode, as in libero_object/3/17, and play nothing else')


def parse_numbers(text: str) -> list[int]:
    """Read '0,3-5' as [0, 3, 4, 5]. Raises ValueError that says what was expected."""
    numbers: list[int] = []
    for part in filter(None, text.split(',')):
        first, dash, last = part.strip().partition('-')
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f'{text!r}: expected numbers and ranges such as 0,3-5')
        numbers += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(numbers))


def parse_perturbation(text: str) -> float:
    """Read 'noise=0.02' as 0.02 rad."""
    if not text:
        return 0.0
    name, _, value = text.partition('=')
    try:
        noise_rad = float(value)
    except ValueError:
        noise_rad = -1.0
    if name != 'noise' or not noise_rad >= 0:
        raise ValueError(f'--perturb {text!r}: expected noise=RADIANS, as in noise=0.02')
    return noise_rad


def settings_of(args: argparse.Namespace) -> Settings:
    """Return what decides every episode. Raises ValueError on what does not fit together."""
    settings = Settings(
        policy=args.policy,
        model=args.model,
        contract=args.contract,
        device=args.device,
        batch=args.batch or _batch(args),
        execute=args.execute,
        seed=args.seed,
        max_texture=args.max_texture,
        noise_rad=parse_perturbation(args.perturb),
        slip=args.recovery,
        real=args.real,
        lighting=args.lighting,
        through_ros=args.through_ros,
    )
    if parse_lighting(args.lighting) != DAY and args.real:
        raise ValueError('--lighting changes our own world; leave out --real')
    check_contract(load_contract(settings.contract), settings)
    if args.ray and settings.batch > 1:
        raise ValueError('--ray players compute their own chunks; leave out --batch')
    if settings.through_ros:
        through_ros.check(settings)
    return settings


def _batch(args: argparse.Namespace) -> int:
    """As many as may ask at once: the players of one GPU."""
    if args.device == 'cpu' or args.ray:
        return 1
    return max(1, -(-args.workers // max(1, len(visible_gpus()))))


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """Every precision with every calibration and number of steps, in the order given."""
    calibrations = [name.strip() for name in args.calibration.split(',')]
    return [
        Variant(precision.strip(), steps, '' if calibration == NONE else calibration)
        for precision in args.precision.split(',')
        for calibration in calibrations
        for steps in parse_numbers(args.steps)
    ]


def episodes_of(args: argparse.Namespace) -> list[Episode]:
    """All episodes, ordered so that the variants of one start follow each other."""
    found = []
    for suite in (name.strip() for name in args.suite.split(',')):
        check_task(suite, 0)
        for task in parse_numbers(args.tasks) or range(SUITES[suite]):
            check_task(suite, task)
            found += [
                Episode(variant, suite, task, start, args.cap or cap_of(suite))
                for start in parse_numbers(args.inits)
                for variant in variants_of(args)
            ]
    return found


# -- what decides an episode ----------------------------------------------------------------------


def progress(outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    """Print how far it is and the time left, every ten seconds and at the end."""
    began = told = time.monotonic()
    counts: dict[str, int] = {}
    for done, outcome in enumerate(outcomes, 1):
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
        now = time.monotonic()
        if now - told >= PROGRESS_S or done == total:
            told = now
            left_s = (now - began) / done * (total - done)
            said = ', '.join(f'{count} {status}' for status, count in sorted(counts.items()))
            print(f'{done}/{total} episodes ({said}); {left_s / 60:.1f} min left', flush=True)
        yield outcome


def evaluate(
    episodes: list[Episode], settings: Settings, log: Log, workers: int, ray: str = ''
) -> list[dict[str, Any]]:
    """Play what the log lacks and return the log's line of every episode, in order."""
    tasks = list(dict.fromkeys((episode.suite, episode.task) for episode in episodes))
    pack(tasks, settings.max_texture, say=print)
    keys = Keys(settings)
    key_of = {episode: keys[episode] for episode in episodes}
    todo = [episode for episode in episodes if not log.finished(key_of[episode])]
    if len(todo) < len(episodes):
        print(f'{len(episodes) - len(todo)} of {len(episodes)} episodes are in {log.path} already')
    if todo:
        if settings.through_ros:
            playing = through_ros.play_through_ros(todo, settings, log.folder)
        elif ray:
            playing = play_on_ray(todo, settings, workers, ray)
        else:
            playing = play_in_processes(todo, settings, workers)
        for outcome in progress(playing, len(todo)):
            log.add(key_of[outcome.episode], outcome)
    return [log.lines[key_of[episode]] for episode in episodes]


def outcomes_of_others(
    words: Sequence[str], settings: Settings, episodes: Sequence[Episode]
) -> list[dict[str, Any]]:
    """Return the log's lines of other evaluations that played the same starts under a name.

    Raises ValueError where there are none, or where they met other noise, light or caps.
    """
    wanted = {(episode.suite, episode.task, episode.start, episode.cap) for episode in episodes}
    found = []
    for text in words:
        name, _, place = text.partition('=')
        path = Path(place) / 'report.json'
        if not name or not path.is_file():
            raise ValueError(f'--against {text!r}: expected NAME=FOLDER, a folder of `quantvla '
                             'eval --out` with its report.json')
        theirs = json.loads(path.read_text())['settings']
        other = [key for key in SHARED if theirs[key] != getattr(settings, key)]
        if other:
            raise ValueError(f'--against {name}: {place} was played with another '
                             f'{", ".join(other)}')
        lines = [
            {**line, 'from': name} for line in Log(path.parent).lines.values()
            if (line['suite'], line['task'], line['start'], line['cap']) in wanted
        ]
        if not lines:
            raise ValueError(f'--against {name}: {place} has none of these episodes')
        found += lines
    return found


def write_video(settings: Settings, variant: Variant, name: str, cap: int, folder: Path) -> Path:
    """Play one episode and write both cameras as a video, 20 frames a second."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError('--video needs opencv: pip install opencv-python') from error
    suite, _, rest = name.partition('/')
    task, _, start = rest.partition('/')
    if not (task.isdecimal() and start.isdecimal()):
        raise ValueError(f'--video {name!r}: expected SUITE/TASK/INIT, as in libero_object/3/17')
    check_task(suite, int(task))
    episode = Episode(variant, suite, int(task), int(start), cap or cap_of(suite))
    frames: list[np.ndarray] = []

    def film(world: Any) -> None:
        frames.append(np.concatenate([world.render(n, 256) for n in ('agentview', 'wrist')], 1))

    outcome = Player(settings).play(episode, film)
    if outcome.status in ('crashed', 'refused'):
        raise ValueError(f'{name} {outcome.status}: {outcome.error}')
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{episode.task_name}_{episode.start}.mp4'
    fourcc = cv2.VideoWriter.fourcc(*'mp4v')
    writer = cv2.VideoWriter(str(path), fourcc, 20.0, (512, 256))
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()
    print(f'{name}: {outcome.status} after {outcome.steps} steps; {path}')
    return path


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables and write report.json and report.html."""
    settings, episodes = settings_of(args), episodes_of(args)
    if args.video:
        write_video(settings, variants_of(args)[0], args.video, args.cap, args.out)
        return 0
    if not episodes:
        raise ValueError('no episode fits --suite, --tasks and --inits')
    others = outcomes_of_others(args.against, settings, episodes)
    log = Log(args.out)
    lines = others + evaluate(episodes, settings, log, args.workers, args.ray)
    summary = report.summarize(lines, settings)
    print(report.as_text(summary))
    (args.out / 'report.json').write_text(json.dumps(summary, indent=1) + '\n')
    frames = {
        line['key']: log.frame_path(line['key']).read_bytes()
        for line in lines
        if line['status'] == 'failure' and log.frame_path(line['key']).exists()
    }
    (args.out / 'report.html').write_text(report.as_html(summary, lines, frames))
    print(f'{args.out / "report.html"} and report.json written')
    return 1 if any(line['status'] == 'crashed' for line in lines[len(others):]) else 0
