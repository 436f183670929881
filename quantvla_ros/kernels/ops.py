# SPDX-License-Identifier: Apache-2.0
"""The layer call as a torch operator, so that torch.compile sees one node with a known shape.

Imported by layer.py. Eager code does not pass through here: the dispatcher would cost more than
the call.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library('quantvla', 'DEF')
_LIBRARY.define(
    'linear(Tensor x, int layer, int n, float act_scale, Tensor? gate, Tensor? residual) -> Tensor'
)
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(layer: Any) -> int:
    """Give a layer the number by which compiled graphs call it; forgotten when the layer is."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _linear(
    x: Tensor, layer: int, n: int, act_scale: float, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    del n
    return _layers[layer](x, act_scale=act_scale or None, gate=gate, residual=residual)


def _fake(
    x: Tensor, layer: int, n: int, act_scale: float, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    del layer, act_scale, gate, residual
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl('linear', _linear, 'CPU')
_LIBRARY.impl('linear', _fake, 'Meta')
