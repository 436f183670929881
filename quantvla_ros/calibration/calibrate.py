# SPDX-License-Identifier: Apache-2.0
"""`quantvla calibrate`: a robot's bag and an artifact in, a calibration beside the artifact out.

Also the process that calibration_node starts: with --json it tells its progress in lines of JSON
and ends when its standard input does. Interrupted, killed or out of disk, it leaves what was
there before; the same bag twice gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from quantvla_ros.calibration.bags import ReadOptions
from quantvla_ros.calibration.frames import FrameSet, FrameSettings, frames_of
from quantvla_ros.calibration.pipeline import nearest_artifact
from quantvla_ros.calibration.precisions import judge_others
from quantvla_ros.calibration.quantize import layer_maker, peak_mb, version
from quantvla_ros.calibration.report import Report, make_report
from quantvla_ros.calibration.run import CalibrationRun, Outcome, Progress, with_provenance
from quantvla_ros.calibration.settings import LEARNED, CalibrationSettings
from quantvla_ros.contract import load_contract
from quantvla_ros.exit_status import INTERRUPTED
from quantvla_ros.kernels import dispatch
from quantvla_ros.policies.libero_checkpoint import read_settings
from quantvla_ros.policies.libero_quantized import find_artifact
from quantvla_ros.priority import set_session_nice
from quantvla_ros.quant.calibrated import FOLDER, NEWEST, write_calibration
from quantvla_ros.quant.gate import GateLimits, refuse
from quantvla_ros.quant.scheme import NAME
from quantvla_ros.resources import share_path

REPORT_HTML, REPORT_JSON = 'report.html', 'report.json'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla calibrate`."""
    add = parser.add_argument
    add('bag', type=Path, help='rosbag2 directory, .mcap, .db3, or .npz of `quantvla frames`')
    add('--model', default='', help='checkpoint folder; default: the shipped one')
    add('--precision', default='w4a8', help='artifact beside the model, or its path')
    add('--contract', default='', help="contract of the bag; default: the model's")
    add('--frames', type=int, default=128, help='frames to fit on')
    add('--held-out', type=int, default=32, help='frames to judge by')
    add('--learn', default='activations,alpha,beta',
        help=f'what is tried, of {",".join(LEARNED)}')
    add('--recipe', default='', help="of rounding and smoothing; default: the artifact's own")
    add('--seed', type=int, default=0, help='of the frames and of the noise')
    add('--neutral', type=float, default=0.03, help='factors closer to 1 are 1 (log domain)')
    add('--clip', type=float, default=0.4, help='largest factor (log domain)')
    add('--confidence', type=float, default=0.95, help='that what is kept helps')
    add('--name', default='', help="of the calibration; default: the bag's name")
    add('--out', type=Path, default=None,
        help=f'folder of the calibration; default: ARTIFACT/{FOLDER}/NAME')
    add('--partial', action='store_true', help='use what can be read of a damaged bag')
    add('--namespace', default=None, help='of the recorded topics, where a bag has several')
    add('--camera-max-age-s', type=float, default=0.0,
        help="oldest picture of a moment; default: the contract's")
    add('--joints-max-age-s', type=float, default=0.0,
        help="oldest joint states of a moment; default: the contract's")
    add('--threads', type=int, default=0, help='torch threads; default: its own choice')
    add('--nice', type=int, default=10, help='priority, 0 normal to 19 only what is left over')
    add('--json', action='store_true', help='progress and result as lines of JSON')


def run(args: argparse.Namespace) -> int:
    """Calibrate, judge, write."""
    step_back(args.nice)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.json:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _work(args)
    except KeyboardInterrupt:
        print('cancelled; nothing was written', file=sys.stderr, flush=True)
        return INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        if not args.json:
            raise
        _say({'error': str(error)})
        return 2
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def step_back(nice: int) -> None:
    """Lower the priority of this process; 19 also leaves every cycle to whoever wants it."""
    if not 0 <= nice <= 19:
        raise ValueError(f'nice is {nice}; expected 0 to 19')
    os.nice(max(0, nice - os.nice(0)))
    set_session_nice(nice)
    if nice == 19 and hasattr(os, 'SCHED_IDLE'):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_parent() -> None:
    """End when the pipe to whoever started us is closed: nobody waits for the result any more."""
    while os.read(0, 1024):
        pass
    os._exit(INTERRUPTED)


def _say(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


class _Teller:
    """Tells progress: JSON lines to a parent, one line that is written over on a terminal."""

    def __init__(self, *, as_json: bool) -> None:
        self._json, self._told, self._stage = as_json, 0.0, ''

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage == self._stage and now < self._told + 0.5:
            return
        fresh = progress.stage != self._stage
        self._told, self._stage = now, progress.stage
        if self._json:
            _say({'stage': progress.stage, 'share': round(progress.share, 4),
                  'left_s': round(progress.left_s, 1)})
        elif sys.stderr.isatty():
            print(f'\r\033[K{100 * progress.share:3.0f} %, {progress.left_s:.0f} s left: '
                  f'{progress.stage}', end='', file=sys.stderr, flush=True)
        elif fresh:
            print(f'{100 * progress.share:3.0f} %: {progress.stage}', file=sys.stderr, flush=True)


def _work(args: argparse.Namespace) -> None:
    began = time.monotonic()
    model = Path(args.model) if args.model else share_path('models/libero_panda')
    precision = artifact_for(model, args.precision)
    name = args.out.name if args.out else args.name or default_name(args.bag)
    check_name(name)
    folder = args.out or precision / FOLDER / name
    settings = CalibrationSettings(
        model, str(precision), tuple(filter(None, args.learn.split(','))), args.recipe,
        args.seed, args.neutral, args.clip, args.confidence, threads=args.threads,
    )
    contract = load_contract(args.contract or read_settings(model).contract)
    tell = _Teller(as_json=args.json)
    tell(Progress('reading the bag', 0.0, 0.0))
    frames = frames_of(args.bag, contract, FrameSettings(
        args.frames, args.held_out, args.seed,
        read=ReadOptions(
            partial=args.partial, namespace=args.namespace,
            camera_max_age_s=args.camera_max_age_s, joints_max_age_s=args.joints_max_age_s)))
    before_mb, read_s = peak_mb(), time.monotonic() - began
    outcome = CalibrationRun(frames, contract, settings, layer_maker(), tell).run()
    outcome = with_provenance(outcome, provenance(frames, settings))
    measured = {
        'seconds': round(time.monotonic() - began, 1), 'reading_s': round(read_s, 1),
        'peak_mb': round(peak_mb()), 'before_models_mb': round(before_mb),
        'threads': torch.get_num_threads(), 'kernel': kernel_name(),
    }
    tell(Progress('other precisions', 1.0, 0.0))
    others = judge_others(model, precision, contract, frames, outcome, args.threads)
    tell(Progress('writing', 1.0, 0.0))
    write(folder, Report(folder.name, outcome, frames, measured, GateLimits(), others))
    tell_result(folder, outcome, measured, as_json=args.json)


def artifact_for(model: Path, precision: str) -> Path:
    """Return the artifact's folder; a plain scheme that nobody quantized yet is rounded once."""
    try:
        return find_artifact(model, precision)
    except ValueError:
        if NAME.fullmatch(precision) is None:
            raise
        return nearest_artifact(model, precision)


def default_name(bag: Path) -> str:
    """Name a calibration after its bag."""
    name = re.sub(r'[^A-Za-z0-9_-]+', '_', bag.resolve().name.partition('.')[0]).strip('_')
    return name or 'calibration'


def check_name(name: str) -> None:
    """Refuse names that are paths, hidden, or mean something else. Raises ValueError."""
    if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', name) or name == NEWEST:
        raise ValueError(f'the name of a calibration is {name!r}; expected letters, digits, _, - '
                         f'and ., and not {NEWEST!r}')


def provenance(frames: FrameSet, settings: CalibrationSettings) -> dict[str, Any]:
    """Tell where a calibration comes from: the same for the same bag, model and settings."""
    said = {**asdict(settings), 'model': str(settings.model), 'learn': list(settings.learn)}
    return {
        'bag': frames.source, 'frames': frames.digest, 'facts': dict(frames.facts),
        'rejected': dict(frames.rejected), 'settings': said,
        'versions': {'quantvla_ros': version(), 'torch': torch.__version__,
                     'numpy': np.__version__},
    }


def kernel_name() -> str:
    """Which kernels ran the quantized network."""
    library = dispatch.library()
    return 'simulated in float' if library is None else 'integer kernels'


def write(folder: Path, report: Report) -> None:
    """Write calibration and report, all or nothing. Raises ValueError where the disk refuses."""
    page, document = make_report(report)
    beside = {REPORT_HTML: page, REPORT_JSON: json.dumps(document, indent=1, sort_keys=True)}
    try:
        write_calibration(folder, report.outcome.calibration, beside)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f'{folder} could not be written: {error}. What was there before is as it was; make '
            'room, or choose another folder with --out') from error


def tell_result(
    folder: Path, outcome: Outcome, measured: dict[str, Any], *, as_json: bool
) -> None:
    """Say what was learned, what was dropped and what it cost."""
    calibration, evidence = outcome.calibration, outcome.calibration.evidence
    refused = refuse(evidence, GateLimits())
    if as_json:
        _say({'result': {
            'folder': str(folder), 'sha256': calibration.sha256 or '', 'gate': refused,
            'evidence': evidence.document(), 'measured': measured,
            'questions': [asdict(question) for question in outcome.questions]}})
        return
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for question in outcome.questions:
        print(f'{"kept" if question.kept else "dropped"}: {question.what}: {question.sentence}')
    print(
        f'action error on {evidence.frames} held-out frames: '
        f'{1e3 * evidence.before.mean_rad:.3f} mrad before, '
        f'{1e3 * evidence.after.mean_rad:.3f} after (p95 {1e3 * evidence.after.p95_rad:.2f}, '
        f'worst frame {1e3 * evidence.after.worst_rad:.2f}, cosine {evidence.after.cosine:.5f}); '
        f'another noise seed: {1e3 * evidence.floor.mean_rad:.2f}\n'
        f'gate: {refused or "may be activated"}\n'
        f'{measured["seconds"]:.0f} s, {measured["reading_s"]:.0f} of them reading the bag; peak '
        f'memory {measured["peak_mb"]} MB, {measured["before_models_mb"]} MB of it before a '
        f'model was read; {measured["threads"]} threads, {measured["kernel"]}\n'
        f'{folder} written; its {REPORT_HTML} shows all of it'
    )
