# SPDX-License-Identifier: Apache-2.0
"""Sizes of an architecture, read off the shapes that a checkpoint stores.

The published formats keep most sizes in Python code. Shapes hold them all but the number of
heads, which each family fixes. A shape that is not there raises CheckpointError with its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from quantvla_ros.policies.checkpoints import CheckpointError
from quantvla_ros.policies.gemma import GemmaConfig
from quantvla_ros.policies.siglip import VisionConfig

PI_HEADS = 8
SIGLIP_HEADS = 16


class Shapes:
    """Shapes by stored name, below a prefix that all of them may carry."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], strip: str = '') -> None:
        self._shapes = {key.removeprefix(strip): value for key, value in shapes.items()}

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def of(self, key: str) -> tuple[int, ...]:
        """Return one shape."""
        if key not in self._shapes:
            raise CheckpointError(f'the weights lack {key}, so their sizes cannot be told')
        return self._shapes[key]

    def depth(self, stack: str) -> int:
        """Number of layers `stack`.0, `stack`.1, ..."""
        pattern = re.compile(re.escape(stack) + r'\.(\d+)\.')
        found = {int(match[1]) for key in self._shapes if (match := pattern.match(key))}
        if not found:
            raise CheckpointError(f'the weights have no layers {stack}.*')
        return max(found) + 1


def vision_sizes(shapes: Shapes, tower: str, heads: int = SIGLIP_HEADS) -> VisionConfig:
    """Sizes of a SigLIP tower as transformers stores it."""
    width, _, patch, _ = shapes.of(f'{tower}.embeddings.patch_embedding.weight')
    tokens = shapes.of(f'{tower}.embeddings.position_embedding.weight')[0]
    layers = f'{tower}.encoder.layers'
    return VisionConfig(
        width=width,
        depth=shapes.depth(layers),
        hidden=shapes.of(f'{layers}.0.mlp.fc1.weight')[0],
        heads=heads,
        patch=patch,
        image=patch * round(tokens**0.5),
    )


def gemma_sizes(shapes: Shapes, layers: str) -> GemmaConfig:
    """Sizes of a Gemma stack with eight heads that share one key-value head."""
    inner, width = shapes.of(f'{layers}.0.self_attn.q_proj.weight')
    return GemmaConfig(
        width=width,
        depth=shapes.depth(layers),
        hidden=shapes.of(f'{layers}.0.mlp.gate_proj.weight')[0],
        heads=PI_HEADS,
        kv_heads=1,
        head_width=inner // PI_HEADS,
    )
