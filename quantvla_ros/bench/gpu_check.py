# SPDX-License-Identifier: Apache-2.0
"""Is what runs on this card right? Products, tokens, attention, whole networks, before any time.

References are float64, or the modules in float32 on the CPU; outputs start as NaN. Raises when
all is printed and a figure was beyond its bound.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.bench import gpu_gemm, gpu_tiny
from quantvla_ros.bench.gpu_product import Call, Products, Shape
from quantvla_ros.bench.gpu_time import Bench, relative
from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda import launch, tiles
from quantvla_ros.kernels.cuda.launch import Take, Tokens
from quantvla_ros.kernels.cuda.launch_attention import (
    Keys,
    Parts,
    Split,
    run_attend,
    run_join,
)
from quantvla_ros.kernels.cuda.pack import padded_columns
from quantvla_ros.kernels.cuda.tiles import Tile
from quantvla_ros.policies.loading import HeldLayer
from quantvla_ros.quant.linear import QuantLinear, replace_linears

BULKS = ('', 'bulk', 'overlapped')
FAMILIES = ('pi05', 'pi0', 'groot_n15')


def checks(bench: Bench) -> dict[str, float]:
    """Print and return the error of everything."""
    torch.manual_seed(int.from_bytes(os.urandom(4), 'little'))  # fresh inputs each time
    errors: dict[str, float] = {}
    wrong = []
    for part in (_products, _followed, _tokens, _attention, _networks):
        for name, (error, bound) in part(bench).items():
            print(f'  {name:<44} {error:.1e}  (bound {bound:.0e})', flush=True)
            errors[name] = error
            if not error <= bound:
                wrong.append(f'{name} is off by {error:.2e}; {bound:.0e} is allowed')
    if wrong:
        raise RuntimeError('\n'.join(wrong))
    return errors


def _products(bench: Bench) -> dict[str, tuple[float, float]]:
    found = {}
    bound = 1e-6 if bench.dry else gpu_gemm.BOUND
    for kind, (bits, group) in gpu_gemm.OURS.items():
        for m, n, k in ((3, 70, 256), (50, 200, 1152), (130, 384, 768)):
            if bench.dry and m > 3:
                continue
            for split, bulk in ((1, 0), (3, 0), (1, 1), (3, 1)):
                if bulk and not launch.chip_of(bench.device).bulk:
                    continue
                weight = gpu_gemm.random_weight(bits, group, n, k, bench)
                tokens = gpu_gemm.random_tokens(m, k, padded_columns(bits, k, group), bench)
                error = gpu_gemm.check(tokens, weight, bench, Tile(16, 64, 64, 2, 4, split, bulk))
                name = f'product {kind} {m}x{n}x{k} split {split}' + (' bulk' if bulk else '')
                found[name] = error, bound
    return found


def _followed(bench: Bench) -> dict[str, tuple[float, float]]:
    """Products of fused.py and overlapped.py, each at the first tile of every kind it can take."""
    found = {}
    shapes = ((5, 96, 256, 'pair'),) if bench.dry else (
        (50, 2304, 1536, 'pair'), (50, 1024, 3072, 'raw'), (50, 2560, 512, 'turned'),
        (50, 2304, 1536, ''), (200, 256, 1536, ''), (200, 512, 1536, 'pair'),
        (200, 1280, 512, 'turned'))
    for kind in ('w8a8', 'w4a8'):
        for m, n, k, follows in shapes:
            shape = Shape(m, n, k, kind, follows)
            products = Products(shape, bench, 1)
            wanted = products.wanted()
            first: dict[int, Tile] = {}
            chip = launch.chip_of(bench.device)
            for tile in tiles.candidates(products.problem, chip):
                if tile.split == 1 or follows == 'raw':
                    first.setdefault(tile.bulk, tile)
            kinds = 1 + chip.bulk + tiles.overlaps(products.problem, chip)
            if len(first) < kinds:
                raise RuntimeError(f'{shape}: of some kind no tile would be checked')
            for bulk, tile in first.items():
                call = Call(shape, tile, bench.dtype, bench.device)
                name = f'{follows or "product"} {kind} {m}x{n}x{k} {BULKS[bulk]}'
                found[name] = products.error(call, wanted), 1e-6 if bench.dry else gpu_gemm.BOUND
    return found


def _tokens(bench: Bench) -> dict[str, tuple[float, float]]:
    """Share of codes that differ from the reference."""
    found = {}
    for rotate in (False, True):
        x = torch.randn(4, 256 if bench.dry else 2048)
        k = x.shape[1]
        out = Tokens(torch.full((4, k), -128, dtype=torch.int8, device=bench.device),
                     torch.full((4,), torch.nan, device=bench.device))
        launch.make_tokens(x.to(bench.device), k, Take(8, k, rotate), out)
        wanted, _ = reference.quantize_activations(
            reference.block_hadamard(x, 64) if rotate else x)
        different = float((out.data.cpu() != wanted).float().mean())
        found[f'tokens{" rotated" if rotate else ""}, share of other codes'] = (
            different, 0.01 if rotate else 0.0)
    return found


def softmax(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention in float64: q (T, heads * D), one head of keys and values (S, D)."""
    parts = q.double().unflatten(1, (heads, -1)).transpose(0, 1)
    logits = parts @ k.double().T / k.shape[1] ** 0.5
    return (logits.softmax(-1) @ v.double()).transpose(0, 1).flatten(1)


def _attention(bench: Bench) -> dict[str, tuple[float, float]]:
    heads, width, tokens, known = (4, 32, 3, 40) if bench.dry else (8, 256, 50, 968)
    total = known + tokens
    q = torch.randn(tokens, heads * width, device=bench.device).to(bench.dtype)
    k, v = (torch.randn(total + 9, width, device=bench.device).to(bench.dtype)
            for _ in range(2))
    k[total:], v[total:] = torch.nan, torch.nan
    length = torch.tensor([known], dtype=torch.int32, device=bench.device)
    parts = Parts.make(4, tokens, heads, width, bench.device, bench.dtype)
    for part in (parts.values, parts.sums, parts.largest):
        part.fill_(torch.nan)
    run_attend(q, Keys(k, v, 1, width, tokens, length), heads, parts,
                      Split(16, 32, 4, 4, 2))
    out = Tokens(torch.full((tokens, heads * width), torch.nan, device=bench.device))
    run_join(parts, 4, width, Take(16, heads * width), out, bench.dtype)
    wanted = softmax(q, k[:total], v[:total], heads)
    return {'attention over a cached prefix': (relative(out.data, wanted),
                                               1e-6 if bench.dry else 4e-3)}


def _networks(bench: Bench) -> dict[str, tuple[float, float]]:
    """Tiny networks of each family: float against modules, integer against the CPU's kernels."""
    found = {}
    brief = not bench.thorough
    for family in FAMILIES[:1] if bench.dry else FAMILIES[::2] if brief else FAMILIES:
        model = gpu_tiny.made(family)
        inputs = gpu_tiny.inputs(model)
        exact = gpu_tiny.chunk(model, *inputs)
        if bench.dry or not brief:
            found[f'{family} float32 against modules'] = relative(_served(
                family, copy.deepcopy(model), inputs, bench, torch.float32), exact), 1e-4
        if bench.dry:
            continue
        found[f'{family} bfloat16 against float32'] = (
            relative(_served(family, copy.deepcopy(model), inputs, bench, torch.bfloat16),
                     exact), 0.05)
        for scheme, rotate in (('w4a8', True),) if brief else (('w8a8', False), ('w4a8', True)):
            layers = gpu_tiny.quantized(model, scheme, rotate=rotate)
            there = copy.deepcopy(model)
            replace_linears(there, layers, QuantLinear)
            wanted = gpu_tiny.chunk(there, *inputs)
            here = copy.deepcopy(model)
            replace_linears(here, layers, HeldLayer)
            seen = _served(family, here, inputs, bench, torch.float32)
            rounding = float((wanted - exact).norm())
            found[f'{family} {scheme}, as a share of its rounding'] = (
                float((seen - wanted).norm()) / rounding, 0.3)
    return found


def _served(family: str, model: Any, inputs: Any, bench: Bench, dtype: torch.dtype) -> Tensor:
    images, words, state, noise = inputs
    engine = gpu_tiny.engine(family, model, bench.device, dtype=dtype)
    scene = engine.prefix(images, words.tolist(), state)
    return engine.chunk(scene, noise).float()


def sanitize(bench: Bench) -> dict[str, Any]:
    """Run the brief checks again under compute-sanitizer, where it is installed."""
    tool = shutil.which('compute-sanitizer')
    if bench.dry or tool is None:
        reason = 'needs a card' if bench.dry else 'compute-sanitizer is not on the PATH'
        print(f'  not run: {reason}')
        return {'missing': reason}
    found = {}
    for kind in ('memcheck', 'racecheck'):
        command = [tool, '--tool', kind, '--error-exitcode', '9', sys.executable, '-m',
                   'quantvla_ros', 'bench', 'gpu', '--only', 'check', '--quick', '--ways', 'all']
        done = subprocess.run(command, capture_output=True, text=True,
                              timeout=max(30.0, bench.deadline.left_s()))
        last = [line for line in done.stdout.splitlines() if 'SUMMARY' in line]
        found[kind] = (last or ['compute-sanitizer said nothing'])[-1]
        print(f'  {kind}: {found[kind]}', flush=True)
        if done.returncode:
            raise RuntimeError(f'{kind}: status {done.returncode}\n{done.stdout[-2000:]}')
    return found
