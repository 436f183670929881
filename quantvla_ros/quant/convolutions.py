# SPDX-License-Identifier: Apache-2.0
"""Convolutions on integers: rounded to nearest at 8 bits, tokens (windows) at 8 bits.

One scheme for every recipe and precision: a stem is a few hundred thousand weights, and what it
rounds away reaches everything behind it. Chooses nothing and needs no frames.
"""

from __future__ import annotations

import torch
from torch import nn

from quantvla_ros.kernels.windows import window_rows
from quantvla_ros.quant.convert import ROUNDED
from quantvla_ros.quant.linear import Make, QuantizedLayer, replace_linears
from quantvla_ros.quant.scheme import Scheme
from quantvla_ros.quant.sites import PolicySites
from quantvla_ros.quant.stream import nearest_layer

SCHEME = Scheme(8, 8)


@torch.no_grad()
def convolution_layers(net: nn.Module, sites: PolicySites) -> dict[str, QuantizedLayer]:
    """Return what is to be stored of each convolution; the network stays as it is."""
    layers = {}
    for site in sites.convolutions:
        conv = net.get_submodule(site.name)
        assert isinstance(conv, nn.Conv2d)
        bias = None if conv.bias is None else conv.bias.detach().cpu()
        layers[site.name] = nearest_layer(
            ROUNDED, window_rows(conv.weight.cpu()), bias, SCHEME)
    return layers


def round_convolutions(
    net: nn.Module, sites: PolicySites, make: Make
) -> dict[str, QuantizedLayer]:
    """Quantize the convolutions of a network in place, and return what is to be stored."""
    layers = convolution_layers(net, sites)
    replace_linears(net, layers, make)
    return layers
