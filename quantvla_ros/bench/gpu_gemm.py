# SPDX-License-Identifier: Apache-2.0
"""Every product of the published policies against the vendor's libraries and installable peers.

Each of ours is checked against exact sums in float64 on a poisoned output before it is timed.
Times are of the product alone; quantizing the tokens is a column of its own. A peer that brings
its own quantization is timed with it, and marked +q.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.bench.gpu_time import Bench, Run, copies, microseconds, relative, tried
from quantvla_ros.kernels.cuda import launch, tiles
from quantvla_ros.kernels.cuda.launch import Take, Tokens, Workspace
from quantvla_ros.kernels.cuda.pack import DeviceWeight, from_nibbles, padded_columns, to_device
from quantvla_ros.kernels.weights import PackedWeight

# (tokens, rows, columns): what a chunk of pi0.5 (50 and 10 actions) and of GR00T N1.5 multiplies
SHAPES = (
    (968, 16384, 2048), (968, 2048, 16384), (968, 2048, 2048), (968, 2560, 2048),
    (768, 1152, 1152), (768, 4304, 1152), (768, 1152, 4304),
    (50, 4096, 1024), (50, 1024, 4096), (50, 2048, 1024), (50, 1024, 2048), (50, 2560, 1024),
    (10, 4096, 1024), (10, 1024, 4096), (10, 2560, 1024), (10, 1024, 2048),
    (560, 6144, 2048), (560, 2048, 6144), (560, 2048, 2048), (560, 1024, 2048),
    (560, 8192, 2048), (560, 2048, 8192), (560, 1536, 2048),
    (49, 1536, 1536), (49, 6144, 1536), (49, 1536, 6144), (49, 4608, 1536),
    (1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (1, 16384, 2048),
)
PEERED = ((968, 16384, 2048), (968, 2048, 16384), (768, 1152, 4304), (50, 4096, 1024),
          (50, 1024, 4096), (560, 2048, 6144), (49, 6144, 1536), (1, 4096, 4096))
QUICK = (SHAPES[0], SHAPES[1], SHAPES[7], SHAPES[8], SHAPES[12], SHAPES[24])
DRY = ((5, 96, 128), (20, 64, 256))
PEERS = ('humming w8a8 +q', 'humming w4a8 +q', 'gemlite +q', 'torchao +q')
OURS = {'w8a8': (8, 0), 'w4a8': (4, 0), 'w4a8g128': (4, 128)}
BOUND = 4e-3  # bfloat16 keeps 8 bits: half a step is 2e-3


def random_weight(bits: int, group: int, rows: int, columns: int, bench: Bench) -> DeviceWeight:
    """Uniform codes in the kernel's order, made on the device."""
    if bits == 8:
        data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=bench.device)
    else:
        data = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8,
                             device=bench.device)
    count = columns // group if group else 1
    scales = torch.rand(rows, count, device=bench.device) + 0.5
    return to_device(PackedWeight(bits, (rows, columns), group, data, scales), bench.device)


def random_tokens(rows: int, columns: int, kp: int, bench: Bench) -> Tokens:
    """Codes with zeros behind the columns, and scales."""
    data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=bench.device)
    return Tokens(F.pad(data, (0, kp - columns)), torch.rand(rows, device=bench.device) * 0.01)


def exact(tokens: Tokens, weight: DeviceWeight) -> Tensor:
    """The product in float64, from the bytes that the kernel reads."""
    codes = weight.data
    if weight.bits == 4:
        codes = from_nibbles(codes, weight.pack)
    groups = weight.scales.shape[0]
    dense = codes.double().unflatten(1, (groups, -1)) * weight.scales.T.double()[:, :, None]
    assert tokens.scale is not None
    return (tokens.data.double() * tokens.scale.double()[:, None]) @ dense.flatten(1).T[
        :, : weight.shape[0]]


def check(tokens: Tokens, weight: DeviceWeight, bench: Bench,
          tile: tiles.Tile | None = None) -> float:
    """Error of one product on an output full of NaN; infinite where it was not written."""
    out = torch.full((len(tokens.data), weight.shape[0]), torch.nan, dtype=bench.dtype,
                     device=bench.device)
    launch.run_product(tokens, weight, out, Workspace(bench.device), tile=tile)
    return relative(out, exact(tokens, weight))


def ours(shape: tuple[int, int, int], kind: str, bench: Bench,
         tile: tiles.Tile | None = None) -> tuple[float, float]:
    """(microseconds, error) of one of our products."""
    m, n, k = shape
    bits, group = OURS[kind]
    first = random_weight(bits, group, n, k, bench)
    tokens = random_tokens(m, k, padded_columns(bits, k, group), bench)
    error = check(tokens, first, bench, tile)
    if error > BOUND:
        raise RuntimeError(f'{kind} {shape} {tile}: off by {error:.1e}')
    weights = [first] + [random_weight(bits, group, n, k, bench)
                         for _ in range(copies(first.nbytes, bench) - 1)]
    out = torch.empty(m, n, dtype=bench.dtype, device=bench.device)
    workspace = Workspace(bench.device)

    def call(weight: DeviceWeight) -> Run:
        return lambda: launch.run_product(tokens, weight, out, workspace, tile=tile)

    return microseconds([call(weight) for weight in weights], bench), error


def quantizing(m: int, k: int, bench: Bench, *, rotate: bool) -> float:
    """Microseconds of turning floats into tokens."""
    kp = padded_columns(8, k, 0)
    x = torch.randn(m, k, device=bench.device).to(bench.dtype)
    out = Tokens(torch.empty(m, kp, dtype=torch.int8, device=bench.device),
                 torch.empty(m, device=bench.device))
    take = Take(8, kp, rotate)
    return microseconds([lambda: launch.make_tokens(x, k, take, out)], bench)


def libraries(shape: tuple[int, int, int], bench: Bench) -> dict[str, Callable[[], float]]:
    """Name -> how to time it: what torch itself brings, and peers that may be installed."""
    m, n, k = shape
    device, count = bench.device, copies(n * k * 2, bench)
    x = torch.randn(m, k, device=device).to(bench.dtype)

    def floats() -> float:
        weights = [torch.randn(n, k, device=device).to(bench.dtype) for _ in range(count)]
        return microseconds([partial(F.linear, x, w) for w in weights], bench)

    def int_mm() -> float:
        codes = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device).t()
                   for _ in range(copies(n * k, bench))]
        return microseconds([partial(torch._int_mm, codes, w) for w in weights], bench)

    def fp8() -> float:
        eight = torch.float8_e4m3fn
        tokens, one = x.to(eight), torch.ones((), device=device)
        weights = [torch.randn(n, k, device=device).to(eight).t()
                   for _ in range(copies(n * k, bench))]
        return microseconds([partial(
            torch._scaled_mm, tokens, w, scale_a=one, scale_b=one, out_dtype=bench.dtype)
            for w in weights], bench)

    def humming(bits: int) -> float:
        from humming.layer import HummingLayer

        def made() -> Any:
            layer = HummingLayer(shape_n=n, shape_k=k, weight_config={'dtype': f'int{bits}'},
                                 input_config={'dtype': 'int8'}, torch_dtype=bench.dtype)
            layer = layer.to(device)
            layer.load_from_unquantized(_linear(n, k, bench).weight.data)
            layer.transform()
            return layer

        return _modules(made, x, bench, min(32, copies(n * k * bits // 8, bench)))

    def gemlite() -> float:
        from gemlite import helper

        make = getattr(helper, 'A8W8_INT8_dynamic', None) or helper.A8W8_int8_dynamic
        return _modules(lambda: make(device=str(device)).from_linear(_linear(n, k, bench)), x,
                        bench)

    def torchao() -> float:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        def made() -> Any:
            linear = _linear(n, k, bench)
            quantize_(linear, Int8DynamicActivationInt8WeightConfig())
            return torch.compile(linear)

        return _modules(made, x, bench)

    found = {'bfloat16': floats, '_int_mm': int_mm, 'fp8': fp8}
    # peers compile or tune for seconds at every shape
    if bench.thorough and shape in PEERED:
        found |= {'humming w8a8 +q': partial(humming, 8), 'humming w4a8 +q': partial(humming, 4),
                  'gemlite +q': gemlite, 'torchao +q': torchao}
    return found


def _linear(n: int, k: int, bench: Bench) -> nn.Linear:
    return nn.Linear(k, n, bias=False, device=bench.device, dtype=bench.dtype)


def _modules(make: Callable[[], Any], x: Tensor, bench: Bench, count: int = 3) -> float:
    """Layers of a peer; a few, where each is compiled anew, stay partly in the cache."""
    layers = [make() for _ in range(1 if bench.dry else count)]
    return microseconds([partial(layer, x) for layer in layers], bench)


def row(shape: tuple[int, int, int], bench: Bench, ceiling: dict[str, float]) -> dict[str, Any]:
    """Measure one shape."""
    m, n, k = shape
    found: dict[str, Any] = {'shape': shape, 'us': {}, 'error': {}, 'missing': {}, 'share': {}}
    for kind in OURS:
        if OURS[kind][1] and k % OURS[kind][1]:
            found['missing'][kind] = f'{k} columns do not divide by the group'
            continue
        found['us'][kind], found['error'][kind] = ours(shape, kind, bench)
        moved = n * k * OURS[kind][0] / 8 + m * k + m * n * 2
        floor = max(moved / ceiling['copy'], 2.0 * m * n * k / ceiling['int8'])
        found['share'][kind] = floor * 1e6 / found['us'][kind]
    found['us']['tokens'] = quantizing(m, k, bench, rotate=False)
    if k % 64 == 0:
        found['us']['tokens rotated'] = quantizing(m, k, bench, rotate=True)
    for name, run in libraries(shape, bench).items():
        value, why = tried(run)
        if why:
            found['missing'][name] = why
        else:
            found['us'][name] = value
    return found


def shapes_of(bench: Bench) -> tuple[tuple[int, int, int], ...]:
    """What the table shows."""
    return DRY if bench.dry else QUICK if bench.quick else SHAPES


def table(bench: Bench, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Print and return all rows that fit into the time."""
    peers = PEERS if bench.thorough else ()
    columns = (*OURS, 'tokens', 'tokens rotated', 'bfloat16', '_int_mm', 'fp8')
    print('  microseconds; in brackets the share of the ceiling that bytes or operations set')
    print('  ' + 'tokens x rows x columns'.ljust(24) + ''.join(c.rjust(15) for c in columns))
    rows = []
    for shape in shapes_of(bench):
        if bench.deadline.left_s() < 20:
            print(f'  {shape}: not measured, the time is up')
            continue
        found = row(shape, bench, ceiling)
        rows.append(found)
        cells = ''
        for column in columns:
            text = f'{found["us"][column]:.2f}' if column in found['us'] else '-'
            if column in found['share']:
                text += f' ({100 * found["share"][column]:.0f} %)'
            cells += text.rjust(15)
        print('  ' + 'x'.join(map(str, shape)).ljust(24) + cells + ''.join(
            f'  {peer} {found["us"][peer]:.2f}' for peer in peers if peer in found['us']),
            flush=True)
    _say_missing(rows)
    return rows


def _say_missing(rows: list[dict[str, Any]]) -> None:
    reasons = {name: why for found in rows for name, why in found['missing'].items()}
    for name, why in reasons.items():
        print(f'  {name} is missing in places: {why}')
    wins = {kind: sum(r['us'][kind] < r['us']['bfloat16'] for r in rows
                      if kind in r['us'] and 'bfloat16' in r['us']) for kind in OURS}
    print('  faster than bfloat16: ' + ', '.join(
        f'{kind} on {count} of {len(rows)}' for kind, count in wins.items()))
