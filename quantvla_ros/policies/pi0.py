# SPDX-License-Identifier: Apache-2.0
"""pi0: the prefix of pi0.5, an expert with plain norms, the state as a token of its own.

The state token sees the prefix and itself, never the noisy actions, so its keys and values are
the same in every denoising step: they are computed once with the prefix. Owns no loop and no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.policies.blocks import append, time_features
from quantvla_ros.policies.gemma import (
    GEMMA_2B,
    GEMMA_300M,
    GemmaConfig,
    GemmaStack,
    PlainNorm,
)
from quantvla_ros.policies.pi05 import PERIODS, PiContext, PiPrefix
from quantvla_ros.policies.siglip import VisionConfig


@dataclass(frozen=True)
class Pi0Config:
    """Sizes of the network; the defaults are those of the published checkpoints."""

    vision: VisionConfig = VisionConfig()
    backbone: GemmaConfig = GEMMA_2B
    expert: GemmaConfig = GEMMA_300M
    vocabulary: int = 257152
    state: int = 32
    action: int = 32
    horizon: int = 50


class Pi0(PiPrefix):
    """The whole network on normalised tensors."""

    NOISE_TIME = 1.0  # time of pure noise; the chunk is at the other end

    def __init__(self, config: Pi0Config) -> None:
        super().__init__(config.vision, config.backbone, config.vocabulary)
        self.config = config
        width = config.expert.width
        self.expert = GemmaStack(config.expert, PlainNorm)
        self.state_in = nn.Linear(config.state, width)
        self.action_in = nn.Linear(config.action, width)
        self.action_out = nn.Linear(width, config.action)
        self.action_time_in = nn.Linear(2 * width, width)
        self.action_time_out = nn.Linear(width, width)

    def prefix(self, images: Tensor, words: Tensor, state: Tensor) -> PiContext:
        """Encode once per chunk; state (state,) normalised and padded with zeros."""
        seen = self.encode(images, words)
        token = self.state_in(state)[None, None]
        _, own = self.expert(token, seen)
        return PiContext([append(past, new) for past, new in zip(seen, own, strict=True)])

    def conditions(self, time: float) -> Tensor:
        """The time's share of the first action layer: (1, width)."""
        weight, bias = self.action_time_in.weight, self.action_time_in.bias
        width = self.config.expert.width
        features = time_features(time, width, PERIODS).to(weight)
        return F.linear(features, weight[:, width:], bias)

    def velocity(self, context: PiContext, x: Tensor, conditions: Tensor) -> Tensor:
        """Noisy chunk (1, horizon, action) -> its velocity, at the time of the conditions."""
        actions = self.action_in(x)
        mixed = F.linear(actions, self.action_time_in.weight[:, : actions.shape[-1]]) + conditions
        h, _ = self.expert(self.action_time_out(F.silu(mixed)), context.keys_values)
        return self.action_out(h)
