# SPDX-License-Identifier: Apache-2.0
"""What is recorded of a layer's inputs is what entered it."""

import pytest
import torch
from torch.testing import assert_close
from toy import ToyNet, frames, runner

from quantvla_ros.quant.linear import denoising_step
from quantvla_ros.quant.observe import (
    SAMPLE_TOKENS,
    InputStatistics,
    observe,
    same_inputs,
    spread,
)


def test_sums_are_those_of_all_tokens():
    x = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(0))
    seen = InputStatistics(8)
    for part in x:
        seen.add(part)
    flat = x.reshape(-1, 8)
    assert seen.tokens == 150
    assert_close(seen.hessian, (flat.T @ flat).double() / 150, rtol=1e-5, atol=1e-5)
    assert_close(seen.absmax, flat.abs().amax(0))
    assert_close(seen.mean_abs, flat.abs().mean(0))


def test_sample_stays_bounded_and_spans_all_calls():
    seen = InputStatistics(2)
    for call in range(200):
        seen.add(torch.full((100, 2), float(call)))
    sample = seen.sample()
    assert len(sample) <= SAMPLE_TOKENS
    assert sample.min() < 10 and sample.max() > 190


def test_each_denoising_step_keeps_its_own_tokens():
    seen = InputStatistics(2)
    for step in range(3):
        with denoising_step(step):
            seen.add(torch.full((4, 2), float(step)))
    assert seen.steps == (0, 1, 2)
    assert_close(seen.step_sample(2), torch.full((4, 2), 2.0))


def test_layers_that_never_ran_are_left_out_and_hooks_are_gone():
    net = ToyNet()
    net.unused = torch.nn.Linear(4, 4)
    seen = observe(net, ['blocks.0.up', 'unused'], runner(net))
    assert set(seen) == {'blocks.0.up'}
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_hooks_are_gone_after_a_failure():
    net = ToyNet()
    with pytest.raises(RuntimeError):
        observe(net, ['blocks.0.up'], lambda: net(torch.zeros(1, 5)))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_inputs_of_a_later_block_are_what_the_earlier_one_gave():
    net, x = ToyNet(), frames(1)
    seen = observe(net, ['blocks.1.up'], runner(net, x))
    assert_close(seen['blocks.1.up'].absmax, net.blocks[0](x[0]).abs().amax(0))


def test_layers_that_read_the_same_tokens_are_found():
    net = ToyNet()
    net.blocks[0].gate = torch.nn.Linear(64, 16)
    net.blocks[0].up.register_forward_hook(lambda _, x, y: net.blocks[0].gate(x[0]) is None or y)
    names = ['blocks.0.up', 'blocks.0.gate', 'blocks.0.down_proj', 'blocks.1.up']
    groups = same_inputs(observe(net, names, runner(net)))
    assert sorted(map(sorted, groups)) == [
        ['blocks.0.down_proj'], ['blocks.0.gate', 'blocks.0.up'], ['blocks.1.up'],
    ]


def test_spread_takes_first_and_last():
    assert spread(torch.arange(100)[:, None], 3).flatten().tolist() == [0, 50, 99]
