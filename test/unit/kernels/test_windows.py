# SPDX-License-Identifier: Apache-2.0
"""Convolutions as integer products of windows, and the group norm between them."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import far, packed
from torch import nn

from quantvla_ros.kernels import dispatch, reference
from quantvla_ros.kernels.program import Program
from quantvla_ros.kernels.windows import Window, WindowLinear, window_rows

SHAPES = [(3, 2, 1, 12, 12, 2, 3), (2, 2, 0, 6, 10, 1, 64), (3, 1, 1, 5, 4, 3, 16),
          (1, 1, 0, 3, 3, 1, 7), (5, 3, 2, 7, 9, 2, 8)]


def as_maps(x, window):
    return x.view(window.batch, window.height, window.width, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize('size, stride, pad, height, width, batch, channels', SHAPES)
def test_windows_times_rows_are_a_convolution(size, stride, pad, height, width, batch, channels):
    window = Window(size, stride, pad, height, width, batch)
    x = torch.randn(batch * height * width, channels)
    weight = torch.randn(24, channels, size, size)
    y = window.of(x) @ window_rows(weight).T
    truth = F.conv2d(as_maps(x, window), weight, None, stride, pad)
    assert far(y, truth.permute(0, 2, 3, 1).flatten(0, 2)) < 1e-5


@pytest.mark.parametrize('size, stride, pad, height, width, batch, channels', SHAPES)
@pytest.mark.parametrize('bits', [4, 8, 16])
def test_a_recorded_window_layer_is_the_layer_on_the_windows(
        size, stride, pad, height, width, batch, channels, bits):
    window = Window(size, stride, pad, height, width, batch)
    layer = dispatch.prepare(packed(24, size * size * channels, bits), torch.randn(24))
    wide = torch.randn(batch * height * width, channels + 5)
    for x in (wide[:, :channels], wide[:, :channels].contiguous()):
        residual, y = torch.randn(window.tokens, 24), torch.empty(window.tokens, 24)
        program = Program()
        program.linear(layer, x, y, window=window, residual=residual)
        program.run()
        assert torch.equal(y, layer(window.of(x), residual=residual))


def test_two_threads_give_the_same_windows():
    window, layer = Window(3, 2, 1, 32, 32, 2), dispatch.prepare(packed(40, 9 * 16, 8))
    x, y = torch.randn(2 * 32 * 32, 16), torch.empty(512, 40)
    program = Program()
    program.linear(layer, x, y, window=window)
    for count in (1, 2):
        dispatch.set_threads(count)
        program.run()
        assert torch.equal(y, layer(window.of(x)))


@pytest.mark.parametrize('batch, pixels, channels, groups', [
    (2, 64, 64, 16), (1, 7, 16, 1), (3, 100, 192, 16), (1, 1, 32, 4)])
@pytest.mark.parametrize('activation', ['none', 'silu'])
def test_group_norm_agrees_with_float64(batch, pixels, channels, groups, activation):
    x = torch.randn(batch * pixels, channels) * torch.rand(channels) + 30 * torch.rand(channels)
    multiply, add = torch.randn(channels), torch.randn(channels)
    truth = reference.group_norm(x.clone(), batch, groups, multiply, add, 1e-5, activation)
    program = Program()
    program.group_norm(x, x, multiply, add, batch=batch, groups=groups, eps=1e-5,
                       activation=activation)
    program.run()
    assert far(x, truth) < 3e-6


def test_the_module_in_the_place_of_a_convolution_computes_it():
    conv = nn.Conv2d(5, 6, 3, 2, 1)
    linear = nn.Linear(45, 6)
    linear.weight, linear.bias = nn.Parameter(window_rows(conv.weight)), conv.bias
    x = torch.randn(2, 5, 9, 8)
    assert far(WindowLinear(conv, linear)(x), conv(x)) < 1e-5


@pytest.mark.parametrize('conv', [
    nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, (3, 1)), nn.Conv2d(4, 4, 3, dilation=2),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), nn.Conv2d(4, 4, 3, padding='same')])
def test_other_convolutions_are_refused(conv):
    with pytest.raises(ValueError, match='square'):
        WindowLinear(conv, nn.Identity())


@pytest.mark.parametrize('call, words', [
    (dict(window=Window(3, 2, 1, 8, 8)), 'rows'),
    (dict(x=torch.zeros(63, 16)), 'does not fit'),
    (dict(x=torch.zeros(64, 17)), 'x is')])
def test_windows_that_do_not_fit_are_refused_when_they_are_recorded(call, words):
    good = dict(x=torch.zeros(64, 16), y=torch.zeros(36, 20), window=Window(3, 1, 0, 8, 8))
    with pytest.raises(ValueError, match=words):
        Program().linear(dispatch.prepare(packed(20, 144, 4)), **{**good, **call})


@pytest.mark.parametrize('sizes', [(0, 1, 0, 4, 4), (3, 0, 0, 4, 4), (3, 1, 3, 4, 4),
                                   (5, 1, 0, 4, 4)])
def test_impossible_windows_are_refused(sizes):
    with pytest.raises(ValueError, match='Window'):
        Window(*sizes)
