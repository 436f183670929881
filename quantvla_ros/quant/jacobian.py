# SPDX-License-Identifier: Apache-2.0
"""How much the action feels what happens in a layer: gradients of random directions of it.

For r ~ N(0, 1) over the action, E (r . J d)^2 = |J d|^2, so a few backward passes of r . A give
the squared action error that any small change d of a layer would cause. Knows no policy: the
caller passes functions that run it and return r . A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]  # input (tokens, in), slope of the action (tokens, out)

Loss = Callable[[], Tensor]  # a scalar made by running the network with gradients


def gradients(net: nn.Module, names: Iterable[str], loss: Loss) -> dict[str, list[Pair]]:
    """Return (input, gradient of the loss by the output) for every call of each named linear.

    Inputs and gradients are (tokens, features). One backward pass serves all layers.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = []

    def watch(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_()
            calls.append((name, inputs[0].detach(), output))
            return output

        handles.append(net.get_submodule(name).register_forward_hook(hook))

    try:
        for name in names:
            watch(name)
        with torch.enable_grad():
            value = loss()
        slopes = torch.autograd.grad(value, [out for _, _, out in calls], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[Pair]] = {}
    for (name, x, _), slope in zip(calls, slopes, strict=True):
        if slope is not None:
            pair = x.flatten(0, -2).float(), slope.flatten(0, -2).float()
            found.setdefault(name, []).append(pair)
    return found


def weight_gradient(pairs: Sequence[Pair]) -> Tensor:
    """d(r . A) / dW, (out, in): the sum of slope^T x over all calls."""
    x, slope = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return slope.T @ x


Rounded = Callable[[Tensor, int], Tensor]  # the weight at a width


class RowErrors:
    """Squared action error that each output row would cause alone, at each width.

    mean() is name -> width -> (out,) float64, the mean over losses of (G_c . (Q_b(W_c) - W_c))^2
    with G = d(r . A)/dW.
    """

    def __init__(
        self, net: nn.Module, names: Sequence[str], rounded: Rounded, widths: Sequence[int]
    ) -> None:
        self.count = 0
        self.changes = {
            name: {b: rounded(_weight(net, name), b) - _weight(net, name) for b in widths}
            for name in names
        }
        self.sums = {
            name: {b: torch.zeros(len(_weight(net, name)), dtype=torch.float64) for b in widths}
            for name in names
        }

    def add(self, found: Mapping[str, Sequence[Pair]]) -> None:
        """Add the gradients of one loss."""
        self.count += 1
        for name, pairs in found.items():
            g = weight_gradient(pairs)
            for b, change in self.changes[name].items():
                self.sums[name][b] += (torch.linalg.vecdot(g, change).double() ** 2).cpu()

    def mean(self) -> dict[str, dict[int, Tensor]]:
        """Return the errors so far."""
        count = max(self.count, 1)
        return {name: {b: e / count for b, e in sums.items()} for name, sums in self.sums.items()}


def row_errors(
    net: nn.Module,
    names: Sequence[str],
    losses: Iterable[Loss],
    rounded: Rounded,
    widths: Sequence[int],
) -> dict[str, dict[int, Tensor]]:
    """RowErrors over some losses."""
    errors = RowErrors(net, names, rounded, widths)
    for loss in losses:
        errors.add(gradients(net, names, loss))
    return errors.mean()


def _weight(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
