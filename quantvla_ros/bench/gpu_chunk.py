# SPDX-License-Identifier: Apache-2.0
"""Whole chunks of full-size networks at every precision, and their memory; random weights.

The baseline is the best bfloat16 that this package builds: the same plan, graphs, fused norms,
split attention and modulation tables, products by the vendor's library. Plain eager modules are
reported apart, because most of what separates them from any of these has nothing to do with bits.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from quantvla_ros.bench import gpu_tiny
from quantvla_ros.bench.gpu_source import Precision, RandomSource, resized
from quantvla_ros.bench.gpu_time import Bench, Deadline, milliseconds, tried
from quantvla_ros.kernels.cuda import launch, tiles
from quantvla_ros.kernels.cuda.tiles import Early
from quantvla_ros.policies.cuda_engine import Graphs, make_plan
from quantvla_ros.policies.full_size import full_size

FLOAT = Precision('float')
NOWHERE, LOOP, BOTH = Early(), Early(loop=True), Early(prefix=True, loop=True)
PRECISIONS = (FLOAT, Precision('w8a8'), Precision('w4a8'), Precision('w4a8', rotate=True),
              Precision('w8a8', rotate=True), Precision('w4a8g128'), Precision('w4a4'))
CAMERAS = {'pi05': 3, 'pi0': 3, 'groot_n15': 2}
WORDS_SAID = {'pi05': 200, 'pi0': 48, 'groot_n15': 48}


@dataclass(frozen=True)
class Setting:
    """One line of a table: a family, its actions and steps."""

    family: str
    horizon: int
    steps: int

    @property
    def name(self) -> str:
        """Name in tables."""
        return f'{self.family}, {self.steps} steps of {self.horizon} actions'


SETTINGS = (Setting('pi05', 50, 10), Setting('pi05', 10, 10), Setting('groot_n15', 16, 4),
            Setting('groot_n15', 16, 8))


def settings_of(bench: Bench) -> tuple[Setting, ...]:
    """The lines of the networks that were asked for."""
    return tuple(s for s in SETTINGS if not bench.families or s.family in bench.families)


def first_of_each(bench: Bench) -> tuple[Setting, ...]:
    """One setting of each of them."""
    found = {s.family: s for s in reversed(settings_of(bench))}
    return tuple(found.values())[::-1]


def network(setting: Setting, bench: Bench) -> Any:
    """The family's modules without storage; tiny ones for a dry run."""
    if bench.dry:
        with torch.device('meta'):
            return gpu_tiny.MODELS[setting.family]()
    return resized(full_size(setting.family), setting.horizon)


def build(setting: Setting, precision: Precision, bench: Bench, early: Early) -> Graphs:
    """Plan and capture one network with random weights and a prompt of full length."""
    model = network(setting, bench)
    source = RandomSource(setting.family, precision, bench.device, bench.dtype, model)
    words = 4 if bench.dry else WORDS_SAID[setting.family]
    cameras = 2 if bench.dry else CAMERAS[setting.family]
    steps = min(setting.steps, 2) if bench.dry else setting.steps
    with torch.inference_mode():
        plan = make_plan(setting.family, source, model.config, steps=steps, cameras=cameras,
                         words=words, early=early)
        fill(plan, cameras * model.config.vision.tokens, setting.family)
        return Graphs(plan, bench.device)


def fill(plan: Any, patches: int, family: str) -> None:
    """Random inputs of full length."""
    i = plan.inputs
    i.images.random_(0, 256)
    i.words.normal_()
    i.length.fill_(plan.capacity)
    i.state.normal_()
    i.x.normal_()
    if family == 'groot_n15':
        i.order[:patches].copy_(torch.arange(patches))


def measure(
    setting: Setting, precision: Precision, bench: Bench, early: Early
) -> dict[str, Any]:
    """Milliseconds of prefix and loop, and whether what came out is finite."""
    graphs = build(setting, precision, bench, early)
    with torch.inference_mode():
        if bench.dry:
            graphs.prefix()
            graphs.denoise()
            times = {'prefix': float('nan'), 'loop': float('nan')}
        else:
            repeats = 10 if bench.quick else 30
            times = {'prefix': milliseconds(graphs.prefix, repeats),
                     'loop': milliseconds(graphs.denoise, repeats)}
            graphs.plan.inputs.x.normal_()
            graphs.prefix()
            graphs.denoise()
            torch.cuda.synchronize()
        finite = bool(torch.isfinite(graphs.plan.inputs.x).all())
    if not finite:
        raise RuntimeError(f'{setting.name} {precision.name}: the chunk is not finite')
    return {**times, 'whole': times['prefix'] + times['loop'], 'weights': graphs.plan.nbytes,
            'scratch': graphs.plan.machine.nbytes, 'early': vars(early)}


def free() -> None:
    """Give memory of the last network back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def eager(setting: Setting, bench: Bench) -> dict[str, Any]:
    """The modules as they stand, launched one by one."""
    model = network(setting, bench).to(bench.dtype).to_empty(device=bench.device).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    c, steps = model.config, min(setting.steps, 2) if bench.dry else setting.steps
    cameras = 2 if bench.dry else CAMERAS[setting.family]
    side, patches = c.vision.image, cameras * c.vision.tokens
    images = torch.randn(cameras, 3, side, side, device=bench.device).to(bench.dtype)
    words = torch.arange(4 if bench.dry else WORDS_SAID[setting.family], device=bench.device)
    if setting.family == 'groot_n15':
        places = torch.full((patches,), -1, device=bench.device)
        words = torch.cat([places, words])
    state = torch.zeros(getattr(c, 'state', 1), device=bench.device, dtype=bench.dtype)
    source = RandomSource(setting.family, FLOAT, bench.device, bench.dtype, model)
    conditions = [cast(condition, bench.dtype) for condition in source.conditions(steps)]

    @torch.inference_mode()
    def run() -> None:
        x = torch.randn(1, c.horizon, c.action, device=bench.device).to(bench.dtype)
        context = model.prefix(images, words, state)
        for step in range(steps):
            x = x + model.velocity(context, x, conditions[step]) / steps

    if bench.dry:
        run()
        return {'whole': float('nan')}
    run()
    return {'whole': milliseconds(run, 5)}


def cast(condition: Any, dtype: torch.dtype) -> Any:
    """Conditions in another type."""
    if isinstance(condition, torch.Tensor):
        return condition.to(dtype)
    return type(condition)(condition.features.to(dtype),
                           [block.to(dtype) for block in condition.blocks],
                           condition.last.to(dtype))


def chunks(bench: Bench) -> dict[str, Any]:
    """Print and return the table of whole chunks."""
    chip = launch.chip_of(bench.device)
    first = first_of_each(bench)
    settings = first if bench.quick or bench.dry else settings_of(bench)
    if not bench.dry:
        warm_caches(settings, bench)
    found: dict[str, Any] = {}
    for setting in settings:
        rows: dict[str, Any] = {}
        whole = setting in first and not (bench.quick or bench.dry)
        for precision in PRECISIONS if whole or bench.thorough else PRECISIONS[:4]:
            if bench.deadline.left_s() < 30:
                print(f'  {setting.name} {precision.name}: not measured, the time is up')
                continue
            known = tiles.early(precision.kind, chip, setting.family)
            tried_too = whole and chip.hopper and precision in PRECISIONS[:3]
            also = {NOWHERE, LOOP, BOTH} - {known} if tried_too else set()
            for early in (known, *also):
                value, why = tried(partial(measure, setting, precision, bench, early))
                free()
                name = precision.name if early == known else f'{precision.name}, {begin(early)}'
                rows[name] = value if not why else {'missing': why}
        rows['eager modules'], why = tried(partial(eager, setting, bench))
        if why:
            rows['eager modules'] = {'missing': why}
        free()
        found[setting.name] = rows
        show(setting, rows)
    return found


def begin(early: Early) -> str:
    """In which graphs launches begin early, in words."""
    graphs = [name for name, yes in vars(early).items() if yes]
    return f'{" and ".join(graphs)} early' if graphs else 'nothing early'


def show(setting: Setting, rows: dict[str, Any]) -> None:
    """Print one setting: times, and ratios to the best bfloat16 of the same run."""
    floats = [r['whole'] for name, r in rows.items() if name.startswith('float') and 'whole' in r]
    best = min(floats, default=float('nan'))
    base = next((r['weights'] for r in rows.values() if 'weights' in r), 0)
    print(f'  {setting.name}')
    for name, r in rows.items():
        if 'missing' in r:
            print(f'    {name:<28} not measured: {r["missing"]}')
            continue
        parts = (f'prefix {r["prefix"]:7.3f}  loop {r["loop"]:7.3f}  weights '
                 f'{r["weights"] / max(base, 1):.3f}x' if 'prefix' in r else '')
        shown = name.replace('float', 'bfloat16')
        print(f'    {shown:<28} {r["whole"]:8.3f} ms  {best / r["whole"]:5.2f}x  {parts}',
              flush=True)


# processes of their own ------------------------------------------------------------------------


def child(setting: Setting, precision: Precision, *, base: int, warm: bool = False) -> Any:
    """Start a process that builds one network, runs it, and tells what memory it took."""
    command = [sys.executable, '-m', 'quantvla_ros.bench.gpu_chunk', json.dumps({
        'setting': vars(setting), 'precision': vars(precision), 'base': base, 'warm': warm,
        'ways': tiles.asked()})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def warm_caches(settings: tuple[Setting, ...], bench: Bench) -> None:
    """Compile most kernels in parallel: a run then finds them in Triton's cache on disk.

    Steps share all kernels and precisions many, so one of each kind is built.
    """
    free_bytes, _ = torch.cuda.mem_get_info()
    room = max(1, min(int(free_bytes // (9 << 30)), os.cpu_count() or 2))
    first = {(s.family, s.horizon): s for s in reversed(settings)}.values()
    kinds = [FLOAT, Precision('w8a8'), Precision('w4a8', rotate=True)]
    waiting = [(s, p) for s in reversed(list(first)) for p in kinds]
    running: list[Any] = []
    while waiting or running:
        while waiting and len(running) < room:
            running.append(child(*waiting.pop(0), base=0, warm=True))
        ended = running.pop(0)
        _, errors = ended.communicate(timeout=max(30.0, bench.deadline.left_s()))
        if ended.returncode:
            print('  compiling ahead failed: ' + (errors.strip().splitlines() or ['?'])[-1])


def memory(bench: Bench) -> dict[str, Any]:
    """Peak device memory of a whole process at each precision."""
    found: dict[str, Any] = {}
    if bench.dry:
        print('  needs a card: a process on the CPU has no device memory')
        return found
    for setting in first_of_each(bench):
        for precision in PRECISIONS[2::-1]:
            if bench.deadline.left_s() < 20:
                print(f'  {setting.family} {precision.name}: not measured, the time is up')
                continue
            free()
            left, total = torch.cuda.mem_get_info()
            process = child(setting, precision, base=total - left)
            out, errors = process.communicate(timeout=max(30.0, bench.deadline.left_s()))
            if process.returncode:
                print(f'  {setting.family} {precision.name}: '
                      + (errors.strip().splitlines() or ['?'])[-1])
                continue
            found[f'{setting.family} {precision.name}'] = figures = json.loads(out)
            print(f'  {setting.family:<10} {precision.name.replace("float", "bfloat16"):<14} '
                  f'peak {figures["peak_mib"]:6.0f} MiB of the whole process; of it weights '
                  f'{figures["weights_mib"]:6.0f}, scratch {figures["scratch_mib"]:4.0f}, else '
                  f'allocated {figures["other_mib"]:4.0f}, held by the allocator alone '
                  f'{figures["slack_mib"]:4.0f}, a bare context {figures["context_mib"]:4.0f}',
                  flush=True)
    print('  (published for pi0.5 by FoldQuantVLA: 4553 MiB; goal: under 2560)')
    return found


def main(argument: str) -> int:
    """Build and run one network; print its memory as JSON."""
    asked = json.loads(argument)
    tiles.ask(asked['ways'])
    setting, precision = Setting(**asked['setting']), Precision(**asked['precision'])
    bench = Bench(torch.device('cuda'), False, True, Deadline(600))
    chip = launch.chip_of(bench.device)
    context = bare_context(asked['base'])
    early = tiles.early(precision.kind, chip, setting.family)
    graphs = build(setting, precision, bench, early)
    if asked['warm']:  # only for what it leaves in the cache
        del graphs
        free()
        for other in {NOWHERE, LOOP, BOTH} - {early} if chip.hopper else ():
            build(setting, precision, bench, other)
            free()
        return 0
    mib = 1 / (1 << 20)
    loaded = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        graphs.prefix()
        graphs.denoise()
    torch.cuda.synchronize()
    left, total = torch.cuda.mem_get_info()
    own = total - left - asked['base']
    peak = own - torch.cuda.memory_reserved() + max(loaded, torch.cuda.max_memory_reserved())
    weights, scratch = graphs.plan.nbytes, graphs.plan.machine.nbytes
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    print(json.dumps({name: value * mib for name, value in {
        'peak_mib': peak, 'serving_mib': own, 'weights_mib': weights, 'scratch_mib': scratch,
        'other_mib': allocated - weights - scratch, 'slack_mib': reserved - allocated,
        'context_mib': context}.items()}))
    return 0


def bare_context(base: int) -> int:
    """Bytes that this process holds on the device before it holds anything of use."""
    torch.zeros(1, device='cuda')
    left, total = torch.cuda.mem_get_info()
    return total - left - base - torch.cuda.memory_reserved()


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
