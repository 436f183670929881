# SPDX-License-Identifier: Apache-2.0
"""Every recipe quantizes a network; the better ones beat plain rounding where outliers stand."""

from dataclasses import replace

import pytest
import torch
from toy import WIDTH, ToyNet, directions, frames, runner, toy_sites

from quantvla_ros.kernels.weights import MixedWeight, dequantize
from quantvla_ros.quant.convert import quantize_net, recipe_layout
from quantvla_ros.quant.convert_layer import quantize_linear, quantize_stacked
from quantvla_ros.quant.fit import fit_transform, token_noise, trial_error
from quantvla_ros.quant.linear import QuantLinear, denoising_step
from quantvla_ros.quant.observe import InputStatistics, observe
from quantvla_ros.quant.recipes import RECIPES, Gptq, Hadamard, Recipe, Search, Smooth
from quantvla_ros.quant.rounding import gptq
from quantvla_ros.quant.scheme import PerRow, PerStep, PerTensor, parse_scheme
from quantvla_ros.quant.simulate import SimulatedLinear, round_tokens, simulate
from quantvla_ros.quant.transforms import InputTransform


def run_steps(net):
    """Run the frames as two denoising steps, so that recipes with a scale per step have both."""
    def run():
        for step in range(2):
            with denoising_step(step):
                runner(net)()
    return run


def converted(name, precision='w4a4', **more):
    net = ToyNet()
    layers = quantize_net(net, toy_sites(net), RECIPES[name], parse_scheme(precision),
                          run_steps(net), losses=lambda: directions(net), **more)
    return net, layers


def error(net, x=None):
    x = frames(3, seed=9) if x is None else x
    with torch.no_grad(), denoising_step(0):
        return float((net(x) - ToyNet()(x)).norm() / ToyNet()(x).norm())


@pytest.mark.parametrize('precision', ['w8a8', 'w4a8', 'w4a4', 'w3a3'])
@pytest.mark.parametrize('name', sorted(RECIPES))
def test_every_recipe_runs_on_integers_at_every_precision(name, precision):
    net, layers = converted(name, precision)
    assert set(layers) == {f'blocks.{i}.{part}' for i in (0, 1) for part in ('up', 'down_proj')}
    assert isinstance(net.blocks[0].up, QuantLinear)
    assert error(net) < {'w8a8': 0.05, 'w4a8': 0.3, 'w4a4': 0.5, 'w3a3': 1.0}[precision]


def test_onboard_is_better_than_plain_rounding_and_smoothing_where_a_channel_stands_out():
    errors = {name: error(converted(name)[0]) for name in ('rtn', 'smoothquant', 'onboard')}
    assert errors['onboard'] < 0.7 * errors['rtn']
    assert errors['onboard'] < errors['smoothquant']


def test_gptq_is_better_than_rounding_to_nearest():
    assert error(converted('gptq', 'w3a8')[0]) < error(converted('rtn', 'w3a8')[0])


def test_the_same_frames_give_the_same_layers():
    one, two = (converted('onboard')[1] for _ in range(2))
    for name, layer in one.items():
        assert torch.equal(layer.weight.data, two[name].weight.data)
        assert torch.equal(layer.weight.scales, two[name].weight.scales)


def test_block_by_block_sees_what_the_quantized_blocks_give():
    seen_by = {}
    for blockwise in (True, False):
        layers = converted('smoothquant', 'w3a3', blockwise=blockwise)[1]
        seen_by[blockwise] = layers['blocks.1.up'].transform.diagonal
    assert not torch.equal(seen_by[True], seen_by[False])


def test_progress_counts_every_layer():
    seen = []
    converted('rtn', progress=lambda name, done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_layer_that_never_runs_is_named():
    net = ToyNet()
    with pytest.raises(ValueError, match=r'never reached blocks\.0'):
        quantize_net(net, toy_sites(net), RECIPES['rtn'], parse_scheme('w8a8'), lambda: None)


def test_a_recipe_that_asks_the_action_refuses_to_work_without_it():
    net = ToyNet()
    with pytest.raises(ValueError, match="'qvla' needs gradients"):
        quantize_net(net, toy_sites(net), RECIPES['qvla'], parse_scheme('w4a4'), runner(net))


def test_qvla_stays_within_its_mean_bits_and_mixes_widths():
    layers = converted('qvla', 'w4a8')[1]
    assert all(isinstance(layer.weight, MixedWeight) for layer in layers.values())
    bits = sum(part.bits * part.shape[0] * part.shape[1]
               for layer in layers.values() for part in layer.weight.parts)
    weights = sum(layer.weight.shape[0] * layer.weight.shape[1] for layer in layers.values())
    assert bits / weights <= 4.0
    assert len({part.bits for layer in layers.values() for part in layer.weight.parts}) > 1


def test_steps_have_their_own_scale_only_inside_the_loop():
    layers = converted('omega_qvla', 'w4a4')[1]
    assert all(layer.act_scales.numel() == 2 for layer in layers.values())
    net = ToyNet()
    outside = quantize_net(net, toy_sites(net), RECIPES['omega_qvla'], parse_scheme('w4a4'),
                           runner(net))
    assert not any(isinstance(layer.scheme.act, PerStep) for layer in outside.values())


def test_a_static_scale_covers_the_percentile_of_all_tokens():
    net = ToyNet()
    recipe = replace(RECIPES['rtn'], act=PerTensor())
    layers = quantize_net(net, toy_sites(net), recipe, parse_scheme('w8a8'), run_steps(net))
    x = frames().flatten()
    scale = layers['blocks.0.up'].act_scales
    assert scale.shape == (1,)
    assert float(scale) * 127 == pytest.approx(float(x.abs().quantile(0.999)), rel=0.05)
    assert error(net) < 0.05


def test_sensitive_inputs_stay_one_width_higher():
    net = ToyNet()
    layout = recipe_layout(RECIPES['onboard'], toy_sites(net), parse_scheme('w4a4'))
    assert layout['blocks.0.down_proj'].act_bits == 8
    assert layout['blocks.0.up'].act_bits == 4
    assert layout['leave'].is_float


def test_search_takes_the_transform_with_the_least_error():
    net = ToyNet()
    seen = observe(net, ['blocks.0.down_proj'], runner(net))['blocks.0.down_proj']
    weight, scheme = net.blocks[0].down_proj.weight, parse_scheme('w4a4')
    options = ((), (Hadamard(64),), (Smooth(0.5), Hadamard(64)))
    errors = []
    for option in options:
        fit = fit_transform(Recipe('one', '', '', '', transform=option), weight, seen, scheme)
        errors.append(trial_error(fit.transform, weight, seen, scheme))
    searched = Recipe('all', '', '', '', transform=(Search(options),))
    found = fit_transform(searched, weight, seen, scheme).transform
    assert trial_error(found, weight, seen, scheme) == pytest.approx(min(errors))
    assert max(errors) > 1.2 * min(errors)


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_simulation_gives_the_numbers_of_the_integer_layer(name):
    net, layers = converted(name, 'w4a4')
    for layer in layers.values():
        k = layer.weight.shape[1]
        x = torch.randn(9, k, generator=torch.Generator().manual_seed(k))
        with denoising_step(1):
            exact, near = QuantLinear(layer)(x), SimulatedLinear(layer)(x)
        # a value that lies on the border of two codes may fall to either side
        off = (exact - near).abs() > 1e-4 * exact.abs().max()
        assert float(off.any(1).float().mean()) <= 0.12
    assert WIDTH == 64


def test_another_module_can_stand_in_for_the_integer_layer():
    net, _ = converted('rtn', make=simulate)
    exact, _ = converted('rtn')
    x = frames(2, seed=4)
    assert isinstance(net.blocks[1].up, SimulatedLinear)
    assert float((net(x) - exact(x)).norm() / exact(x).norm()) < 0.02


def offset_layer():
    """A layer whose inputs have a large mean, and what was seen of them."""
    drawn = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=drawn)
    seen = InputStatistics(64)
    x = torch.randn(400, 64, generator=drawn) + 3 * torch.randn(64, generator=drawn)
    for part in x.chunk(8):
        seen.add(part)
    return weight, seen, x


def test_noise_of_tokens_is_that_of_their_rounding():
    _, seen, x = offset_layer()
    found = token_noise(InputTransform(), seen, parse_scheme('w4a4'))
    true = (round_tokens(x, 4) - x).double().pow(2).mean()
    assert found == pytest.approx(float(true), rel=0.1)


def test_noisy_gptq_rounds_with_the_hessian_of_rounded_tokens():
    weight, seen, _ = offset_layer()
    scheme = parse_scheme('w4a4')
    noise = token_noise(InputTransform(), seen, scheme)
    layers = [
        quantize_linear(Recipe('one', '', '', '', rounding=Gptq(search=False, noisy=noisy)),
                        weight, None, seen, scheme)
        for noisy in (True, False)
    ]
    expected = gptq(weight, seen.hessian + noise * torch.eye(64), 4, PerRow(), search=False)
    torch.testing.assert_close(dequantize(layers[0].weight), expected.dequantized())
    assert not torch.equal(layers[0].weight.data, layers[1].weight.data)


def test_layers_that_read_the_same_input_share_one_transform():
    net = ToyNet()
    net.blocks[0].down_proj = torch.nn.Linear(64, 64, bias=False)  # reads what up reads
    net.blocks[0].forward = lambda x: x + net.blocks[0].up(x)[..., :64] + net.blocks[0].down_proj(
        x)
    recipe = replace(RECIPES['onboard'], raise_sensitive=False)
    layers = quantize_net(net, toy_sites(net), recipe, parse_scheme('w4a4'), runner(net),
                          losses=lambda: directions(net))
    one, two = (layers[f'blocks.0.{name}'].transform for name in ('up', 'down_proj'))
    assert one.tensors().keys() == two.tensors().keys() and one.hadamards() == two.hadamards()
    assert all(torch.equal(t, two.tensors()[name]) for name, t in one.tensors().items())
    # each has its own tensors, so that a file can hold both
    assert all(t.data_ptr() != two.tensors()[name].data_ptr() for name, t in one.tensors().items())
    assert one.tensors() or one.hadamards() == [64]


def test_layers_quantized_together_are_those_quantized_alone():
    net, recipe, scheme = ToyNet(), RECIPES['onboard'], parse_scheme('w4a4')
    seen = observe(net, ['blocks.0.up'], runner(net))['blocks.0.up']
    weight, bias = net.blocks[0].up.weight, net.blocks[0].up.bias
    transform = fit_transform(recipe, weight, seen, scheme).transform
    stacked = quantize_stacked(recipe, [weight[:40], weight[40:]], [bias[:40], None], seen, scheme,
                               transform=transform)
    alone = quantize_linear(recipe, weight, bias, seen, scheme, transform=transform)
    assert torch.equal(torch.cat([s.weight.data for s in stacked]), alone.weight.data)
    assert torch.equal(torch.cat([s.weight.scales for s in stacked]), alone.weight.scales)
    assert torch.equal(stacked[0].bias, bias[:40]) and stacked[1].bias is None
