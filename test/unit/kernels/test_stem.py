# SPDX-License-Identifier: Apache-2.0
"""The convolutional stem on integers: recorded, one by one and simulated, it is one thing."""

import copy
from dataclasses import replace

import pytest
import torch
from kernel_cases import far
from test_libero_program import SMALL, STEPS, chunk, eight_bits, inputs, net, plain  # noqa: F401
from torch import nn

from quantvla_ros.kernels.windows import WindowLinear
from quantvla_ros.policies.libero_parts import Part, Stored, stored_part
from quantvla_ros.policies.libero_program import ChunkProgram
from quantvla_ros.policies.libero_vla import LiberoVlaNet, initialize
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.policies.threads import take_threads
from quantvla_ros.quant.convolutions import round_convolutions
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.simulate import simulate


def part_of(module):
    return stored_part(module) if isinstance(module, Stored) else Part(
        eight_bits('', module), module.bias)


def with_stem(net, make):  # noqa: F811
    rounded = copy.deepcopy(net)
    layers = round_convolutions(rounded, libero_vla_sites(rounded), make)
    return rounded, layers


def test_all_convolutions_are_sites_and_stored_at_eight_bits(net):  # noqa: F811
    rounded, layers = with_stem(net, QuantLinear)
    convolutions = {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(layers) == convolutions and len(convolutions) == 4
    assert all(layer.scheme.name == 'w8a8' for layer in layers.values())
    assert all(isinstance(rounded.get_submodule(n), WindowLinear) for n in convolutions)


def test_layer_by_layer_and_simulated_agree_bit_for_bit(net):  # noqa: F811
    images = inputs()[0].flatten(0, 1)
    served, _ = with_stem(net, QuantLinear)
    simulated, _ = with_stem(net, simulate)
    for name in ('convs.0', 'patch'):
        x = images if name == 'convs.0' else torch.randn(2, 192, 4, 4)
        a, b, c = (m.vision.get_submodule(name)(x) for m in (served, simulated, net))
        assert torch.equal(a, b)
        assert 0 < far(a, c) < 0.02


def test_the_recorded_stem_gives_the_chunks_of_the_stem_layer_by_layer(net):  # noqa: F811
    given = inputs()
    recorded = ChunkProgram(with_stem(net, Stored)[0], part_of, STEPS)
    float_stem = ChunkProgram(net, part_of, STEPS)
    images = given[0].flatten(0, 1)
    served = with_stem(net, QuantLinear)[0].vision
    for conv, norm in zip(served.convs, served.conv_norms, strict=True):
        images = torch.nn.functional.silu(norm(conv(images)))
    patches = served.patch(images).flatten(2).transpose(1, 2) + served.position + served.view
    chunks = [chunk(program, given) for program in (recorded, float_stem)]
    assert far(chunks[0], chunks[1]) < 0.05
    assert not torch.equal(*chunks)
    recorded._prefix._steps[:] = recorded._prefix._steps[:7]  # three norms, four convolutions
    recorded._prefix._calls[:] = recorded._prefix._calls[:7]
    recorded._prefix._array = None
    recorded.prefix(*given[:3])
    # equal but for values near a tie: group norm sums in another order
    assert far(recorded.patches, patches.reshape(recorded.patches.shape)) < 0.01


def test_pixels_of_the_observation_before_are_gone(net):  # noqa: F811
    program = ChunkProgram(with_stem(net, Stored)[0], part_of, STEPS)
    first, second = inputs(), inputs()
    results = [chunk(program, given) for given in (first, second, first)]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_a_chunk_is_the_same_bits_with_one_thread_and_with_two():
    """The modulation is float32 of torch, whose sums come in another order with two threads."""
    wide = LiberoVlaNet(replace(SMALL, action_width=384, action_heads=6, action_kv_heads=2)).eval()
    initialize(wide)
    nn.init.normal_(wide.action.leave.weight, std=0.05)
    given, chunks, before = inputs(), [], torch.get_num_threads()
    for count in (2, 1):
        take_threads(count)
        chunks.append(chunk(ChunkProgram(with_stem(wide, Stored)[0], part_of, 10), given))
    torch.set_num_threads(before)
    assert torch.equal(*chunks)


@pytest.mark.parametrize('when', ['kept', 'let go'])
def test_a_context_is_copied_only_while_somebody_has_it(net, when):  # noqa: F811
    program, given = ChunkProgram(net, part_of, STEPS), inputs()
    kept = [program.prefix(*given[:3])]
    first = kept[0] if when == 'kept' else None
    kept.clear()
    program.prefix(*inputs()[:3])
    assert first is None or first.kept is not None
    if first is not None:  # and serves again behind another one
        again = program.prefix(*given[:3])
        noise = given[3]
        assert torch.equal(program.velocity(first, noise, 0), program.velocity(again, noise, 0))
