# SPDX-License-Identifier: Apache-2.0
"""What the action feels of a layer, against finite changes of the weights."""

import copy

import pytest
import torch
from toy import ToyNet, directions, frames

from quantvla_ros.kernels.weights import dequantize
from quantvla_ros.quant.jacobian import gradients, row_errors, weight_gradient
from quantvla_ros.quant.mixed import assign_rows, at_width, pack_rows


def test_weight_gradient_is_that_of_autograd():
    net = ToyNet()
    loss = directions(net)[0]
    found = weight_gradient(gradients(net, ['blocks.0.up'], loss)['blocks.0.up'])
    weight = net.blocks[0].up.weight.requires_grad_()
    expected, = torch.autograd.grad(loss(), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_row_error_predicts_the_squared_change_of_the_action():
    net, x, row = ToyNet(), frames(40, 1), 7
    name = 'blocks.1.up'
    predicted = row_errors(net, [name], [d for seed in range(25) for d in
                                         directions(net, x, seed)], at_width, [4])[name][4][row]
    changed = copy.deepcopy(net)
    changed.blocks[1].up.weight[row] = at_width(net.blocks[1].up.weight, 4)[row]
    true = (changed(x) - net(x)).pow(2).sum((1, 2)).mean()
    assert float(predicted) == pytest.approx(float(true), rel=0.3)


def test_narrower_rows_cost_more_and_sixteen_bits_next_to_nothing():
    net = ToyNet()
    errors = row_errors(net, ['blocks.0.up'], directions(net), at_width, [0, 2, 4, 8, 16])
    sums = [float(e.sum()) for _, e in sorted(errors['blocks.0.up'].items())]
    assert sums == sorted(sums, reverse=True)
    assert sums[-1] < 1e-4 * sums[1]


def test_rows_that_matter_get_the_bits():
    errors = {'a': {b: torch.tensor([1000.0, 1.0]) / 4.0**b for b in (2, 4, 8)}}
    assert assign_rows(errors, {'a': 16}, (2, 4, 8), 5.0)['a'] == [8, 2]


@pytest.mark.parametrize('bits', [[16, 8, 4, 2, 0], [0, 0, 0, 0, 0], [4, 4, 4, 4, 4]])
def test_packed_rows_stand_for_each_row_at_its_width(bits):
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = dequantize(pack_rows(weight, bits))
    for row, b in enumerate(bits):
        torch.testing.assert_close(found[row], at_width(weight, b)[row])
