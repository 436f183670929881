# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5: SigLIP2 and twelve Qwen3 layers read the scene, a diffusion transformer acts.

    images -> VisionTower -> projector --+
    words (chat) ------------------------+-> backbone -> norm -> 4 self-attention layers -> context
    state, future tokens, noise -> 16 blocks: even ones attend to the context, odd ones to
    themselves; every first norm and the last one are modulated by the time -> velocity

Owns the network and nothing else. Time runs from 0 (noise) to 1, in a thousand buckets. The
context is the same in every denoising step, so the keys and values of the even blocks are made
once per chunk. Only the layers of one embodiment are built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import Attention, Heads, KeysValues, Mlp, gelu_tanh
from quantvla_ros.policies.decoder import Decoder, DecoderConfig
from quantvla_ros.policies.siglip import VisionConfig, VisionTower

BUCKETS = 1000
TIME_FEATURES = 256
IMAGE = -1  # word number that stands for one patch of an image
EPS = 1e-5


@dataclass(frozen=True)
class GrootConfig:
    """Sizes of the network; the defaults are those of the published checkpoint."""

    vision: VisionConfig = VisionConfig()
    backbone: DecoderConfig = DecoderConfig()
    vocabulary: int = 151680
    context_layers: int = 4
    context_hidden: int = 8192
    context_heads: int = 32
    width: int = 1536
    depth: int = 16
    hidden: int = 6144
    heads: int = 32
    output: int = 1024
    state: int = 64
    state_hidden: int = 1024
    action: int = 32
    future: int = 32
    positions: int = 1024
    horizon: int = 16
    embodiments: int = 32


class GrootContext(NamedTuple):
    """What one observation leaves for the blocks: cross keys and values, state and future."""

    keys_values: list[KeysValues]
    start: Tensor


class GrootConditions(NamedTuple):
    """What the time decides: features of the actions, modulation of each norm."""

    features: Tensor  # (1, 1, width)
    blocks: list[Tensor]  # (1, 2 * width) scale and shift
    last: Tensor  # (1, 2 * width) shift and scale


class ContextLayer(nn.Module):
    """Self-attention over the backbone's tokens, without positions."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width, eps=EPS)
        self.attn = Attention(width, Heads(heads, heads, width // heads), bias=True)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, hidden, gelu_tanh)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TimedNorm(nn.Module):
    """LayerNorm without weights, scaled and shifted by the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x (B, T, width), modulation (1, 2 * width)."""
        scale, shift = modulation.chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class ActionBlock(nn.Module):
    """Attention to the context (even blocks) or to the sequence itself (odd), then an MLP."""

    def __init__(self, c: GrootConfig, context_width: int | None) -> None:
        super().__init__()
        heads = Heads(c.heads, c.heads, c.width // c.heads)
        self.attn_norm = TimedNorm(c.width)
        self.attn = Attention(c.width, heads, bias=True, context_width=context_width)
        self.mlp = Mlp(c.width, c.hidden, gelu_tanh)
        self.cross = context_width is not None

    def forward(self, x: Tensor, modulation: Tensor, context: KeysValues | None) -> Tensor:
        """x (B, T, width) -> (B, T, width)."""
        normed = self.attn_norm(x, modulation)
        seen = self.attn.keys_values(normed) if context is None else context
        x = x + self.attn.attend(self.attn.queries(normed), seen)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:], eps=EPS))


class ActionEncoder(nn.Module):
    """Noisy actions and the time's features -> tokens; of one embodiment."""

    def __init__(self, action: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(action, width)
        self.mix = nn.Linear(2 * width, width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (1, A, action), features (1, 1, width) -> (1, A, width)."""
        actions = self.enter(x)
        both = torch.cat([actions, features.expand_as(actions)], -1)
        return self.leave(F.silu(self.mix(both)))


def cosines(value: float, half: int, last: float) -> tuple[Tensor, Tensor]:
    """Sines and cosines of value * 10000^(-i / last), i < half; (half,) float32 each."""
    frequency = torch.exp(-torch.arange(half).float() * (math.log(10000.0) / last))
    angle = torch.tensor(value).float() * frequency
    return angle.sin(), angle.cos()


class GrootN15(nn.Module):
    """The whole network on normalised tensors, for one embodiment."""

    NOISE_TIME = 0.0  # time of pure noise; the chunk is at the other end

    def __init__(self, config: GrootConfig) -> None:
        super().__init__()
        c = self.config = config
        seen = c.backbone.width
        self.vision = VisionTower(c.vision)
        self.projector = nn.Linear(c.vision.width, seen)
        self.embedding = nn.Embedding(c.vocabulary, seen)
        self.backbone = Decoder(c.backbone)
        self.context_norm = nn.LayerNorm(seen, eps=EPS)
        self.context_layers = nn.ModuleList(
            ContextLayer(seen, c.context_heads, c.context_hidden) for _ in range(c.context_layers)
        )
        self.state_encoder = Mlp(c.state, c.state_hidden, F.relu, c.width)
        self.action_encoder = ActionEncoder(c.action, c.width)
        self.action_decoder = Mlp(c.output, c.state_hidden, F.relu, c.action)
        self.future = nn.Parameter(torch.zeros(c.future, c.width))
        self.position = nn.Parameter(torch.zeros(c.positions, c.width))
        self.time_in = nn.Linear(TIME_FEATURES, c.width)
        self.time_out = nn.Linear(c.width, c.width)
        self.blocks = nn.ModuleList(
            ActionBlock(c, seen if i % 2 == 0 else None) for i in range(c.depth)
        )
        self.last_modulation = nn.Linear(c.width, 2 * c.width)
        self.out = nn.Linear(c.width, c.output)

    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> GrootContext:
        """Encode once per chunk.

        images (V, 3, S, S) in [-1, 1]; words (T,) int64 with IMAGE for each of the V * tokens
        patches in order; state (state,) normalised and padded with zeros.
        """
        seen = self.projector(self.vision(images)).flatten(0, 1)
        patch = words == IMAGE
        if int(patch.sum()) != len(seen):
            raise ValueError(f'{int(patch.sum())} places for {len(seen)} patches of images')
        x = self.embedding(words.clamp(min=0)).to(seen.dtype)
        x = x.masked_scatter(patch[:, None], seen)[None]
        x = self.context_norm(self.backbone(x)[0])
        for layer in self.context_layers:
            x = layer(x)
        pairs = [block.attn.keys_values(x) for block in self.blocks if block.cross]  # type: ignore[operator, union-attr]
        token = self.state_encoder(state)[None, None]
        return GrootContext(pairs, torch.cat([token, self.future[None].to(token.dtype)], 1))

    def conditions(self, time: float) -> GrootConditions:
        """Everything that depends on the time in [0, 1) alone."""
        like, width = self.time_in.weight, self.config.width
        bucket = int(time * BUCKETS)
        sine, cosine = cosines(bucket, TIME_FEATURES // 2, TIME_FEATURES // 2 - 1)
        time_token = torch.cat([cosine, sine])[None].to(like)
        time_token = F.silu(self.time_out(F.silu(self.time_in(time_token))))
        features = torch.cat(cosines(bucket, width // 2, width // 2))[None, None].to(like)
        return GrootConditions(
            features,
            [block.attn_norm.dense(time_token) for block in self.blocks],  # type: ignore[operator, union-attr]
            self.last_modulation(time_token),
        )

    def velocity(self, context: GrootContext, x: Tensor, conditions: GrootConditions) -> Tensor:
        """Noisy chunk (1, horizon, action) -> its velocity, at the time of the conditions."""
        horizon = x.shape[1]
        actions = self.action_encoder(x, conditions.features) + self.position[:horizon]
        h = torch.cat([context.start, actions], 1)
        pairs = iter(context.keys_values)
        for block, modulation in zip(self.blocks, conditions.blocks, strict=True):
            h = block(h, modulation, next(pairs) if block.cross else None)
        shift, scale = conditions.last.chunk(2, -1)
        h = F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        return self.action_decoder(self.out(h[:, -horizon:]))
