# SPDX-License-Identifier: Apache-2.0
"""A linear layer on the GPU behind the face that every kernel path has, against the reference."""

import pytest
import torch
from cases import error, random_weight

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda.layer import CudaLayer
from quantvla_ros.kernels.layer import Options


def layer(device, weight, bias=None, options=None, up=None, up_bias=None):
    return CudaLayer(weight, bias, options or Options(), up, up_bias, device)


@pytest.mark.parametrize(('bits', 'group', 'act_bits'), [(8, 0, 8), (4, 64, 8), (4, 0, 4)])
def test_layer_computes_what_the_reference_does(bits, group, act_bits, device):
    weight, other = random_weight(bits, 40, 192, group), random_weight(bits, 40, 192, group)
    bias, up_bias, gate = torch.randn(40), torch.randn(40), torch.randn(40)
    diagonal = torch.rand(192) + 0.5
    x, residual = torch.randn(2, 3, 192), torch.randn(2, 3, 40)
    options = Options(act_bits, 0, 'silu', diagonal)
    made = layer(device, weight, bias, options, other, up_bias)
    seen = made(x.to(device), gate=gate.to(device), residual=residual.to(device))
    wanted = reference.linear(x, weight, bias, act_bits=act_bits, diagonal=diagonal,
                              activation='silu', up=other, up_bias=up_bias, gate=gate,
                              residual=residual)
    assert seen.shape == (2, 3, 40)
    assert error(seen, wanted) < 1e-5


def test_static_scale_and_rotation(device):
    weight = random_weight(8, 16, 128)
    x = torch.randn(4, 128)
    seen = layer(device, weight, options=Options(8, 64))(x.to(device), act_scale=0.03)
    wanted = reference.linear(x, weight, act_scale=0.03, hadamard=64)
    assert error(seen, wanted) < 0.02  # sums in another order may move a code by one


def test_no_tokens_give_no_tokens(device):
    made = layer(device, random_weight(8, 16, 128))
    assert made(torch.empty(0, 128, device=device)).shape == (0, 16)


def test_wrong_calls_are_refused_with_a_sentence(device):
    made = layer(device, random_weight(8, 16, 128))
    with pytest.raises(ValueError, match=r'expected \(..., 128\)'):
        made(torch.empty(2, 64, device=device))
    with pytest.raises(ValueError, match='act_scale is 0.0'):
        made(torch.empty(2, 128, device=device), act_scale=0.0)
    with pytest.raises(ValueError, match='same bits and group'):
        layer(device, random_weight(8, 16, 128), up=random_weight(4, 16, 128))
