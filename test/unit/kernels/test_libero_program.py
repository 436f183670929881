# SPDX-License-Identifier: Apache-2.0
"""The recorded form of the shipped network computes what the network computes."""

import copy

import pytest
import torch
from kernel_cases import far, packed
from torch import nn

from quantvla_ros.kernels import dispatch, weights
from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_parts import Part, recordable
from quantvla_ros.policies.libero_program import ChunkProgram
from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.transforms import InputTransform

SMALL = VlaConfig(image=32, views=2, words=3, vision_width=128, vision_layers=1, vision_mlp=128,
                  width=256, layers=2, heads=4, kv_heads=2, mlp=192, action_width=128,
                  action_layers=2, action_heads=2, action_kv_heads=1, action_mlp=128, chunk=4)
STEPS = 3


def eight_bits(name, linear):
    del name
    return eight_bits_of(linear.weight.detach())


def eight_bits_of(w):
    if min(w.shape) < 16:
        return weights.keep(w)
    scales = w.abs().amax(1) / 127
    return weights.pack(torch.round(w / scales[:, None]).long(), scales, 8)


def mixed(name, linear):
    """Rows of two widths in another order, so that nothing can be stacked."""
    whole = eight_bits(name, linear)
    if whole.bits == 16:
        return whole
    order, half = torch.randperm(whole.shape[0]), whole.shape[0] // 2
    eight = weights.PackedWeight(8, (half, whole.shape[1]), 0, whole.data[order[:half]],
                                 whole.scales[order[:half]])
    return weights.mix([(eight, order[:half]),
                        (weights.keep(linear.weight.detach()[order[half:]]), order[half:])],
                       whole.shape[0])


class Replaced(nn.Module):
    def __init__(self, linear, weight, diagonal=None):
        super().__init__()
        self.layer = dispatch.prepare(weight, linear.bias, diagonal=diagonal)
        self.weight = linear.weight

    def forward(self, x):
        return self.layer(x)


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(1)
    made = LiberoVlaNet(SMALL).eval()
    for parameter in made.parameters():  # no zero that could hide a missing term
        if float(parameter.detach().abs().max()) in (0.0, 1.0):
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return made


@torch.inference_mode()
def plain(net, images, words, state, noise):
    context, x = net.prefix(images, words, state), noise
    for i in range(STEPS):
        time = torch.full((1,), i / STEPS)
        x = x + net.velocity(context, x, net.modulation(time)) / STEPS
    return x


def inputs():
    return (torch.rand(1, 2, 3, 32, 32) * 2 - 1, torch.randint(0, 64, (1, 3)),
            torch.randn(1, 9), torch.randn(1, 4, 8))


def chunk(program, given):
    context = program.prefix(*given[:3])
    return flow.denoise(lambda x, step: program.velocity(context, x, step), given[3], STEPS)


@pytest.mark.parametrize('weight_of', [eight_bits, mixed])
def test_the_program_equals_the_network_on_the_same_integers(net, weight_of):
    replaced = copy.deepcopy(net)
    kept = {name: weight_of(name, module) for name, module in net.named_modules()
            if isinstance(module, nn.Linear)}
    outside = ('backbone.state', 'action.state', 'action.time_in', 'action.time_out')
    for name, weight in kept.items():
        if name not in outside:
            parent, _, child = name.rpartition('.')
            owner = replaced.get_submodule(parent)
            setattr(owner, child, Replaced(getattr(owner, child), weight))
    names = {module: name for name, module in net.named_modules()}
    program = ChunkProgram(net, lambda m: Part(kept[names[m]], m.bias), STEPS)
    given = inputs()
    y, truth = chunk(program, given), plain(replaced, *given)
    # equal but for values near a tie, which a norm summed in another order may round apart
    assert far(y, truth) < 0.01
    assert far(y, plain(net, *given)) < 0.05 and far(truth, given[3]) > 0.2


@pytest.mark.parametrize('shared', ['one for each input', 'one for each layer'])
def test_smoothed_layers_are_recorded_whatever_they_share(net, shared):
    """gate and up, or q, k and v, with diagonals of their own are separate calls."""
    replaced, parts = copy.deepcopy(net), {}
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        linear = net.get_submodule(name)
        k = linear.in_features
        torch.manual_seed(k if shared == 'one for each input' else len(name) + k)
        diagonal = torch.rand(k) + 0.5
        w = linear.weight.detach() / diagonal
        weight = eight_bits_of(w)
        parts[linear] = Part(weight, linear.bias, diagonal=diagonal)
        if name not in ('backbone.state', 'action.state', 'action.time_in', 'action.time_out'):
            parent, _, child = name.rpartition('.')
            owner = replaced.get_submodule(parent)
            setattr(owner, child, Replaced(getattr(owner, child), weight, diagonal))
    program, given = ChunkProgram(net, parts.__getitem__, STEPS), inputs()
    y = chunk(program, given)
    assert far(y, plain(replaced, *given)) < 0.01 and far(y, plain(net, *given)) < 0.05


def stored(transform, act_bits=8):
    scheme = parse_scheme('w8a8' if act_bits == 8 else 'w8a16')
    return QuantizedLayer(scheme, packed(128, 128, 8), transform=transform)


def test_artifacts_with_diagonals_are_recorded_and_those_with_permutations_are_not():
    smooth = InputTransform(diagonal=torch.rand(128) + 0.5, hadamard=64)
    permuted = InputTransform(permutation=torch.arange(128))
    assert recordable({'a': stored(smooth), 'b': stored(InputTransform())})
    assert not recordable({'a': stored(smooth), 'b': stored(permuted)})
    assert not recordable({'a': stored(smooth, act_bits=16)})
    # the modulation is made once, at load: anything may make it
    assert recordable({'a': stored(smooth), 'action.time_out': stored(permuted, act_bits=16)})


def test_static_scales_are_those_of_the_step_and_must_be_enough():
    part = Part(packed(4, 64, 8), act_scales=torch.tensor([0.5, 0.25]))
    assert [part.act_scale(0), part.act_scale(1)] == [0.5, 0.25]
    assert Part(part.weight, act_scales=torch.tensor([2.0])).act_scale(None) == 2.0
    for step in (None, 2):
        with pytest.raises(ValueError, match='number of steps'):
            part.act_scale(step)


def test_a_second_observation_leaves_nothing_of_the_first(net):
    program = ChunkProgram(net, lambda m: Part(eight_bits('', m), m.bias), STEPS)
    first, second = inputs(), inputs()
    results = [chunk(program, given) for given in (first, second, first)]
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_a_context_outlives_the_next_observation(net):
    program = ChunkProgram(net, lambda m: Part(eight_bits('', m), m.bias), STEPS)
    first, second = inputs(), inputs()
    kept = program.prefix(*first[:3])
    program.prefix(*second[:3])
    late = flow.denoise(lambda x, step: program.velocity(kept, x, step), first[3], STEPS)
    assert torch.equal(late, chunk(program, first))
