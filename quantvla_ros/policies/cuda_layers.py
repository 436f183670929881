# SPDX-License-Identifier: Apache-2.0
"""Blocks of layers on the GPU: MLPs, attention over a cache, attention in place, SigLIP's tower.

Each is built once from a Source and then run on a Stream. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantvla_ros.kernels.cuda import launch, launch_fused
from quantvla_ros.kernels.cuda import launch_attention as attention
from quantvla_ros.kernels.cuda.launch import Epilogue, Norm, Tokens, Turned
from quantvla_ros.kernels.cuda.launch_attention import Keys, Turn
from quantvla_ros.kernels.cuda.pack import EIGHT, interleaved, pair_of_biases
from quantvla_ros.policies.blocks import rotary
from quantvla_ros.policies.cuda_parts import (
    FloatProjection,
    Group,
    IntegerProjection,
    Machine,
    Projection,
    Stream,
    gains,
    project,
    same_take,
)
from quantvla_ros.policies.cuda_source import Source
from quantvla_ros.policies.siglip import EPS as VISION_EPS
from quantvla_ros.policies.siglip import VisionConfig


def layer_norm(source: Source, name: str, eps: float) -> Norm:
    """A LayerNorm with weight and bias."""
    return Norm('layer', eps, gains(source, f'{name}.weight'), gains(source, f'{name}.bias'))


class Mlp:
    """fc2(act(fc1(x))), with biases, added to the stream."""

    def __init__(self, source: Source, machine: Machine, name: str, act: str) -> None:
        self.machine, self.act = machine, act
        self.first = project(source, machine, f'{name}.fc1')
        self.second = project(source, machine, f'{name}.fc2')
        self.nbytes = self.first.nbytes + self.second.nbytes

    def run(self, stream: Stream, norm: Norm, step: int = 0) -> None:
        """Norm, both products, and the sum."""
        m, first = self.machine, self.first
        tokens = stream.tokens(first.take(step), norm)
        hidden = m.scratch('hidden', stream.x.shape[0], first.n)
        take = self.second.take(step)
        if isinstance(first, IntegerProjection):
            first.product(tokens, hidden, Epilogue(act=self.act), step)
            act = 'none'
        else:
            first.product(tokens, hidden)
            act = self.act
        made = Tokens(hidden)
        if take.top or act != 'none':
            made = m.tokens(hidden.shape[0], take)
            launch.make_tokens(hidden, first.n, take, made, act=act, pdl=m.pdl)
        stream.add(self.second, made, step=step)


class GatedMlp:
    """down(act(gate(x)) * up(x)), added to the stream."""

    def __init__(self, source: Source, machine: Machine, name: str, act: str) -> None:
        self.machine, self.act = machine, act
        pair = [project(source, machine, f'{name}.{part}_proj') for part in ('gate', 'up')]
        self.gate, self.up = pair
        self.down = project(source, machine, f'{name}.down_proj')
        self.fused = self._can_fuse(*pair)
        self.both: IntegerProjection | None = None  # with rows in turns
        self.group = None
        if self.fused and 'pair' in machine.ways and pair[0].n % EIGHT == 0:
            self.both = self._in_turns(*pair)
        if self.both or not self.fused:
            del self.gate, self.up
        if not self.fused:
            self.group = Group(source, machine, [f'{name}.gate_proj', f'{name}.up_proj'], pair)
        pair = [self.both] if self.both else self.group.parts if self.group else pair
        self.nbytes = sum(p.nbytes for p in (*pair, self.down))

    @staticmethod
    def _in_turns(gate: Projection, up: Projection) -> IntegerProjection:
        assert isinstance(gate, IntegerProjection) and isinstance(up, IntegerProjection)
        gate.bias = pair_of_biases(gate.bias, up.bias, gate.n)
        gate.weight = interleaved(gate.weight, up.weight)
        return gate

    @staticmethod
    def _can_fuse(gate: Projection, up: Projection) -> bool:
        if isinstance(gate, FloatProjection) or isinstance(up, FloatProjection):
            return False
        kinds = {(p.weight.bits, p.weight.group, p.weight.pack) for p in (gate, up)}
        return len(kinds) == 1 and same_take(gate, up)

    def run(self, stream: Stream, norm: Norm, gate: Tensor | None = None, step: int = 0) -> None:
        """Norm, three products, and the sum."""
        m, rows = self.machine, stream.x.shape[0]
        take = self.down.take(step)
        if self.both is not None:
            tokens = stream.tokens(self.both.take(step), norm)
            hidden = m.scratch('hidden', rows, self.both.n)
            launch_fused.run_pair(self.both.tokens(tokens, step), self.both.weight, hidden,
                                  self.act, self.both.bias, pdl=m.pdl)
            made = Tokens(hidden)
            if take.top:
                made = m.tokens(rows, take)
                launch.make_tokens(hidden, self.both.n, take, made, pdl=m.pdl)
        elif self.fused:
            assert isinstance(self.gate, IntegerProjection)
            assert isinstance(self.up, IntegerProjection)
            tokens = stream.tokens(self.gate.take(step), norm)
            hidden = m.scratch('hidden', rows, self.gate.n)
            self.gate.product(tokens, hidden, Epilogue(
                act=self.act, up=self.up.weight, up_bias=self.up.bias), step)
            made = Tokens(hidden)
            if take.top:
                made = m.tokens(rows, take)
                launch.make_tokens(hidden, self.gate.n, take, made, pdl=m.pdl)
        else:
            assert self.group is not None
            pair = m.scratch('pair', rows, self.group.n)
            self.group.run(stream, norm, pair, step=step)
            made = m.tokens(rows, take)
            launch.make_tokens(pair, self.group.n // 2, take, made, act=self.act, pair=True,
                               pdl=m.pdl)
        stream.add(self.down, made, gate, step)


class Positions:
    """Cosines and sines of every position of a capacity: float32 (positions, width / 2) each."""

    def __init__(self, count: int, width: int, base: float, device: torch.device) -> None:
        table = rotary(torch.arange(count), width, base)
        half = width // 2
        self.cosine = table[0, :, :half].contiguous().to(device)
        self.sine = table[1, :, half:].contiguous().to(device)


def attend_and_add(
    machine: Machine, stream: Stream, q: Tensor, keys: Keys, heads: int, output: Projection,
    *, gate: Tensor | None = None, causal: bool = False, step: int = 0,
) -> None:
    """stream += gate * output(attention of q over keys)."""
    rows, width = q.shape[0], keys.width
    split = attention.choose_split(rows * heads // keys.groups, keys.most or keys.extra,
                                keys.groups, width, machine.chip)
    take = output.take(step)
    if split.parts == 1:
        seen = machine.scratch('attended', rows, heads * width)
        attention.run_attend(q, keys, heads, seen, split, causal=causal, pdl=machine.pdl)
        made = Tokens(seen)
        if take.top:
            made = machine.tokens(rows, take)
            launch.make_tokens(seen, heads * width, take, made, pdl=machine.pdl)
    else:
        parts = machine.parts(split.parts, rows, heads, width)
        attention.run_attend(q, keys, heads, parts, split, causal=causal, pdl=machine.pdl)
        made = machine.tokens(rows, take)
        attention.run_join(parts, split.parts, width, take, made, machine.dtype,
                           pdl=machine.pdl)
    stream.add(output, made, gate, step)


class SelfAttention:
    """Attention of a run of tokens to itself, without positions; keys may end at a length."""

    def __init__(self, source: Source, machine: Machine, name: str, heads: int) -> None:
        self.machine, self.heads = machine, heads
        self.qkv = Group(source, machine, [f'{name}.{part}_proj' for part in 'qkv'])
        self.output = project(source, machine, f'{name}.o_proj')
        self.width = self.qkv.n // (3 * heads)
        self.nbytes = self.qkv.nbytes + self.output.nbytes

    def run(
        self, stream: Stream, norm: Norm, length: Tensor | None = None, step: int = 0
    ) -> None:
        """Norm, attend, add."""
        rows, inner = stream.x.shape[0], self.heads * self.width
        qkv = self.machine.scratch('qkv', rows, 3 * inner)
        self.qkv.run(stream, norm, qkv, step=step)
        extra = rows if length is None else 0
        keys = Keys(qkv[:, inner:2 * inner], qkv[:, 2 * inner:], self.heads, self.width, extra,
                    length, rows)
        attend_and_add(self.machine, stream, qkv[:, :inner], keys, self.heads, self.output,
                       step=step)

    def run_images(self, stream: Stream, norm: Norm, images: int) -> None:
        """The same for a batch of whole images, by the vendor's attention."""
        m, rows, inner = self.machine, stream.x.shape[0], self.heads * self.width
        qkv = m.scratch('qkv', rows, 3 * inner)
        self.qkv.run(stream, norm, qkv)
        parts = qkv.view(images, -1, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        flat = seen.transpose(1, 2).reshape(rows, inner)
        take = self.output.take()
        made = Tokens(flat)
        if take.top:
            made = m.tokens(rows, take)
            launch.make_tokens(flat, inner, take, made, pdl=m.pdl)
        stream.add(self.output, made)


class CachedAttention:
    """Attention with rotary positions whose keys and values go into a cache."""

    def __init__(
        self, source: Source, machine: Machine, name: str, turn: Turn, *, last: bool = False
    ) -> None:
        self.machine, self.turn, self.last = machine, turn, last
        kept = ['k_proj', 'v_proj'] if last else ['q_proj', 'k_proj', 'v_proj']
        self.qkv = Group(source, machine, [f'{name}.{part}' for part in kept])
        self.output = None if last else project(source, machine, f'{name}.o_proj')
        self.nbytes = self.qkv.nbytes + (self.output.nbytes if self.output else 0)
        self.fused = turn.q_norm is None and self.qkv.pair(turn.width)

    def run(
        self, stream: Stream, norm: Norm, cache: Tensor, length: Tensor, *, behind: bool,
        gate: Tensor | None = None, causal: bool = False, step: int = 0,
    ) -> None:
        """Norm, attend, add. cache (2, capacity, groups * width).

        behind: these tokens stand behind the length[0] that are cached already and see them and
        one another; otherwise they are the first ones, of which length[0] are real.
        """
        m, t, rows = self.machine, self.turn, stream.x.shape[0]
        heads = 0 if self.last else t.heads
        q = m.scratch('q', rows, t.heads * t.width)
        start = length if behind else None
        if self.fused:
            queries = heads * t.width
            self.qkv.run_turned(stream, norm, q, Turned(
                t.cosine, t.sine, cache[0], cache[1], queries, queries + t.groups * t.width,
                start), step=step)
        else:
            qkv = m.scratch('qkv', rows, self.qkv.n)
            self.qkv.run(stream, norm, qkv, step=step)
            turn = Turn(heads, t.groups, t.width, t.cosine, t.sine, t.q_norm, t.k_norm, t.eps)
            attention.run_turn(qkv, turn, q, cache[0], cache[1], start, pdl=m.pdl)
        if self.output is None:
            return
        keys = Keys(cache[0], cache[1], t.groups, t.width, rows if behind else 0, length,
                    cache.shape[1])
        attend_and_add(m, stream, q, keys, t.heads, self.output, gate=gate, causal=causal,
                       step=step)


class VisionTower:
    """SigLIP's tower and the projector behind it: uint8 images -> (images * tokens, width)."""

    def __init__(self, source: Source, machine: Machine, config: VisionConfig) -> None:
        self.machine, self.config = machine, config
        patch = source.value('vision.patch.weight').to(source.dtype)
        self.patch = FloatProjection(
            patch.flatten(1).contiguous(), source.value('vision.patch.bias').to(source.dtype))
        self.position = source.value('vision.position').to(source.dtype)
        names = [f'vision.layers.{i}' for i in range(config.depth)]
        self.norms = [[layer_norm(source, f'{name}.{kind}_norm', VISION_EPS)
                       for kind in ('attn', 'mlp')] for name in names]
        self.attentions = [SelfAttention(source, machine, f'{name}.attn', config.heads)
                           for name in names]
        self.mlps = [Mlp(source, machine, f'{name}.mlp', 'gelu_tanh') for name in names]
        self.norm = layer_norm(source, 'vision.norm', VISION_EPS)
        self.projector = project(source, machine, 'projector')
        layers = (*self.attentions, *self.mlps, self.projector, self.patch)
        self.nbytes = sum(part.nbytes for part in layers)

    def patches(self, images: Tensor) -> Tensor:
        """(V, 3, S, S) uint8 -> (V * tokens, 3 * patch * patch) in -1 .. 1."""
        c = self.config
        side = c.image // c.patch
        scaled = (images.float() / 255.0 * 2.0 - 1.0).to(self.machine.dtype)
        cut = scaled.view(-1, 3, side, c.patch, side, c.patch)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * c.patch * c.patch)

    def run(self, images: Tensor) -> Tensor:
        """Encode; the result lasts until the next call."""
        m, c = self.machine, self.config
        count = images.shape[0]
        x = m.scratch('patches', count * c.tokens, c.width)
        self.patch.product(Tokens(self.patches(images)), x)
        x.view(count, c.tokens, c.width).add_(self.position)
        stream = Stream(m, x)
        for norms, block, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            block.run_images(stream, norms[0], count)
            mlp.run(stream, norms[1])
        out = m.scratch('seen', x.shape[0], self.projector.n)
        tokens = stream.tokens(self.projector.take(), self.norm)
        self.projector.product(tokens, out)
        return out


def rms_gain(source: Source, name: str, eps: float, plus: float = 0.0) -> Norm:
    """An RMS norm; plus: 1 where the stored gain is less one, as Gemma's."""
    return Norm('rms', eps, gains(source, name) + plus)
