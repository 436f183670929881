# SPDX-License-Identifier: Apache-2.0
"""`quantvla pack`: pack LIBERO tasks into the local cache, or export them into one folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from quantvla_ros.sim.scenes import MAIN_SUITES, MAX_TEXTURE, export, pack, parse_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla pack`."""
    parser.add_argument(
        'tasks', nargs='+', metavar='SUITE[/TASK]',
        help=f'what to pack: {", ".join(MAIN_SUITES)}, libero_90, the perturbed suites '
        '(libero_goal_swap, _object, _lan, _task), or one task such as libero_goal/3')
    parser.add_argument(
        '--max-texture', type=int, default=MAX_TEXTURE, metavar='PX',
        help='scale textures down to this edge; 0 keeps the originals (default: %(default)s)')
    parser.add_argument(
        '--export', type=Path, metavar='FOLDER',
        help='copy the packed tasks into a folder that needs only mujoco; on the other machine '
        'set QUANTVLA_SCENES to it')


def run(args: argparse.Namespace) -> int:
    """Pack, say where, and how much it takes."""
    tasks = parse_tasks(','.join(args.tasks))
    if args.export is not None:
        root = export(tasks, args.export, args.max_texture, say=print)
    else:
        root = pack(tasks, args.max_texture, say=print)
    size = sum(path.stat().st_size for path in root.rglob('*') if path.is_file())
    print(f'{len(tasks)} tasks are in {root} ({size / 1e6:.0f} MB in the folder)')
    return 0
