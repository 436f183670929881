# SPDX-License-Identifier: Apache-2.0
"""Every launch of a whole network, bound and compiled as for a Hopper card that is not here.

Nothing runs: this finds the argument that a kernel does not take, the option that a launch does
not know, the type that a constant cannot have. What is computed, the interpreted tests show.
"""

import dataclasses

import pytest
import torch

from quantvla_ros.bench.gpu_chunk import Setting, fill, network
from quantvla_ros.bench.gpu_source import Precision, RandomSource
from quantvla_ros.bench.gpu_time import Bench, Deadline
from quantvla_ros.kernels.cuda import (
    ahead,
    launch,
    launch_fused,
    launch_overlapped,
    overlapped,
    resources,
    tiles,
)
from quantvla_ros.kernels.cuda.launch import Epilogue, Tokens, Workspace
from quantvla_ros.kernels.cuda.tiles import Early, Tile
from quantvla_ros.policies import cuda_parts
from quantvla_ros.policies.cuda_engine import make_plan


@pytest.fixture
def launches(monkeypatch):
    """Kernels that were compiled, by name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    seen = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        seen.append(self.fn.__name__)
        return run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setattr(JITFunction, 'run', compile_only)
    monkeypatch.setattr(launch, 'chip_of', lambda device: resources.chip(90))
    monkeypatch.setattr(driver, '_active', ahead.Card(90))
    return seen


@pytest.mark.parametrize(('family', 'precision', 'early', 'ways'), [
    ('pi05', Precision('w4a8', rotate=True), Early(prefix=True, loop=True), ()),
    ('pi05', Precision('w4a8'), Early(prefix=True, loop=True), tuple(tiles.WAYS)),
    ('groot_n15', Precision('float'), Early(), ()),
])
def test_every_launch_of_a_network_binds_and_compiles(
    family, precision, early, ways, launches, monkeypatch
):
    monkeypatch.setattr(tiles, 'ways', lambda chip: frozenset(ways))
    bench = Bench(torch.device('cpu'), True, True, Deadline(600))
    model = network(Setting(family, 3, 2), bench)
    source = RandomSource(family, precision, bench.device, torch.bfloat16, model)
    with torch.inference_mode():
        plan = make_plan(family, source, model.config, steps=1, cameras=2, words=4,
                         early=early)
        assert isinstance(plan.machine, cuda_parts.Machine)
        fill(plan, 2 * model.config.vision.tokens, family)
        plan.prefix()
        plan.denoise()
    wanted = {'tokens', 'attend', 'euler'} | (set() if ways else {'turn'})
    assert wanted <= set(launches)
    assert ('product' in launches) == (precision.scheme != 'float')
    assert ('fused' in launches) == bool(ways)


@pytest.mark.parametrize('here', [
    pytest.param(True, marks=pytest.mark.skipif(
        not overlapped.HERE, reason='needs the Gluon of Triton 3.6')), False])
@pytest.mark.parametrize('bits', [8, 4])
def test_a_tile_decides_whether_steps_overlap(bits, here, launches, monkeypatch):
    monkeypatch.setattr(overlapped, 'HERE', here)  # as with another Triton
    tile, cpu = Tile(64, 64, 64, 4, 4, 2, tiles.OVERLAPPED), torch.device('cpu')
    weight = ahead.hollow_weight(bits, 0, 256, 1024)
    tokens = Tokens(torch.empty(50, 1024, dtype=torch.int8), torch.empty(50))
    out = torch.empty(50, 256, dtype=torch.bfloat16)
    launch.run_product(tokens, weight, out, Workspace(cpu),
                       Epilogue(bias=torch.empty(256), act='gelu_tanh', residual=out),
                       tile=dataclasses.replace(tile, split=1), pdl=True)
    launch_fused.run_pair(tokens, weight, out[:, :128], 'silu', tile=tile)
    launch_fused.run_raw(tokens, weight, torch.empty(2, 50, 256, dtype=torch.int32), tile)
    assert launches == (['overlapped'] * 3 if here else ['product', 'fused', 'fused'])
    assert launch_overlapped.can(tile) == here
    assert not launch_overlapped.can(dataclasses.replace(tile, bulk=1))
