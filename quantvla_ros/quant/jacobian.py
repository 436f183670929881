# SPDX-License-Identifier: Apache-2.0
"""How much the action feels what happens in a layer: gradients of random directions of it.

For r ~ N(0, 1) over the action, E (r . J d)^2 = |J d|^2, so a few backward passes of r . A give
the squared action error that any small change d of a layer would cause. Knows no policy: the
caller passes functions that run it and return r . A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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
    return torch.stack([slope.T @ x for x, slope in pairs]).sum(0)


def row_errors(
    net: nn.Module,
    names: Sequence[str],
    losses: Iterable[Loss],
    rounded: Callable[[Tensor, int], Tensor],
    widths: Sequence[int],
) -> dict[str, dict[int, Tensor]]:
    """Squared action error that each output row would cause alone, at each width.

    rounded(weight, bits) is the weight at a width. Returns name -> width -> (out,) float64, the
    mean over losses of (G_c . (Q_b(W_c) - W_c))^2 with G = d(r . A)/dW.
    """
    changes = {
        name: {b: rounded(_weight(net, name), b) - _weight(net, name) for b in widths}
        for name in names
    }
    sums = {
        name: {b: torch.zeros(len(_weight(net, name)), dtype=torch.float64) for b in widths}
        for name in names
    }
    count = 0
    for loss in losses:
        count += 1
        for name, pairs in gradients(net, names, loss).items():
            g = weight_gradient(pairs)
            for b in widths:
                sums[name][b] += ((g * changes[name][b]).sum(1).double() ** 2).cpu()
    return {name: {b: e / max(count, 1) for b, e in found.items()} for name, found in sums.items()}


def token_weights(
    net: nn.Module, names: Sequence[str], losses: Iterable[Loss]
) -> dict[str, Tensor]:
    """Hessians of each layer's input in which a token counts by what the action feels of it.

    Returns name -> (in, in) float64, sum over calls of x^T diag(|slope|^2) x.
    """
    found: dict[str, Tensor] = {}
    for loss in losses:
        for name, pairs in gradients(net, names, loss).items():
            x = torch.cat([pair[0] for pair in pairs]).double()
            felt = torch.cat([pair[1] for pair in pairs]).double().pow(2).sum(1)
            gram = ((x * felt[:, None]).T @ x).cpu()
            found[name] = found[name] + gram if name in found else gram
    return found


def _weight(net: nn.Module, name: str) -> Tensor:
    weight = net.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()
