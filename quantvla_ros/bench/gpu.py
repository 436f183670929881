# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench gpu`: build, check against float64, time and print, in one command.

Every section's figures are written as soon as it ends, so that a run that is cut keeps what it
has. --only estimate and --only compile need no card; --dry runs every section at tiny sizes under
Triton's interpreter, to find what would stop a real run, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantvla_ros.bench.gpu_estimate import estimate

BUDGET_S = 520.0
SECTIONS = {
    'estimate': 'what boards that are not here could do at best (an estimate)',
    'compile': 'registers, shared memory, spills, instructions of every kernel on four chips',
    'check': 'everything against float64 and the modules, on poisoned outputs',
    'ceilings': 'what this card copies and multiplies at best',
    'ways': 'what each way of joining kernels is worth in a whole chunk',
    'chunk': 'whole chunks of full-size networks at every precision',
    'memory': 'peak device memory of whole processes',
    'attention': 'attention and its splits against the library',
    'gemm': 'every product against the libraries',
    'ros': 'the policy node serving the full-size network',
    'sanitize': 'the checks under compute-sanitizer',
    'profile': 'where the time of a chunk goes, kernel by kernel',
}
ALONE = ('estimate', 'compile')  # need no card
ASKED = ('compile', 'sanitize', 'profile', 'ways')  # run only when named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument('--only', default='', help='sections by comma: ' + ', '.join(SECTIONS))
    parser.add_argument('--quick', action='store_true', help='fewer shapes and precisions')
    parser.add_argument('--family', default='', help='networks by comma: pi05, groot_n15')
    parser.add_argument('--dry', action='store_true',
                        help='tiny sizes, interpreted on the CPU; times mean nothing')
    parser.add_argument('--tune', action='store_true',
                        help='time every tile of every shape and write tiles.json')
    parser.add_argument('--ways', default='', help='kernels that tiles.json does not choose yet, '
                        'by comma, or all: pair, turn, raw, fetch')
    parser.add_argument('--tiles', type=Path, help='where --tune writes; default: the package')
    parser.add_argument('--budget', type=float, default=BUDGET_S, metavar='SECONDS',
                        help='what would end later is left out and named')
    parser.add_argument('--json', type=Path, default=Path('runs/bench_gpu.json'),
                        help='where every figure is written')


def chosen(args: argparse.Namespace) -> list[str]:
    """Sections to run. Raises ValueError that lists the known ones."""
    wanted = [name for name in args.only.split(',') if name]
    unknown = sorted(set(wanted) - set(SECTIONS))
    if unknown:
        raise ValueError(f'--only names {", ".join(unknown)}; known are {", ".join(SECTIONS)}')
    if args.tune and not wanted:
        return ['ceilings']
    return wanted or [name for name in SECTIONS if name not in ASKED]


def runners() -> dict[str, Callable[[Any], Any]]:
    """Section -> function of the bench. Imports what needs Triton."""
    from quantvla_ros.bench import (
        gpu_attention,
        gpu_check,
        gpu_chunk,
        gpu_gemm,
        gpu_profile,
        gpu_ros,
        gpu_time,
        gpu_tune,
        gpu_ways,
    )

    def ceilings(bench: Any) -> Any:
        found = gpu_time.ceilings(bench)
        print(f'  copy {found["copy"] / 1e9:.0f} GB/s, bfloat16 {found["bfloat16"] / 1e12:.0f} '
              f'TFLOP/s, 8 bits {found["int8"] / 1e12:.0f} TOP/s')
        return found

    def gemm(bench: Any) -> Any:
        known = bench.figures.get('ceilings') or gpu_time.ceilings(bench)
        gpu_tune.compile_chosen(gpu_gemm.shapes_of(bench), bench)
        return gpu_gemm.table(bench, known)

    return {'check': gpu_check.checks, 'ceilings': ceilings, 'chunk': gpu_chunk.chunks,
            'memory': gpu_chunk.memory, 'attention': gpu_attention.table, 'gemm': gemm,
            'ros': gpu_ros.serve, 'profile': gpu_profile.profiles,
            'ways': gpu_ways.compare, 'sanitize': gpu_check.sanitize}


def make_bench(args: argparse.Namespace) -> Any:
    """What the sections share. Raises ValueError with a sentence where nothing can run."""
    import torch

    from quantvla_ros.bench.gpu_chunk import SETTINGS
    from quantvla_ros.bench.gpu_time import Bench, Deadline
    from quantvla_ros.kernels.cuda import interpreted
    from quantvla_ros.kernels.cuda.language import MISSING

    if MISSING:
        raise ValueError(MISSING)
    families = tuple(name for name in args.family.split(',') if name)
    known = tuple(dict.fromkeys(setting.family for setting in SETTINGS))
    unknown = sorted(set(families) - set(known))
    if unknown:
        raise ValueError(f'--family names {", ".join(unknown)}; known are {", ".join(known)}')
    if args.dry:
        interpreted.enter()
        return Bench(torch.device('cpu'), True, True, Deadline(args.budget), families=families)
    if interpreted.active():
        raise ValueError(f'unset {interpreted.VARIABLE}, or take --dry')
    if not torch.cuda.is_available():
        raise ValueError('no GPU that torch can use; --only estimate,compile and --dry need none')
    return Bench(torch.device('cuda'), False, args.quick, Deadline(args.budget),
                 thorough=bool(args.only) and not args.quick, families=families)


def compile_report(_: Any) -> list[dict[str, Any]]:
    """Compile for every chip; print what each kernel takes."""
    from quantvla_ros.kernels.cuda import resources

    rows = []
    for capability in resources.CHIPS:
        print(f'  sm_{capability}'.ljust(52) + 'shared  regs  stack  copies  instructions')
        for case in resources.cases(resources.chip(capability)):
            used = resources.usage(case, capability)
            rows.append(vars(used))
            print(f'    {used.name:<46} {used.shared:>7} {used.registers:>5} {used.stack:>6} '
                  f'{used.copies:>7} {used.instructions:>13}  {used.matrix} '
                  f'{resources.problem_with(used)}', flush=True)
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the sections; 1 where one of them failed, the others still run."""
    if args.dry:
        os.environ.setdefault('TRITON_INTERPRET', '1')
    wanted = chosen(args)
    found: dict[str, Any] = {}
    bench = None
    take_ways(args.ways)
    table: dict[str, Callable[[Any], Any]] = {'estimate': lambda _: estimate(),
                                              'compile': compile_report}
    if args.tune or any(name not in ALONE for name in wanted):
        from quantvla_ros.bench.gpu_time import card

        bench = make_bench(args)
        found['card'] = card(bench)
        bench.figures = found
        print('  '.join(f'{key} {value}' for key, value in found['card'].items()))
        table.update(runners())
    failed = []
    for name in wanted:
        print(f'{name}: {SECTIONS[name]}', flush=True)
        try:
            found[name] = table[name](bench)
        except Exception as error:  # a border: the sections that follow still have figures to give
            traceback.print_exc()
            found[name] = {'failed': str(error)}
            failed.append(name)
        keep(args.json, found)
    if args.tune and bench is not None:
        from quantvla_ros.bench.gpu_tune import tune
        from quantvla_ros.kernels.cuda import tiles

        path = args.tiles or tiles.FILE
        tune(bench, path)
        print(f'tiles in {path}')
    if failed:
        print(f'failed: {", ".join(failed)}')
    print(f'figures in {args.json}')
    return int(bool(failed))


def take_ways(words: str) -> None:
    """Let every plan of this run take the ways that were asked for. Raises ValueError."""
    from quantvla_ros.kernels.cuda import tiles

    wanted = tiles.WAYS if words == 'all' else [word for word in words.split(',') if word]
    tiles.ask(wanted)
    for way in wanted:
        print(f'{way}: {tiles.WAYS[way]}')


def keep(path: Path, found: dict[str, Any]) -> None:
    """Write what there is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, default=str))
