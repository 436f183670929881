# SPDX-License-Identifier: Apache-2.0
"""SmolVLA: half of SmolVLM2 reads the scene once, a narrower expert denoises over its keys.

    images -> VisionTower -> shuffle -> projector --+
    words ------------------------------------------+-> backbone: keys and values of every layer
    state (sees all, is seen by actions only) ------+
    noise and time -> expert: even layers attend to those keys and to themselves, odd layers to
    keys and values made of the backbone's -> velocity

Owns the network and nothing else. Time runs from 1 (noise) to 0. What odd layers attend to does
not change between denoising steps, so it is made once per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import (
    KeysValues,
    append,
    causal_mask,
    rotary,
    time_features,
)
from quantvla_ros.policies.decoder import Decoder, DecoderConfig, DecoderLayer
from quantvla_ros.policies.siglip import VisionConfig, VisionTower

PERIODS = (4e-3, 4.0)
VISION = VisionConfig(width=768, depth=12, hidden=3072, heads=12, patch=16, image=512)


def llama(width: int, hidden: int, depth: int = 16, head_width: int = 64) -> DecoderConfig:
    """SmolLM2's layers: 15 heads, 5 of keys and values."""
    return DecoderConfig(width, depth, hidden, 15, 5, head_width, 10000.0, 1e-5, False)


@dataclass(frozen=True)
class SmolVlaConfig:
    """Sizes of the network; the defaults are those of the published checkpoint."""

    vision: VisionConfig = VISION
    backbone: DecoderConfig = llama(960, 2560)
    expert: DecoderConfig = llama(720, 2048)
    vocabulary: int = 49280
    shuffle: int = 4
    self_every: int = 2
    state: int = 32
    action: int = 32
    horizon: int = 50


class SmolContext(NamedTuple):
    """What one observation leaves for the expert: keys and values that each layer attends to."""

    keys_values: list[KeysValues]


def shuffle(x: Tensor, factor: int) -> Tensor:
    """Join factor x factor neighbouring patches: (V, T, width) -> (V, T / f^2, width * f^2)."""
    views, tokens, width = x.shape
    side = round(tokens**0.5)
    small = side // factor
    x = x.view(views, small, factor, small, factor, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(views, small * small, -1)


class Expert(nn.Module):
    """Layers that attend to the prefix and themselves, or to what they make of the prefix."""

    def __init__(self, c: SmolVlaConfig) -> None:
        super().__init__()
        seen = c.backbone.kv_heads * c.backbone.head_width
        self.config, self.self_every = c.expert, c.self_every
        self.layers = nn.ModuleList(
            DecoderLayer(c.expert, None if self.own(i) else seen) for i in range(c.expert.depth)
        )
        self.norm = Decoder(DecoderConfig(c.expert.width, 0, eps=c.expert.eps)).norm

    def own(self, layer: int) -> bool:
        """Whether a layer makes keys and values of the actions themselves."""
        return self.self_every > 0 and layer % self.self_every == 0

    def context(self, prefix: list[KeysValues]) -> list[KeysValues]:
        """Keys and values of the backbone, or what the odd layers make of them."""
        found = []
        layers: Any = self.layers
        for i, (layer, (keys, values)) in enumerate(zip(layers, prefix, strict=True)):
            if self.own(i):
                found.append((keys, values))
                continue
            attn = layer.attn
            groups = attn.heads.groups
            flat = [pair.transpose(1, 2).flatten(2) for pair in (keys, values)]
            found.append((
                attn.split(attn.k_proj(flat[0]), groups), attn.split(attn.v_proj(flat[1]), groups)
            ))
        return found

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:
        """Action tokens (1, A, width) -> normed tokens; an action sees those before it."""
        tokens, device = x.shape[1], x.device
        first = context[0][0].shape[2]
        width = self.config.head_width
        late = rotary(torch.arange(first, first + tokens, device=device), width)
        early = rotary(torch.arange(tokens, device=device), width)
        mask = F.pad(causal_mask(tokens, device), (first, 0), value=True)
        layers: Any = self.layers
        for i, (layer, seen) in enumerate(zip(layers, context, strict=True)):
            normed = layer.attn_norm(x)
            if self.own(i):
                seen = append(seen, layer.keys_values(normed, late))
                x = layer.finish(x, layer.queries(normed, late), seen, mask)
            else:
                x = layer.finish(x, layer.queries(normed, early), seen, None)
        return self.norm(x)


class SmolVla(nn.Module):
    """The whole network on normalised tensors."""

    NOISE_TIME = 1.0  # time of pure noise; the chunk is at the other end

    def __init__(self, config: SmolVlaConfig) -> None:
        super().__init__()
        c = self.config = config
        width = c.expert.width
        self.vision = VisionTower(c.vision)
        self.projector = nn.Linear(c.vision.width * c.shuffle**2, c.backbone.width, bias=False)
        self.embedding = nn.Embedding(c.vocabulary, c.backbone.width)
        self.state_in = nn.Linear(c.state, c.backbone.width)
        self.backbone = Decoder(c.backbone)
        self.expert = Expert(c)
        self.action_in = nn.Linear(c.action, width)
        self.action_out = nn.Linear(width, c.action)
        self.action_time_in = nn.Linear(2 * width, width)
        self.action_time_out = nn.Linear(width, width)

    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> SmolContext:
        """Encode once per chunk.

        images (V, 3, S, S) in [-1, 1]; words (T,) int64; state (state,) normalised and padded.
        """
        scale = self.config.backbone.width**0.5
        patches = shuffle(self.vision(images), self.config.shuffle)
        seen = self.projector(patches).flatten(0, 1) * scale
        read = self.embedding(words).to(seen.dtype) * scale
        x = torch.cat([seen, read, self.state_in(state)[None]])[None]
        return SmolContext(self.expert.context(self._keys(x)))

    def _keys(self, x: Tensor) -> list[KeysValues]:
        """Keys and values of every layer; the last one stops there, nothing reads further."""
        tokens = x.shape[1]
        table = self.backbone.table(0, tokens, x.device)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device)
        mask[:-1, -1] = False  # images and words do not see the state
        found = []
        for layer in self.backbone.layers[:-1]:
            x, own = layer(x, table, mask)
            found.append(own)
        last: Any = self.backbone.layers[-1]
        found.append(last.keys_values(last.attn_norm(x), table))
        return found

    def conditions(self, time: float) -> Tensor:
        """Features of a time in [0, 1]: (1, 1, width)."""
        features = time_features(time, self.config.expert.width, PERIODS)
        return features[None].to(self.action_time_in.bias)

    def velocity(self, context: SmolContext, x: Tensor, conditions: Tensor) -> Tensor:
        """Noisy chunk (1, horizon, action) -> its velocity, at the time of the conditions."""
        actions = self.action_in(x)
        both = torch.cat([actions, conditions.expand_as(actions)], -1)
        h = self.action_time_out(F.silu(self.action_time_in(both)))
        return self.action_out(self.expert(h, context.keys_values))
