# SPDX-License-Identifier: Apache-2.0
"""Whole networks as plans against their modules: float, integer, any prompt, with guidance."""

import copy

import pytest
import torch
from cases import error

from quantvla_ros.bench import gpu_tiny as tiny
from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda import launch, launch_attention, tiles
from quantvla_ros.kernels.cuda.tiles import Tile
from quantvla_ros.policies import flow, savings
from quantvla_ros.policies.base import DeviceError
from quantvla_ros.policies.loading import HeldLayer
from quantvla_ros.quant.linear import QuantLinear, replace_linears

FAMILIES = list(tiny.MODELS)


def served(made, images, words, state, noise, guidance=None):
    scene = made.prefix(images, words.tolist(), state)
    return made.chunk(scene, noise, guidance)


@pytest.mark.parametrize('family', FAMILIES)
def test_float_plan_computes_what_the_modules_compute(family, device):
    model = tiny.made(family)
    inputs = tiny.inputs(model)
    wanted = tiny.chunk(model, *inputs)
    assert error(served(tiny.engine(family, model, device), *inputs), wanted) < 2e-5


@pytest.mark.parametrize(('family', 'scheme', 'options'), [
    ('pi05', 'w4a8', {'rotate': True, 'smooth': True}), ('pi0', 'w8a8', {}),
    ('groot_n15', 'w4a4', {'rotate': True}),
])
def test_integer_plan_rounds_like_the_layers_on_the_cpu(family, scheme, options, device):
    model = tiny.made(family)
    inputs = tiny.inputs(model)
    exact = tiny.chunk(model, *inputs)
    layers = tiny.quantized(model, scheme, **options)
    there = copy.deepcopy(model)
    replace_linears(there, layers, QuantLinear)
    wanted = tiny.chunk(there, *inputs)
    replace_linears(model, layers, HeldLayer)
    seen = served(tiny.engine(family, model, device), *inputs)
    rounding = float((wanted - exact).abs().mean())
    # a code that falls on the other side of a step moves a chunk by a share of the rounding
    assert rounding > 1e-4
    assert float((seen - wanted).abs().mean()) < 0.2 * rounding


def test_layers_of_one_mlp_may_differ(device):
    model = tiny.made('pi05')
    inputs = tiny.inputs(model)
    layers = tiny.quantized(model, 'w8a8')
    mixed = {name: layer for name, layer in layers.items()
             if not name.endswith(('up_proj', 'k_proj', 'fc2'))}
    there = copy.deepcopy(model)
    replace_linears(there, mixed, QuantLinear)
    wanted = tiny.chunk(there, *inputs)
    replace_linears(model, mixed, HeldLayer)
    assert error(served(tiny.engine('pi05', model, device), *inputs), wanted) < 2e-2


def test_split_attention_changes_nothing(device, monkeypatch):
    model = tiny.made('groot_n15')
    inputs = tiny.inputs(model)
    wanted = tiny.chunk(model, *inputs)
    monkeypatch.setattr(launch_attention, 'choose_split',
                        lambda *_: launch_attention.Split(16, 16, 2, 4, 2))
    assert error(served(tiny.engine('groot_n15', model, device), *inputs), wanted) < 2e-5


def test_prompts_of_any_length_run_on_memory_planned_once(device):
    model = tiny.made('pi05')
    shapes = [tiny.inputs(model, words) for words in (5, 2)]
    wanted = [tiny.chunk(copy.deepcopy(model), *inputs) for inputs in shapes]
    made = tiny.engine('pi05', model, device)
    seen = [served(made, *shapes[0])]
    made.graphs.plan.machine.freeze()
    first = made._current
    seen.append(served(made, *shapes[1]))
    assert [error(*pair) < 2e-5 for pair in zip(seen, wanted, strict=True)] == [True, True]
    with pytest.raises(ValueError, match='the plan has room for 7'):
        served(made, *tiny.inputs(model, 6))
    again = made.chunk(first, shapes[0][-1])  # a scene serves again after another one
    assert torch.equal(again, seen[0])


def test_guidance_pulls_like_the_flow_loop(device):
    model = tiny.made('pi0')
    images, words, state, noise = tiny.inputs(model)
    guidance = flow.PrefixGuidance(torch.randn(noise.shape),
                                   torch.tensor([1.0, 0.5]))
    conditions = savings.condition_table(model, tiny.STEPS)
    with torch.inference_mode():
        context = model.prefix(images.float() / 255 * 2 - 1, words, state)
        wanted = flow.denoise(lambda x, step: -model.velocity(context, x, conditions[step]),
                              noise, tiny.STEPS, guidance)
    free = tiny.chunk(model, images, words, state, noise)  # the engine takes the model along
    made = tiny.engine('pi0', model, device)
    scene = made.prefix(images, words.tolist(), state)
    assert error(made.chunk(scene, noise, guidance), wanted) < 2e-5
    assert error(made.chunk(scene, noise), free) < 2e-5  # nothing of it is left behind


def test_failed_device_is_told_once_and_never_used_again(device):
    made = tiny.engine('pi05', tiny.made('pi05'), device)
    made.device = torch.device('cuda')
    with pytest.raises(DeviceError, match='illegal memory access'), made._guarded():
        raise RuntimeError('CUDA error: an illegal memory access was encountered\nmore')
    with pytest.raises(DeviceError, match='restart the node'):
        made.prefix(*tiny.inputs(made.model)[:3])


@pytest.fixture
def asked():
    """Ways that a test asks for, and nobody after it."""
    yield tiles.ask
    tiles.ask(())


def test_all_ways_together_give_what_the_proven_kernels_give(device, asked, monkeypatch):
    model = tiny.made('pi05')
    inputs = tiny.inputs(model)
    layers = tiny.quantized(model, 'w4a8')
    monkeypatch.setattr(tiles, 'stored', dict)  # on a card too: none but what is asked for
    monkeypatch.setattr(tiles, 'by_rule', lambda *_: Tile(16, 64, 32, 2, 4, 2))
    monkeypatch.setattr(launch_attention, 'choose_split',
                        lambda *_: launch_attention.Split(16, 16, 2, 4, 1))
    chunks = []
    for ways in ([], list(tiles.WAYS)):
        asked(ways)
        here = copy.deepcopy(model)
        replace_linears(here, copy.deepcopy(layers), HeldLayer)
        made = tiny.engine('pi05', here, device)
        chunks.append(served(made, *inputs))
        assert made.graphs.plan.machine.ways == set(ways)
    assert error(*chunks) < 2e-5


def test_unknown_way_is_refused(asked):
    with pytest.raises(ValueError, match='no such ways: faster; known are pair, turn'):
        asked(['faster'])


def test_hadamard_signs_are_those_of_the_reference(device):
    product = launch.signs(device).float().cpu() / 8
    assert torch.equal(product, reference.block_hadamard(torch.eye(64), 64))
