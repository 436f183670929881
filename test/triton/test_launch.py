# SPDX-License-Identifier: Apache-2.0
"""Every launch of a whole network, bound and compiled as for a Hopper card that is not here.

Nothing runs: this finds the argument that a kernel does not take, the option that a launch does
not know, the type that a constant cannot have. What is computed, the interpreted tests show.
"""

import pytest
import torch

from quantvla_ros.bench.gpu_chunk import Setting, fill, network
from quantvla_ros.bench.gpu_source import Precision, RandomSource
from quantvla_ros.bench.gpu_time import Bench, Deadline
from quantvla_ros.kernels.cuda import ahead, launch, resources, tiles
from quantvla_ros.kernels.cuda.tiles import Early
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
