# SPDX-License-Identifier: Apache-2.0
"""The module that runs on integers computes what is stored, transform and fold included."""

import pytest
import torch
from torch import nn

from quantvla_ros.kernels.reference import transform_tokens
from quantvla_ros.kernels.weights import mix
from quantvla_ros.quant.linear import (
    QuantizedLayer,
    QuantLinear,
    denoising_step,
    kernel_transform,
    replace_linears,
)
from quantvla_ros.quant.pack import absmax_scale, packed, quantize
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerStep, Scheme, parse_scheme
from quantvla_ros.quant.transforms import InputTransform, svd_hadamard_rotation


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack_weight(weight, scheme):
    scale = absmax_scale(weight, scheme.weight_bits, scheme.weight)
    codes = quantize(weight, scale, scheme.weight_bits, scheme.weight)
    return packed(codes, scale, scheme.weight_bits, scheme.weight)


def layer(weight, name='w8a8', transform=None, **more):
    transform = transform or InputTransform()
    scheme = more.pop('scheme', parse_scheme(name))
    return QuantizedLayer(
        scheme, pack_weight(transform.weight(weight), scheme), transform=transform, **more
    )


def relative(a, b):
    return float((a - b).norm() / b.norm())


TRANSFORMS = {
    'plain': lambda w: InputTransform(),
    'smooth': lambda w: InputTransform(diagonal=torch.linspace(0.5, 2.0, w.shape[1])),
    'permuted': lambda w: InputTransform(permutation=torch.randperm(w.shape[1])),
    'fused hadamard': lambda w: InputTransform(hadamard=64),
    'small hadamard': lambda w: InputTransform(hadamard=16),
    'chain': lambda w: InputTransform(hadamard=16).followed_by(
        InputTransform(permutation=torch.randperm(w.shape[1]), hadamard=64)
    ),
    'dense': lambda w: InputTransform(blocks=svd_hadamard_rotation(w, 64).float()),
}


@pytest.mark.parametrize('bits', ['w8a8', 'w4a8', 'w4a8g64', 'w8a16', 'w4a16'])
@pytest.mark.parametrize('kind', sorted(TRANSFORMS))
def test_every_transform_runs_and_stays_close_to_float(kind, bits):
    weight, bias, x = normal(48, 128), normal(48, seed=1), normal(5, 7, 128, seed=2)
    module = QuantLinear(layer(weight, bits, TRANSFORMS[kind](weight), bias=bias))
    error = relative(module(x), x @ weight.T + bias)
    assert error < (0.02 if bits.startswith('w8') else 0.25)


def test_the_float_weight_of_a_layer_is_in_the_plain_frame():
    weight = normal(32, 128)
    for kind, make in TRANSFORMS.items():
        assert relative(layer(weight, 'w8a8', make(weight)).float_weight(), weight) < 0.02, kind


def test_a_fold_scales_rows_and_bias_and_adds_no_operation():
    weight, bias, x = normal(16, 64), normal(16, seed=1), normal(3, 64, seed=2)
    fold = torch.linspace(0.7, 1.4, 16)
    plain = QuantLinear(layer(weight, bias=bias))
    folded = QuantLinear(layer(weight, bias=bias, fold=fold))
    torch.testing.assert_close(folded(x), plain(x) * fold, rtol=1e-5, atol=1e-5)
    without = QuantLinear(layer(weight, bias=bias, fold=None))
    assert torch.equal(without(x), plain(x))


def test_static_scales_of_a_step_are_chosen_by_the_step_that_runs():
    weight, x = normal(16, 64), normal(3, 64, seed=2)
    scheme = Scheme(8, 8, PerRow(), PerStep())
    module = QuantLinear(layer(weight, scheme=scheme, act_scales=torch.tensor([0.03, 1e-3])))
    with denoising_step(0):
        assert relative(module(x), x @ weight.T) < 0.05
    with denoising_step(1):
        assert relative(module(x), x @ weight.T) > 0.5  # far too small a scale: all is clipped
    with pytest.raises(RuntimeError, match='scales for 2 denoising steps'):
        module(x)


def test_rows_of_mixed_width_come_out_in_their_own_order():
    weight, x = normal(40, 64), normal(3, 64, seed=2)
    rows = torch.arange(40)
    parts = [
        (pack_weight(weight[rows % 4 == 0], parse_scheme('w8a8')), rows[rows % 4 == 0]),
        (pack_weight(weight[rows % 4 == 1], parse_scheme('w4a8')), rows[rows % 4 == 1]),
    ]
    module = QuantLinear(QuantizedLayer(parse_scheme('w8a8'), mix(parts, 40)))
    y, exact = module(x), x @ weight.T
    assert relative(y[:, rows % 4 == 0], exact[:, rows % 4 == 0]) < 0.02
    assert relative(y[:, rows % 4 == 1], exact[:, rows % 4 == 1]) < 0.15
    assert not y[:, rows % 4 > 1].any()


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'bias': torch.zeros(3)}, 'bias has shape'),
        ({'fold': torch.ones(17)}, 'fold has shape'),
        ({'act_scales': torch.ones(1)}, 'static scales are given'),
        ({'scheme': Scheme(8, 8, PerRow(), PerStep())}, 'static scales are missing'),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer(normal(16, 64), **change)


def test_replacing_linears_keeps_the_network_running():
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = normal(4, 64)
    with torch.no_grad():
        before = net(x)
        replace_linears(net, {'0': layer(net[0].weight.data, bias=net[0].bias.data)})
        assert isinstance(net[0], QuantLinear) and isinstance(net[2], nn.Linear)
        assert relative(net(x), before) < 0.02


def test_a_name_that_is_no_linear_is_refused():
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    with pytest.raises(ValueError, match='not a linear layer'):
        replace_linears(net, {'1': layer(normal(32, 64))})
    with pytest.raises(ValueError, match='shape'):
        replace_linears(net, {'0': layer(normal(16, 64))})


def test_groups_of_the_scheme_reach_the_kernel():
    assert layer(normal(8, 128), scheme=Scheme(4, 8, PerGroup(64))).weight.group == 64


SMOOTH = InputTransform(diagonal=torch.linspace(0.5, 2.0, 128))
ROTATE = InputTransform(hadamard=64)


@pytest.mark.parametrize('transform', [
    InputTransform(), SMOOTH, ROTATE, InputTransform(SMOOTH.diagonal, hadamard=64),
    SMOOTH.followed_by(SMOOTH), SMOOTH.followed_by(ROTATE),
])
def test_the_kernels_take_diagonals_and_then_one_hadamard(transform):
    x = normal(5, 128)
    diagonal, hadamard = kernel_transform(transform)
    tokens = transform_tokens(x, diagonal, hadamard)
    assert torch.allclose(tokens, transform.activations(x), atol=1e-5)


@pytest.mark.parametrize('transform', [
    ROTATE.followed_by(SMOOTH), ROTATE.followed_by(ROTATE), InputTransform(hadamard=16),
    InputTransform(permutation=torch.arange(128)),
    SMOOTH.followed_by(InputTransform(blocks=torch.eye(64)[None])),
])
def test_what_the_kernels_cannot_do_is_left_to_the_module(transform):
    assert kernel_transform(transform) is None
    weight, x = normal(48, 128), normal(5, 128, seed=2)
    module = QuantLinear(layer(weight, 'w8a8', transform))
    assert relative(module(x), x @ weight.T) < 0.02
