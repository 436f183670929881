# SPDX-License-Identifier: Apache-2.0
"""pi0.5: SigLIP and Gemma 2B read the scene once, a Gemma expert denoises the chunk over it.

    images -> VisionTower -> projector --+
    words (task, discretised state) -----+-> backbone: keys and values of every layer
    noise -> action_in -> expert over those keys, its norms modulated by the time -> velocity

Owns the network and nothing else: no files, no units, no loop. Time runs from 1 (noise) to 0.
Words that pad a prompt and cameras that do not exist are never computed: at batch 1 a masked
token changes nothing, so leaving it out is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import KeysValues, time_features
from quantvla_ros.policies.gemma import (
    GEMMA_2B,
    GEMMA_300M,
    AdaptiveNorm,
    GemmaConfig,
    GemmaStack,
    PlainNorm,
)
from quantvla_ros.policies.siglip import VisionConfig, VisionTower

PERIODS = (4e-3, 4.0)


@dataclass(frozen=True)
class Pi05Config:
    """Sizes of the network; the defaults are those of the published checkpoints."""

    vision: VisionConfig = VisionConfig()
    backbone: GemmaConfig = GEMMA_2B
    expert: GemmaConfig = GEMMA_300M
    vocabulary: int = 257152
    action: int = 32
    horizon: int = 50


class PiContext(NamedTuple):
    """What one observation leaves for the expert: keys and values of every layer."""

    keys_values: list[KeysValues]


class PiPrefix(nn.Module):
    """Vision, words and backbone, which pi0 and pi0.5 share."""

    def __init__(self, vision: VisionConfig, backbone: GemmaConfig, vocabulary: int) -> None:
        super().__init__()
        self.vision = VisionTower(vision)
        self.projector = nn.Linear(vision.width, backbone.width)
        self.embedding = nn.Embedding(vocabulary, backbone.width)
        self.backbone = GemmaStack(backbone, PlainNorm)

    def encode(self, images: Tensor, words: Tensor) -> list[KeysValues]:
        """Images (V, 3, S, S) in [-1, 1], words (T,) int64 -> keys and values of every layer."""
        seen = self.projector(self.vision(images)).flatten(0, 1)
        read = self.embedding(words).to(seen.dtype) * self.backbone.config.width**0.5
        return self.backbone.encode(torch.cat([seen, read])[None])


class Pi05(PiPrefix):
    """The whole network on normalised tensors."""

    NOISE_TIME = 1.0  # time of pure noise; the chunk is at the other end

    def __init__(self, config: Pi05Config) -> None:
        super().__init__(config.vision, config.backbone, config.vocabulary)
        self.config = config
        width = config.expert.width
        self.expert = GemmaStack(config.expert, AdaptiveNorm)
        self.action_in = nn.Linear(config.action, width)
        self.action_out = nn.Linear(width, config.action)
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)

    def prefix(self, images: Tensor, words: Tensor, state: Tensor | None = None) -> PiContext:
        """Encode once per chunk; the state, where it is used, stands among the words."""
        del state
        return PiContext(self.encode(images, words))

    def conditions(self, time: float) -> Tensor:
        """What the expert needs to know of a time in [0, 1]: (norms, 3 * width)."""
        like = self.time_in.weight
        features = time_features(time, self.config.expert.width, PERIODS).to(like)
        condition = F.silu(self.time_out(F.silu(self.time_in(features))))
        return self.expert.modulation(condition)

    def velocity(self, context: PiContext, x: Tensor, conditions: Tensor) -> Tensor:
        """Noisy chunk (1, horizon, action) -> its velocity, at the time of the conditions."""
        h, _ = self.expert(self.action_in(x), context.keys_values, conditions)
        return self.action_out(h)
