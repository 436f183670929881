# SPDX-License-Identifier: Apache-2.0
"""A twin of the shipped network: the same float function, with large outliers inside.

Large backbones have a few channels far above the others, and it is those that 4-bit rounding
fails on; a small network trained from scratch has none. Here they are made by exact pairs:

    value rows * c   against the o columns of every head that shares them
    up rows * c      against down columns
    norm gain * c    against the columns of all linears that read the norm
    modulation * c   against the columns that read the modulated input (action head)

c is a power of two, so products keep every bit in binary floating point; only what a float16
file cannot hold of a small weight is lost. Before the value pairs, values are turned by one
orthogonal matrix for each key-value head, undone in o, so that an outlier is not aligned with
what training left there; that part is exact to rounding. The residual stream is not turned: its
norms have gains and its action half is modulated, so a rotation would not commute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from quantvla_ros.policies.libero_vla import (
    PARTS,
    ActionBlock,
    Attention,
    Block,
    GatedMLP,
    LiberoVlaNet,
    RMSNorm,
)

CLOSING = (24.0, 160.0)  # max / median of channel peaks at o and down inputs; published 20 to 200
ELSEWHERE = (6.0, 24.0)  # at the other inputs; published 5 to 30
SHARE = 64  # one channel of so many stands out
LARGEST = 12  # log2 of the largest factor

Peaks = Mapping[str, Tensor]  # linear -> (in,) largest magnitude of each input channel


@dataclass
class _Draw:
    """Draws the channels that stand out and the factors that bring them to a published size."""

    generator: torch.Generator
    peaks: Peaks

    def channels(self, count: int) -> Tensor:
        """Draw one channel of every SHARE, at least one."""
        chosen = torch.randperm(count, generator=self.generator)[: max(1, count // SHARE)]
        return chosen.sort().values

    def factors(self, name: str, size: int, span: tuple[float, float]) -> Tensor:
        """Factors (size,), powers of two, 1 but for the chosen channels of one linear's input."""
        peak = self.peaks[name][:size]
        return self.reach(peak, float(self.peaks[name].median()), span)

    def reach(self, peak: Tensor, median: float, span: tuple[float, float]) -> Tensor:
        """Factors that bring the chosen of some channels to a drawn multiple of the median."""
        factors = torch.ones(len(peak))
        low, high = (torch.tensor(x).log2() for x in span)
        for channel in self.channels(len(peak)).tolist():
            target = 2 ** float(low + (high - low) * torch.rand((), generator=self.generator))
            ratio = target * median / max(float(peak[channel]), 1e-6 * max(median, 1e-6))
            power = round(float(torch.tensor(ratio).log2()))
            factors[channel] = 2.0 ** min(max(power, 0), LARGEST)
        return factors

    def rotation(self, size: int) -> Tensor:
        """Random orthogonal matrix."""
        q, r = torch.linalg.qr(torch.randn(size, size, generator=self.generator).double())
        return q * r.diagonal().sign()


@torch.no_grad()
def stress(net: LiberoVlaNet, peaks: Peaks, seed: int = 0) -> None:
    """Rewrite a network in place. peaks: of its own linears, by observe(); CPU, float32."""
    draw = _Draw(torch.Generator().manual_seed(seed), peaks)
    names = {module: name for name, module in net.named_modules()}
    _readers(draw, net.vision.norm, [net.vision.project], 'vision.project')
    for module in net.modules():
        if isinstance(module, Block):
            attn, name = module.attn, names[module]
            _readers(draw, module.attn_norm, [attn.q_proj, attn.k_proj, attn.v_proj],
                     f'{name}.attn.q_proj')
            parts = ('gate_proj', 'up_proj') if isinstance(module.mlp, GatedMLP) else ('fc1',)
            readers = [cast(nn.Linear, module.mlp.get_submodule(part)) for part in parts]
            _readers(draw, module.mlp_norm, readers, f'{name}.mlp.{parts[0]}')
    crosses = [cast(ActionBlock, block).cross for block in net.action.blocks]
    _readers(draw, net.backbone.norm,
             [part for cross in crosses for part in (cross.k_proj, cross.v_proj)],
             f'{names[crosses[0]]}.k_proj')
    _readers(draw, net.action.norm, [net.action.leave], 'action.leave')
    _modulation(draw, net)
    for module in net.modules():
        if isinstance(module, Attention):
            _turn_values(draw, module)
    for module, name in names.items():
        if isinstance(module, Attention):
            _values(draw, module, f'{name}.o_proj')
        elif isinstance(module, GatedMLP):
            factors = draw.factors(f'{name}.down_proj', module.down_proj.in_features, CLOSING)
            module.up_proj.weight *= factors[:, None]
            module.down_proj.weight /= factors


def _readers(draw: _Draw, norm: RMSNorm, readers: list[nn.Linear], name: str) -> None:
    """Scale the gain of a norm up and the columns of all that read it down."""
    factors = draw.factors(name, len(norm.weight), ELSEWHERE)
    norm.weight.mul_(factors)
    for reader in readers:
        reader.weight /= factors


def _modulation(draw: _Draw, net: LiberoVlaNet) -> None:
    """Scale shift and scale of the action head's three modulated inputs.

    The modulated input is shift + scale * x with scale = 1 + ..., and all blocks share time_out,
    so a channel has one factor in all blocks, and c - 1 is added to what stands beside the 1. A
    float16 bias holds that only coarsely; what it misses goes to the blocks' own, finer part.
    """
    head = net.action
    width = head.enter.out_features
    rows = head.time_out.weight.view(PARTS, width, -1)
    bias = head.time_out.bias.view(PARTS, width)
    readers = ((0, 'attn', ('q_proj', 'k_proj', 'v_proj')), (3, 'cross', ('q_proj',)),
               (6, 'mlp', ('gate_proj', 'up_proj')))
    for part, child, names in readers:
        first = f'action.blocks.0.{child}.{names[0]}'
        factors = draw.factors(first, width, ELSEWHERE)
        for p in (part, part + 1):
            wanted = bias[p] * factors + (factors - 1 if p == part + 1 else 0)
            stored = torch.where(factors == 1, bias[p], wanted.half().float())
            missed = torch.where(factors == 1, torch.zeros_like(wanted), wanted - stored)
            rows[p] *= factors[:, None]
            bias[p] = stored
            for block in head.blocks:
                own = cast(ActionBlock, block).modulation
                own[p] = own[p] * factors + missed
        for block in head.blocks:
            for name in names:
                cast(nn.Linear, block.get_submodule(f'{child}.{name}')).weight /= factors


def _turn_values(draw: _Draw, attention: Attention) -> None:
    """Turn the values of each key-value head, and turn them back in o."""
    width = attention.v_proj.out_features // attention.kv_heads
    shared = attention.heads // attention.kv_heads
    v, o = attention.v_proj.weight, attention.o_proj.weight
    for group in range(attention.kv_heads):
        turn = draw.rotation(width)
        rows = slice(group * width, (group + 1) * width)
        v[rows] = (turn @ v[rows].double()).float()
        for head in range(group * shared, (group + 1) * shared):
            columns = slice(head * width, (head + 1) * width)
            o[:, columns] = (o[:, columns].double() @ turn.T).float()


def _values(draw: _Draw, attention: Attention, name: str) -> None:
    """Scale value rows, and the o columns of every head that shares them, against each other."""
    width = attention.v_proj.out_features // attention.kv_heads
    shared = attention.heads // attention.kv_heads
    peak = draw.peaks[name].view(attention.kv_heads, shared, width).amax(1)
    median = float(draw.peaks[name].median())
    # after the turn a channel is a mixture of its head's: its peak is near their root mean square
    mixed = peak.pow(2).mean(1, keepdim=True).sqrt().expand_as(peak)
    factors = torch.stack([draw.reach(row, median, CLOSING) for row in mixed])
    attention.v_proj.weight *= factors.flatten()[:, None]
    columns = factors[:, None].expand(-1, shared, -1).reshape(-1)
    attention.o_proj.weight /= columns


def outlier_ratio(peaks: Tensor) -> float:
    """Largest over median of the channel peaks of one input."""
    return float(peaks.max() / peaks.median().clamp_min(1e-12))
