# SPDX-License-Identifier: Apache-2.0
"""What a model folder is: which family, which format, what is in it. Reads no weights.

A folder is recognised by its config.json and by the names of its tensors, never by its own name.
Says what it looked for when it recognises nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.policies.checkpoints import (
    CheckpointError,
    SafetensorsSource,
    Stored,
    open_weights,
)
from quantvla_ros.policies.normalize import Affine

LEROBOT_TYPES = {'pi05': 'pi05', 'pi0': 'pi0', 'smolvla': 'smolvla', 'groot': 'groot_n15'}


@dataclass(frozen=True)
class Folder:
    """A recognised model folder: family, format, config.json and its tensors."""

    path: Path
    family: str
    format: str
    config: Mapping[str, Any]
    weights: SafetensorsSource


@dataclass(frozen=True)
class Served:
    """A checkpoint, checked and open: its network, still without weights, and what to feed it.

    words(instruction, normalised state) -> tokens. state_width: of the state the network itself
    takes, 0 where it takes none. slots: cameras in the checkpoint's order, () for the contract's.
    """

    family: str
    stored: Stored
    slots: tuple[str, ...]
    image: int
    state: Affine | None
    action: Affine | None
    words: Callable[[str, np.ndarray], list[int]]
    state_width: int
    chunk: tuple[int, int]
    steps: int


def identify(path: Path) -> Folder:
    """Recognise a folder. Raises CheckpointError that says what is missing."""
    if not path.is_dir():
        raise CheckpointError(f'{path} is not a folder; model must name a checkpoint folder')
    if (path / 'params').is_dir():
        raise CheckpointError(
            f'{path} is an openpi JAX checkpoint (params/); convert it once: quantvla convert '
            f'{path} --out NEW_FOLDER (needs pip install tensorstore), then point model at it'
        )
    file = path / 'config.json'
    config = json.loads(file.read_text()) if file.is_file() else {}
    weights = open_weights(path)
    family, form = _recognise(config, weights)
    if not family:
        raise CheckpointError(
            f'{path} is none of pi0, pi0.5, GR00T N1.5, SmolVLA, OpenVLA: config.json says type '
            f'{config.get("type")!r}, model_type {config.get("model_type")!r}, and the first '
            f'tensor is {next(iter(weights.shapes), "absent")}'
        )
    return Folder(path, family, form, config, weights)


def _recognise(config: Mapping[str, Any], weights: SafetensorsSource) -> tuple[str, str]:
    kind = config.get('type')
    if kind in LEROBOT_TYPES:
        return LEROBOT_TYPES[kind], 'lerobot'
    names = weights.shapes
    if any(name.startswith('paligemma_with_expert.') for name in names):
        return ('pi05' if 'time_mlp_in.weight' in names else 'pi0'), 'openpi'
    if any(name.startswith('action_head.model.transformer_blocks.') for name in names):
        return 'groot_n15', 'groot'
    if any(name.startswith('vision_backbone.featurizer.') for name in names):
        return 'openvla', 'openvla'
    return '', ''
