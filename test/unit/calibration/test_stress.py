# SPDX-License-Identifier: Apache-2.0
"""The twin computes the same function and has the outliers of large backbones."""

import copy

import pytest
import torch
from tiny_vla import random_net

from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.calibration.stress import channel_peaks
from quantvla_ros.calibration.stress_twin import outlier_ratio, stress
from quantvla_ros.cli import main
from quantvla_ros.policies.flow import flow_times
from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.quant.simulate import round_tokens


def peaks_of(net, inputs):
    found = {}

    def hook(name):
        def watch(_, seen):
            peak = seen[0].flatten(0, -2).abs().amax(0)
            found[name] = torch.maximum(found.get(name, peak), peak)
        return watch

    handles = [module.register_forward_pre_hook(hook(name))
               for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)]
    outputs = run(net, inputs)
    for handle in handles:
        handle.remove()
    return found, outputs


def inputs_for(config, batch=2):
    drawn = torch.Generator().manual_seed(0)
    return (
        torch.rand(batch, config.views, 3, config.image, config.image, generator=drawn) * 2 - 1,
        torch.randint(0, config.vocabulary, (batch, config.words), generator=drawn),
        torch.randn(batch, config.state, generator=drawn),
        torch.randn(batch, config.chunk, config.action, generator=drawn),
    )


@torch.no_grad()
def run(net, inputs):
    images, words, state, x = inputs
    context = net.prefix(images, words, state)
    table = net.modulation(torch.tensor(flow_times(2)))
    return torch.stack([net.velocity(context, x, table[i : i + 1]) for i in range(2)])


def test_twin_of_the_real_shapes_computes_the_same_function_after_float16():
    """The shipped architecture with one block of each kind; weights as a file holds them."""
    config = VlaConfig(vision_layers=1, layers=1, action_layers=2)
    net = random_net(config)
    net = halved(net)
    inputs = inputs_for(config)
    peaks, before = peaks_of(net, inputs)
    twin = copy.deepcopy(net)
    stress(twin, peaks)
    _, after = peaks_of(halved(twin), inputs)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-3
    exact = run(twin, inputs)
    assert float((exact - before).abs().max() / before.abs().max()) < 1e-4


def halved(net):
    """Weights as a float16 file gives them back."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())
    return net


def test_twin_has_outliers_of_the_published_size():
    config = VlaConfig(vision_layers=1, layers=1, action_layers=1)
    net = random_net(config)
    inputs = inputs_for(config)
    peaks, _ = peaks_of(net, inputs)
    stress(net, peaks)
    twin, _ = peaks_of(net, inputs)
    for name in twin:
        if name.endswith(('o_proj', 'down_proj')):
            assert 15 < outlier_ratio(twin[name]) < 260, name
        elif name.endswith(('attn.q_proj', 'gate_proj', 'fc1', 'cross.k_proj')):
            assert 4 < outlier_ratio(twin[name]) < 40, name
        if name.endswith(('o_proj', 'down_proj')):
            assert outlier_ratio(twin[name]) > 2 * outlier_ratio(peaks[name])


def test_another_seed_picks_other_channels():
    net = random_net()
    peaks, _ = peaks_of(net, inputs_for(net.config))
    twins = []
    for seed in (0, 1):
        twin = copy.deepcopy(net)
        stress(twin, peaks, seed)
        twins.append(twin.backbone.blocks[0].mlp.down_proj.weight)
    assert not torch.equal(*twins)


def test_rounding_tokens_hurts_the_twin_more():
    net = random_net(VlaConfig(vision_layers=1, layers=1, action_layers=1))
    inputs = inputs_for(net.config)
    peaks, _ = peaks_of(net, inputs)
    twin = copy.deepcopy(net)
    stress(twin, peaks)
    assert rounded_error(twin, inputs) > 1.5 * rounded_error(net, inputs)


def rounded_error(net: LiberoVlaNet, inputs):
    before = run(net, inputs)
    handles = [
        module.register_forward_pre_hook(lambda _, x: (round_tokens(x[0], 4),))
        for name, module in net.named_modules() if name.endswith(('o_proj', 'down_proj'))
    ]
    after = run(net, inputs)
    for handle in handles:
        handle.remove()
    return float((after - before).norm() / before.norm())


def test_command_writes_a_folder_that_the_policy_loads(
    model, frames_path, tmp_path, make_policy, observations, capsys
):
    out = tmp_path / 'twin'
    assert main(['stress', str(model), '--out', str(out), '--frames', str(frames_path)]) == 0
    assert 'in the twin' in capsys.readouterr().out
    plain, twin = make_policy(), make_policy(model=str(out))
    off = action_error(chunks(twin, observations), chunks(plain, observations), 8)
    other = action_error(chunks(plain, observations, 7), chunks(plain, observations), 8)
    assert off.mean_mrad < 0.01 * other.mean_mrad
    assert len(channel_peaks(twin, observations[:1])) > 20


def test_the_model_itself_is_not_overwritten(model, frames_path, capsys):
    arguments = ['stress', str(model), '--out', str(model), '--frames', str(frames_path)]
    assert main(arguments) == 2
    assert 'another folder' in capsys.readouterr().err


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
