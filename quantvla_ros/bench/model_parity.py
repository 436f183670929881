# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench model-parity`: our networks against the public implementations.

Builds small public models with random weights, saves them in their real format, runs both sides
from folder to chunk in float32 with the same noise, and prints the largest relative difference.
With --write it stores the comparison small enough for the tests.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.bench.parity_case import CAMERAS, CASES, SEED, ParityCase, relative_error
from quantvla_ros.bench.random_weights import record

BOUND = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument('--family', default='', help=f'only cases that start so: {list(CASES)}')
    parser.add_argument('--write', type=Path, help='folder for stored comparisons (*.json)')


def run(args: argparse.Namespace) -> int:
    """Run the comparisons; the status is 1 when one differs."""
    from quantvla_ros.bench.public_models import require_packages

    require_packages()
    names = [name for name in CASES if name.startswith(args.family)]
    if not names:
        raise ValueError(f'{args.family!r} is unknown; known are {", ".join(CASES)}')
    worst = 0.0 if args.family else _blocks()
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            worst = max(worst, _compare(name, Path(place) / name, args.write))
    print(f'largest relative difference {worst:.1e}, bound {BOUND:.0e}, float32')
    return int(worst > BOUND)


def _blocks() -> float:
    """Compare one block of each kind at its published size."""
    from quantvla_ros.bench.public_blocks import compare_blocks

    return compare_blocks()


def _compare(name: str, folder: Path, write: Path | None) -> float:
    case = CASES[name]
    public = make_public(name, folder)
    theirs = public.chunk(*_inputs(case), SEED)
    error = relative_error(case.ours(folder), theirs)
    print(f'{name:20s} {theirs.shape[0]}x{theirs.shape[1]} chunk, relative difference {error:.1e}')
    if write is not None:
        stored = record(folder, public.names, public.seed)
        stored['chunk'] = np.asarray(theirs, dtype=np.float64).round(7).tolist()
        write.mkdir(parents=True, exist_ok=True)
        (write / f'{name}.json').write_text(json.dumps(stored, separators=(',', ':')) + '\n')
    return error


def _inputs(case: ParityCase) -> tuple[list[np.ndarray], np.ndarray]:
    observation = case.observation()
    return [observation.images[name] for name in CAMERAS], observation.joint_positions


def make_public(name: str, folder: Path) -> Any:
    """Build, randomize and save the public model of a case."""
    family, _, form = name.rpartition('_')
    if family == 'smolvla':
        from quantvla_ros.bench.public_smolvla import PublicSmolVla

        return PublicSmolVla(folder, 0)
    if family == 'openvla':
        from quantvla_ros.bench.public_openvla import PublicOpenVla

        return PublicOpenVla(form, folder, 0)
    if family in ('pi05', 'pi0'):
        from quantvla_ros.bench.public_pi import PublicPi

        return PublicPi(family, folder, 0)
    from quantvla_ros.bench.public_groot import PublicGroot

    return PublicGroot(form, folder, 0)
