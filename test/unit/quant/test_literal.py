# SPDX-License-Identifier: Apache-2.0
"""The published forms: exact without rounding, and their known faults are there when asked for."""

import pytest
import torch
from toy import ToyNet, frames, toy_sites

from quantvla_ros.quant.linear import denoising_step
from quantvla_ros.quant.literal import (
    LITERALS,
    LiteralLinear,
    fixed_inverse_gptq,
    put_literal,
)
from quantvla_ros.quant.observe import observe
from quantvla_ros.quant.rounding import gptq, layer_error
from quantvla_ros.quant.scheme import PerRow, Scheme, parse_scheme


def growing(net):
    """Frames whose later calls are larger, in two denoising steps."""
    def run():
        for step in range(2):
            with denoising_step(step):
                for scale, frame in enumerate(frames(4), 1):
                    net(frame * scale)
    return run


def seen_of(net, name='blocks.0.up'):
    return observe(net, [name], growing(net))[name]


@pytest.mark.parametrize('name', sorted(LITERALS))
def test_rotations_cancel_when_codes_are_fine(name):
    net, x = ToyNet(), frames(1)[0]
    linear = net.blocks[0].up
    fine = Scheme(8, 8)
    module = LiteralLinear(LITERALS['quantvla_literal'], linear, seen_of(net), fine, True)
    assert float((module(x) - linear(x)).norm() / linear(x).norm()) < 0.05
    put_literal(net, toy_sites(net), LITERALS[name], parse_scheme('w8a8'), growing(net))
    with denoising_step(0):
        assert float((net(x) - ToyNet()(x)).norm() / ToyNet()(x).norm()) < 0.2


def test_first_batch_calibrator_sees_only_the_first_call():
    net = ToyNet()
    seen, linear = seen_of(net), net.blocks[0].up
    tables = [
        LiteralLinear(LITERALS[name], linear, seen, parse_scheme('w4a8'), False).table
        for name in ('quantvla_literal', 'quantvla_first_batch')
    ]
    assert float((tables[0] / tables[1]).mean()) > 2


def test_omega_has_a_scale_for_each_step_and_channel():
    net = ToyNet()
    module = LiteralLinear(LITERALS['omega_literal'], net.blocks[0].up, seen_of(net),
                           parse_scheme('w4a4'), True)
    assert tuple(module.table.shape) == (2, 64)


def test_published_solver_is_worse_than_gptq():
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=drawn) @ torch.randn(64, 64, generator=drawn)
    h = (x.T @ x).double() / len(x)
    weight = torch.randn(32, 64, generator=drawn)
    published = layer_error(weight, fixed_inverse_gptq(weight, h, 4), h)
    ours = layer_error(weight, gptq(weight, h, 4, PerRow(), damp=0.05).dequantized(), h)
    assert ours < 0.8 * published
