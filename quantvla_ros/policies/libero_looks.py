# SPDX-License-Identifier: Apache-2.0
"""Look into the shipped network while it makes one chunk: how large its inputs are.

The figures are those of a Calibration's ranges: the largest |input| of each linear, and the
largest standard deviation of a head's attention logits. Recorded programs run call by call for
that, in the prefix and in one denoising step, so that a look costs little; other networks are
hooked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.program import Read
from quantvla_ros.policies.libero_vla import AttentionCore, LiberoVlaNet

HEAD = 'action.'  # layers below it run once in each denoising step


@dataclass
class Seen:
    """What one look found, by name of the layer.

    inputs: largest |input| of a linear. spreads: largest standard deviation of a head's logits.
    partial: names that were seen in one denoising step alone, so that they may be too small.
    """

    inputs: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    def add_input(self, name: str, value: float) -> None:
        """Note one input of a linear."""
        self.inputs[name] = max(self.inputs.get(name, 0.0), value)

    def add_spread(self, name: str, value: float) -> None:
        """Note the logits of one call."""
        self.spreads[name] = max(self.spreads.get(name, 0.0), value)

    def add(self, read: Read) -> None:
        """Note what a recorded call is about to read; a name may stand for several linears."""
        if not read.name:
            return
        if read.keys is not None:
            self.add_spread(read.name, spread(read))
            return
        x, norm = read.x, read.norm
        if norm is not None:
            x = reference.normalize(x, norm.eps, norm.multiply, norm.add)
        low, high = torch.aminmax(x)
        largest = max(-float(low), float(high))
        for name in read.name.split('|'):
            self.add_input(name, largest)


def spread(read: Read) -> float:
    """Largest standard deviation of the logits of a head in a recorded attention."""
    assert read.keys is not None, 'an attention'
    dim = read.x.shape[1] // read.heads

    def heads(x: Tensor, count: int) -> Tensor:
        x = x.reshape(read.batch, -1, count, dim)
        if read.rotary is None:
            return x
        cos, sin = (table[: x.shape[1], None] for table in read.rotary)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q = heads(read.x, read.heads).transpose(1, 2)  # (batch, heads, queries, dim)
    k = heads(read.keys, read.kv_heads).transpose(1, 2)
    return largest_spread(q, k)


def largest_spread(q: Tensor, k: Tensor) -> float:
    """q (B, H, T, D), k (B, G, S, D) -> the largest standard deviation of a head's logits."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    by_head = (logits / q.shape[-1] ** 0.5).transpose(0, 1).flatten(1)
    return float(by_head.std(1, unbiased=False).max())


@contextmanager
def hooked(net: LiberoVlaNet, seen: Seen) -> Iterator[None]:
    """Look at a network that runs layer by layer, in all its denoising steps."""
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def linear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.add_input(name, float(inputs[0].abs().max()))

        def core(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.add_spread(name.removesuffix('.core'), largest_spread(*inputs[:2]))

        hook = core if isinstance(module, AttentionCore) else linear
        handles.append(module.register_forward_pre_hook(hook))

    try:
        for name, module in net.named_modules():
            if isinstance(module, AttentionCore) or hasattr(module, 'in_features'):
                watch(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
