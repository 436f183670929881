# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 on the GPU: policies/groot_n15.py as a plan over planned memory.

Words and patches of images are mixed, so each place of the prefix says which patch stands there.
Places behind the prompt's end are computed and never looked at: the backbone is causal, and the
context layers and the blocks that attend to the context are told the length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantvla_ros.kernels.cuda.launch import PLAIN, Norm, Take, Tokens, run_euler
from quantvla_ros.kernels.cuda.launch_attention import Keys, Turn
from quantvla_ros.kernels.cuda.tiles import NOWHERE, Early
from quantvla_ros.policies.cuda_layers import (
    CachedAttention,
    GatedMlp,
    Mlp,
    Positions,
    SelfAttention,
    VisionTower,
    attend_and_add,
    layer_norm,
    rms_gain,
)
from quantvla_ros.policies.cuda_parts import (
    FloatProjection,
    Group,
    Machine,
    Stream,
    gains,
    project,
    small,
)
from quantvla_ros.policies.cuda_pi import Inputs
from quantvla_ros.policies.cuda_source import Source
from quantvla_ros.policies.flow import guidance_weight
from quantvla_ros.policies.groot_n15 import EPS, GrootConditions

LAST_EPS = 1e-6


class Backbone:
    """Qwen3's layers: causal, each head's queries and keys normed."""

    def __init__(self, source: Source, machine: Machine, config: Any, capacity: int) -> None:
        c, positions = config, Positions(capacity, config.head_width, config.base, source.device)
        names = [f'backbone.layers.{i}' for i in range(c.depth)]
        self.norms = [[rms_gain(source, f'{name}.{kind}_norm.weight', c.eps)
                       for kind in ('attn', 'mlp')] for name in names]

        def turn(name: str) -> Turn:
            q, k = ((gains(source, f'{name}.{part}_norm.weight') for part in 'qk')
                    if c.head_norm else (None, None))
            return Turn(c.heads, c.kv_heads, c.head_width, positions.cosine, positions.sine, q,
                        k, c.eps)

        self.attentions = [CachedAttention(source, machine, f'{name}.attn', turn(name))
                           for name in names]
        self.mlps = [GatedMlp(source, machine, f'{name}.mlp', 'silu') for name in names]
        self.norm = rms_gain(source, 'backbone.norm.weight', c.eps)
        # one layer's keys and values at a time: nothing reads them later
        self.cache = torch.zeros(2, capacity, c.kv_heads * c.head_width, dtype=source.dtype,
                                 device=source.device)
        self.nbytes = (sum(part.nbytes for part in self.attentions)
                       + sum(part.nbytes for part in self.mlps))

    def run(self, stream: Stream, length: Tensor) -> None:
        """All layers."""
        for norms, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            attention.run(stream, norms[0], self.cache, length, behind=False, causal=True)
            mlp.run(stream, norms[1])


class CrossAttention:
    """Queries of the actions over keys and values of the context, made once per chunk.

    k, v: their columns of what one product makes for all such blocks, (capacity, inner) each.
    """

    def __init__(
        self, source: Source, machine: Machine, name: str, heads: int, k: Tensor, v: Tensor
    ) -> None:
        self.machine, self.heads, self.k, self.v = machine, heads, k, v
        self.queries = Group(source, machine, [f'{name}.q_proj'])
        self.output = project(source, machine, f'{name}.o_proj')
        self.nbytes = self.queries.nbytes + self.output.nbytes

    def run(self, stream: Stream, norm: Norm, length: Tensor, step: int) -> None:
        """Norm, attend, add."""
        inner = self.queries.n
        q = self.machine.scratch('qkv', stream.x.shape[0], inner)
        self.queries.run(stream, norm, q, step=step)
        keys = Keys(self.k, self.v, self.heads, inner // self.heads, 0, length, len(self.k))
        attend_and_add(self.machine, stream, q, keys, self.heads, self.output, step=step)


class GrootPlan:
    """The whole network for one number of cameras and one capacity of the prefix."""

    def __init__(
        self, source: Source, config: Any, *, steps: int, cameras: int, capacity: int,
        early: Early = NOWHERE,
    ) -> None:
        self.config, self.steps, self.capacity = config, steps, capacity
        self.machine = m = Machine(source.device, source.dtype)
        self.early = early
        c, width = config, config.backbone.width
        self.vision = VisionTower(source, m, c.vision)
        self.backbone = Backbone(source, m, c.backbone, capacity)
        self.context_norm = layer_norm(source, 'context_norm', EPS)
        names = [f'context_layers.{i}' for i in range(c.context_layers)]
        self.context_norms = [[layer_norm(source, f'{name}.{kind}_norm', EPS)
                               for kind in ('attn', 'mlp')] for name in names]
        self.context_attentions = [
            SelfAttention(source, m, f'{name}.attn', c.context_heads) for name in names]
        self.context_mlps = [Mlp(source, m, f'{name}.mlp', 'gelu_tanh') for name in names]
        self.context = Group(source, m, [f'blocks.{i}.attn.{part}_proj'
                                         for i in range(0, c.depth, 2) for part in 'kv'])
        self.cache = torch.zeros(capacity, self.context.n, dtype=source.dtype,
                                 device=source.device)
        pairs = iter(self.cache.split(c.width, 1))
        self.attentions: list[CrossAttention | SelfAttention] = [
            CrossAttention(source, m, f'blocks.{i}.attn', c.heads, next(pairs), next(pairs))
            if i % 2 == 0 else SelfAttention(source, m, f'blocks.{i}.attn', c.heads)
            for i in range(c.depth)]
        self.mlps = [Mlp(source, m, f'blocks.{i}.mlp', 'gelu_tanh') for i in range(c.depth)]
        self.inputs = Inputs.make(source.device, source.dtype, (cameras, c.vision.image),
                                  (capacity, width), c.state, (c.horizon, c.action))
        self._small(source)
        self._conditions(source)

    def _small(self, source: Source) -> None:
        c = self.config
        self.state = [small(source, f'state_encoder.fc{i}') for i in (1, 2)]
        self.decoder = [small(source, f'action_decoder.fc{i}') for i in (1, 2)]
        self.out = small(source, 'out')
        self.enter, self.leave = (small(source, f'action_encoder.{name}')
                                  for name in ('enter', 'leave'))
        self.future = source.value('future').to(source.dtype)
        self.position = source.value('position')[: c.horizon].to(source.dtype)
        self.start = torch.zeros(1 + c.future, c.width, dtype=source.dtype,
                                 device=source.device)

    def _conditions(self, source: Source) -> None:
        """Norms of every step, and the time's share of the action encoder's second layer."""
        c, device = self.config, source.device
        mix = small(source, 'action_encoder.mix')
        own, times = (mix.weight[:, : c.width].contiguous(), mix.weight[:, c.width:])

        def norm(modulation: Tensor, eps: float, scale: int) -> Norm:
            parts = modulation.float().to(device).flatten().chunk(2)
            return Norm('layer', eps, (1 + parts[scale]).contiguous(),
                        parts[1 - scale].contiguous())

        self.mix, self.norms, self.last = [], [], []
        for condition in source.conditions(self.steps):
            assert isinstance(condition, GrootConditions)
            features = condition.features.to(device, source.dtype)[0, 0]
            self.mix.append(FloatProjection(own, F.linear(features, times, mix.bias)))
            self.norms.append([norm(block, EPS, 0) for block in condition.blocks])
            self.last.append(norm(condition.last, LAST_EPS, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights that products read."""
        parts = (self.vision, self.backbone, self.context, *self.context_attentions,
                 *self.context_mlps, *self.attentions, *self.mlps)
        return sum(part.nbytes for part in parts)

    def prefix(self) -> None:
        """Inputs -> keys and values of the context, and the tokens that stand before actions."""
        i, m = self.inputs, self.machine
        m.pdl = self.early.prefix
        seen = self.vision.run(i.images)
        x = m.scratch('prefix', *i.words.shape)
        patches = seen[i.order.clamp(min=0)]
        torch.where((i.order >= 0)[:, None], patches, i.words, out=x)
        stream = Stream(m, x)
        self.backbone.run(stream, i.length)
        floats = Take(16, x.shape[1])
        context = m.scratch('context', *x.shape)
        context.copy_(stream.tokens(floats, self.backbone.norm).data)
        stream = Stream(m, context)
        context.copy_(stream.tokens(floats, self.context_norm).data)
        for norms, attention, mlp in zip(self.context_norms, self.context_attentions,
                                         self.context_mlps, strict=True):
            attention.run(stream, norms[0], i.length)
            mlp.run(stream, norms[1])
        self.context.run(stream, PLAIN, self.cache)
        hidden = F.relu(F.linear(i.state, self.state[0].weight, self.state[0].bias))
        self.start[0].copy_(F.linear(hidden, self.state[1].weight, self.state[1].bias))
        self.start[1:].copy_(self.future)

    def _actions(self, narrow: Tensor, step: int) -> Tensor:
        """Noisy actions -> the sequence that the blocks run on."""
        m, c = self.machine, self.config
        entered = m.scratch('entered', c.horizon, c.width)
        mixed = m.scratch('mixed', c.horizon, c.width)
        self.enter.product(Tokens(narrow), entered)
        self.mix[step].product(Tokens(entered), mixed)
        x = m.scratch('stream', len(self.start) + c.horizon, c.width)
        x[: len(self.start)].copy_(self.start)
        self.leave.product(Tokens(F.silu(mixed)), x[len(self.start):])
        x[len(self.start):].add_(self.position)
        return x

    def denoise(self) -> None:
        """All steps, in place on inputs.x."""
        i, m, c = self.inputs, self.machine, self.config
        m.pdl = self.early.loop
        narrow = m.scratch('actions', *i.x.shape)
        narrow.copy_(i.x)
        plain = Norm('layer', EPS)
        for step in range(self.steps):
            stream = Stream(m, self._actions(narrow, step))
            for block, (attention, mlp) in enumerate(
                    zip(self.attentions, self.mlps, strict=True)):
                norm = self.norms[step][block]
                if isinstance(attention, CrossAttention):
                    attention.run(stream, norm, i.length, step)
                else:
                    attention.run(stream, norm, step=step)
                mlp.run(stream, plain, step)
            last = stream.tokens(self.out.take(), self.last[step]).data[-c.horizon:]
            out = F.linear(last, self.out.weight, self.out.bias)
            out = F.relu(F.linear(out, self.decoder[0].weight, self.decoder[0].bias))
            velocity = F.linear(out, self.decoder[1].weight, self.decoder[1].bias)
            run_euler(i.x, velocity, i.target, i.weight, narrow,
                      time_left=1.0 - step / self.steps, step=1.0 / self.steps,
                      pull=guidance_weight(step / self.steps, self.steps, 10.0), pdl=m.pdl)
