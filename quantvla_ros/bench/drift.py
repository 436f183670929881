# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench drift`: what looking for drift costs, and which changes of a scene it notices.

Ranges are taken from the first half of a frames file, as calibration takes them from a bag; the
second half is shown as it is and with other light and noise, and so are frames of other files,
such as one recorded by night.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.calibration.pipeline import nearest_artifact
from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.drift import Drift, DriftSettings, Range
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.resources import share_path
from quantvla_ros.sim.report import machine

DEFAULTS = DriftSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla bench drift`."""
    parser.add_argument('--frames', type=Path, required=True,
                        help='a file of `quantvla frames`')
    parser.add_argument('--shown', type=Path, nargs='+', default=[], metavar='FRAMES',
                        help='also show frames of these files, as recorded')
    parser.add_argument('--precision', default='w8a8', help='scheme (default w8a8)')
    parser.add_argument('--count', type=int, default=24, help='frames of each half (default 24)')
    parser.add_argument('--repeats', type=int, default=40, help='chunks that are timed')
    parser.add_argument('--threads', type=int, default=1)


def scenes() -> dict[str, Any]:
    """Return name -> what it does to a picture (height, width, 3) in 0..255 float."""
    random = np.random.default_rng(0)
    return {
        'as recorded': lambda x: x,
        'light x 0.8': lambda x: 0.8 * x,
        'light x 0.4': lambda x: 0.4 * x,
        'light x 1.6': lambda x: 1.6 * x,
        'noise of 10': lambda x: x + random.normal(0, 10, x.shape),
        'noise of 40': lambda x: x + random.normal(0, 40, x.shape),
        'lens covered': lambda x: 0 * x,
    }


def changed(observation: Observation, change: Any) -> Observation:
    """Return an observation with changed pictures."""
    images = {name: np.clip(change(image.astype(np.float64)), 0, 255).astype(np.uint8)
              for name, image in observation.images.items()}
    return replace(observation, images=images)


def whole_ranges(policy: Any, frames: Sequence[Observation]) -> dict[str, Range]:
    """Return the smallest and largest of each layer over the frames, all denoising steps."""
    rows: dict[str, list[float]] = {}
    for observation in frames:
        peak: dict[str, float] = {}
        for step in range(policy.steps):
            with policy.watching(step) as seen:
                policy.denoise(policy.prepare(observation), 0)
            for name, value in {**seen.inputs, **seen.spreads}.items():
                peak[name] = max(peak.get(name, 0.0), value)
        for name, value in peak.items():
            rows.setdefault(name, []).append(value)
    return {name: Range(min(values), max(values)) for name, values in rows.items()}


def cost(policy: Any, observation: Observation, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a chunk, and of one that is looked into, taken in turn."""
    plain, looked = [], []
    for turn in range(repeats):
        begun = time.perf_counter()
        policy.denoise(policy.prepare(observation), 0)
        plain.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with policy.watching(turn):
            policy.denoise(policy.prepare(observation), 0)
        looked.append(time.perf_counter() - begun)
    return float(np.median(plain)), float(np.median(looked))


def noticed(policy: Any, ranges: dict[str, Range], frames: Sequence[Observation]) -> str:
    """Look into a chunk of each frame, and say what a node would after the last."""
    drift, warned = Drift(replace(DEFAULTS, every=1), ranges), 0
    for turn, observation in enumerate(frames):
        with drift.looking(policy):
            policy.denoise(policy.prepare(observation), 0)
        warned = warned or (turn + 1 if drift.warning else 0)
    state = drift.status()
    told = f'warned at look {warned}' if warned else 'no warning'
    return (f'{100 * state["share"]:5.1f} % of the layers outside, worst '
            f'{state["worst_layer"]} {state["worst_excess"]:.2f} x; {told}')


def _spread(frames: tuple[Observation, ...], count: int) -> tuple[Observation, ...]:
    return frames[:: max(1, len(frames) // count)][:count]


def run(args: argparse.Namespace) -> int:
    """Print cost and what is noticed."""
    model = share_path('models/libero_panda')
    settings = PolicySettings(model=str(model), threads=args.threads,
                              precision=str(nearest_artifact(model, args.precision)))
    policy: Any = make_policy('libero_panda', load_contract('libero_panda'), settings)
    first, second = read_frames(args.frames).halves()
    if not first or not second:
        raise ValueError(f'{args.frames} holds too few frames; record some tens of them')
    first, second = _spread(first, args.count), _spread(second, args.count)
    print(f'{machine()}, {args.threads} thread(s), {args.precision}')
    plain_s, looked_s = cost(policy, second[0], args.repeats)
    share = (looked_s - plain_s) / DEFAULTS.every / plain_s
    print(f'  chunk {1e3 * plain_s:.1f} ms, looked into {1e3 * looked_s:.1f} ms; one look in '
          f'{DEFAULTS.every} chunks: {100 * share:.2f} % of a chunk (goal 1)')
    ranges = whole_ranges(policy, first)
    print(f'  ranges of {len(ranges)} layers from {len(first)} frames; {len(second)} others:')
    shown = {name: [changed(o, change) for o in second] for name, change in scenes().items()}
    shown |= {path.stem: _spread(read_frames(path).halves()[1], args.count)
              for path in args.shown}
    for name, observations in shown.items():
        print(f'  {name:<14} {noticed(policy, ranges, observations)}', flush=True)
    return 0
