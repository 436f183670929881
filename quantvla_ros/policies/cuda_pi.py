# SPDX-License-Identifier: Apache-2.0
"""pi0.5 and pi0 on the GPU: policies/pi05.py and pi0.py as plans over planned memory.

Images stand first and words behind them, so that a short prompt leaves only the end of the
prefix unused: those rows are computed and never looked at. Norms of the expert read their rows of
the modulation table; the sign of time is in the last layer's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantvla_ros.kernels.cuda.launch import Norm, Tokens, run_euler
from quantvla_ros.kernels.cuda.launch_attention import Turn
from quantvla_ros.kernels.cuda.tiles import NOWHERE, Early
from quantvla_ros.policies.cuda_layers import (
    CachedAttention,
    GatedMlp,
    Positions,
    VisionTower,
    rms_gain,
)
from quantvla_ros.policies.cuda_parts import FloatProjection, Machine, Stream, small
from quantvla_ros.policies.cuda_source import Source
from quantvla_ros.policies.flow import guidance_weight
from quantvla_ros.policies.gemma import EPS, GemmaConfig


@dataclass(eq=False)
class Inputs:
    """What a plan reads, at fixed addresses.

    images uint8 (V, 3, S, S); words (capacity, width) rows of the embedding; order int32
    (capacity,): row of the images' tokens that stands at each place, -1 for the words' own;
    length int32 (1,): tokens of the prefix; state (state,); x float32 (horizon, action): noise,
    then the chunk; target and weight: guidance, zero weights for none.
    """

    images: Tensor
    words: Tensor
    order: Tensor
    length: Tensor
    state: Tensor
    x: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def make(
        cls, device: torch.device, dtype: torch.dtype, images: tuple[int, int],
        words: tuple[int, int], state: int, chunk: tuple[int, int],
    ) -> Inputs:
        """images: (count, side); words: (capacity of the prefix, width)."""
        count, side = images
        return cls(
            torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device),
            torch.zeros(words, dtype=dtype, device=device),
            torch.full((words[0],), -1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(max(state, 1), dtype=dtype, device=device),
            torch.zeros(chunk, device=device), torch.zeros(chunk, device=device),
            torch.zeros(chunk[0], device=device))


class GemmaLayers:
    """A stack of Gemma layers over a cache (depth, 2, capacity, groups * width)."""

    def __init__(
        self, source: Source, machine: Machine, name: str, config: GemmaConfig,
        positions: Positions, *, prefix: bool,
    ) -> None:
        self.config, self.prefix = config, prefix
        turn = Turn(config.heads, config.kv_heads, config.head_width, positions.cosine,
                    positions.sine)
        layers = [f'{name}.layers.{i}' for i in range(config.depth)]
        # nothing reads what a prefix computes behind its last keys and values
        self.attentions = [
            CachedAttention(source, machine, f'{layer}.attn', turn,
                            last=prefix and i == config.depth - 1)
            for i, layer in enumerate(layers)]
        count = config.depth - 1 if prefix else config.depth
        self.mlps = [GatedMlp(source, machine, f'{layer}.mlp', 'gelu_tanh')
                     for layer in layers[:count]]
        self.nbytes = (sum(part.nbytes for part in self.attentions)
                       + sum(part.nbytes for part in self.mlps))

    def run(
        self, stream: Stream, norms: list[Norm], gates: list[Tensor | None], cache: Tensor,
        length: Tensor, step: int = 0,
    ) -> None:
        """norms and gates: of attention and MLP of each layer, in the order they run."""
        for i, attention in enumerate(self.attentions):
            attention.run(stream, norms[2 * i], cache[i], length, behind=not self.prefix,
                          gate=gates[2 * i], step=step)
            if i < len(self.mlps):
                self.mlps[i].run(stream, norms[2 * i + 1], gates[2 * i + 1], step)


class PiPlan:
    """The whole network for one number of cameras and one capacity of the prefix."""

    def __init__(
        self, source: Source, config: Any, *, steps: int, cameras: int, capacity: int,
        early: Early = NOWHERE, adaptive: bool = True,
    ) -> None:
        self.config, self.steps, self.adaptive = config, steps, adaptive
        self.machine = m = Machine(source.device, source.dtype)
        self.early = early
        c, e = config.backbone, config.expert
        self.capacity = capacity
        behind = config.horizon + (0 if adaptive else 1)
        positions = Positions(capacity + behind, c.head_width, 10000.0, source.device)
        self.vision = VisionTower(source, m, config.vision)
        self.backbone = GemmaLayers(source, m, 'backbone', c, positions, prefix=True)
        self.expert = GemmaLayers(source, m, 'expert', e, positions, prefix=False)
        self.cache = torch.zeros(e.depth, 2, capacity + behind, c.kv_heads * c.head_width,
                                 dtype=source.dtype, device=source.device)
        self.length = torch.zeros(1, dtype=torch.int32, device=source.device)
        self.prefix_norms = _gemma_norms(source, 'backbone', c, prefix=True)
        self.inputs = Inputs.make(
            source.device, source.dtype, (cameras, config.vision.image), (capacity, c.width),
            getattr(config, 'state', 0), (config.horizon, config.action))
        self.enter = small(source, 'action_in')
        out = small(source, 'action_out')
        self.leave = FloatProjection(-out.weight, None if out.bias is None else -out.bias)
        self._conditions(source)

    def _conditions(self, source: Source) -> None:
        """Norms, gates and first layers of every step."""
        e = self.config.expert
        conditions = source.conditions(self.steps)
        if self.adaptive:
            tables = [torch.as_tensor(c).float().to(source.device) for c in conditions]
            self.norms = [[Norm('rms', EPS, (1 + row[0]).contiguous(), row[1].contiguous())
                           for row in table.unflatten(1, (3, -1))] for table in tables]
            self.gates: list[list[Tensor | None]] = [
                [row[2].contiguous() for row in table.unflatten(1, (3, -1))] for table in tables]
            return
        plain = [*_gemma_norms(source, 'expert', e, prefix=False),
                 rms_gain(source, 'expert.norm.weight', EPS, 1.0)]
        self.norms = [plain] * self.steps
        self.gates = [[None] * (2 * e.depth + 1)] * self.steps
        weight = small(source, 'action_time_in').weight
        self.mix = [FloatProjection(weight[:, :e.width].contiguous(),
                                    torch.as_tensor(c).to(source.device, source.dtype)[0])
                    for c in conditions]
        self.mixed = small(source, 'action_time_out')
        self.state_in = small(source, 'state_in')

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that products read."""
        return self.vision.nbytes + self.backbone.nbytes + self.expert.nbytes

    def prefix(self) -> None:
        """Inputs -> keys and values of every layer, and how many there are."""
        self.machine.pdl = self.early.prefix
        i, width = self.inputs, self.config.backbone.width
        seen = self.vision.run(i.images)
        x = self.machine.scratch('prefix', self.capacity, width)
        torch.mul(i.words, width**0.5, out=x)
        x[: seen.shape[0]].copy_(seen)
        none: list[Tensor | None] = [None] * (2 * self.config.backbone.depth)
        self.backbone.run(Stream(self.machine, x), self.prefix_norms, none, self.cache, i.length)
        if self.adaptive:
            self.length.copy_(i.length)
            return
        token = self.machine.scratch('state token', 1, self.config.expert.width)
        self.state_in.product(Tokens(i.state[None]), token)
        self.expert.run(Stream(self.machine, token), self.norms[0], self.gates[0], self.cache,
                        i.length)
        torch.add(i.length, 1, out=self.length)

    def denoise(self) -> None:
        """All steps, in place on inputs.x."""
        i, m, horizon = self.inputs, self.machine, self.config.horizon
        m.pdl = self.early.loop
        narrow = m.scratch('actions', *i.x.shape)
        narrow.copy_(i.x)
        velocity = m.scratch('velocity', *i.x.shape)
        for step in range(self.steps):
            x = m.scratch('stream', horizon, self.config.expert.width)
            self.enter.product(Tokens(narrow), x)
            if not self.adaptive:
                mixed = m.scratch('mixed', *x.shape)
                self.mix[step].product(Tokens(x), mixed)
                self.mixed.product(Tokens(F.silu(mixed)), x)
            stream = Stream(m, x)
            self.expert.run(stream, self.norms[step], self.gates[step], self.cache, self.length,
                            step)
            self.leave.product(stream.tokens(self.leave.take(), self.norms[step][-1]), velocity)
            run_euler(i.x, velocity, i.target, i.weight, narrow,
                      time_left=1.0 - step / self.steps, step=1.0 / self.steps,
                      pull=guidance_weight(step / self.steps, self.steps, 10.0), pdl=m.pdl)


def _gemma_norms(source: Source, name: str, config: GemmaConfig, *, prefix: bool) -> list[Norm]:
    """Norms of a stack with plain ones, two a layer; the last layer of a prefix runs only one."""
    names = [f'{name}.layers.{i}.{kind}_norm.weight'
             for i in range(config.depth) for kind in ('attn', 'mlp')]
    return [rms_gain(source, name, EPS, 1.0) for name in (names[:-1] if prefix else names)]
