# SPDX-License-Identifier: Apache-2.0
"""pi0 and pi0.5 from lerobot folders and from openpi's PyTorch folders, into a served model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from quantvla_ros.policies import keys
from quantvla_ros.policies.agreement import Agreement
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.checkpoints import CheckpointError, Stored
from quantvla_ros.policies.folders import Folder, Served
from quantvla_ros.policies.normalize import Affine, lerobot_statistics, openpi_statistics
from quantvla_ros.policies.pi0 import Pi0, Pi0Config
from quantvla_ros.policies.pi05 import Pi05, Pi05Config
from quantvla_ros.policies.sizes import Shapes, gemma_sizes, vision_sizes
from quantvla_ros.policies.tokenizers import (
    Tokenizer,
    clean,
    load_tokenizer,
    pi_tokens,
    state_prompt,
)

OPENPI_SLOTS = ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')
LONGEST = {'pi05': 200, 'pi0': 48}
IMAGES = 'observation.images.'


def pi_network(folder: Folder, horizon: int) -> Stored:
    """Build the network without storage, and match it with the folder."""
    lerobot = folder.format == 'lerobot'
    strip = 'model.' if lerobot else ''
    shapes = Shapes(folder.weights.shapes, strip)
    rules = keys.PI05 if folder.family == 'pi05' else keys.PI0
    embedding = 'paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight'
    tied = embedding not in shapes
    if tied:
        embedding = keys.PI_LM_HEAD
        rules = [*rules, *keys.PI_TIED]
    vision = 'paligemma_with_expert.paligemma.model.vision_tower.vision_model'
    sizes: dict[str, Any] = {
        'vision': vision_sizes(shapes, vision),
        'backbone': gemma_sizes(shapes, 'paligemma_with_expert.paligemma.model.language_model.'
                                        'layers'),
        'expert': gemma_sizes(shapes, 'paligemma_with_expert.gemma_expert.model.layers'),
        'vocabulary': shapes.of(embedding)[0],
        'action': shapes.of('action_in_proj.weight')[1],
        'horizon': horizon,
    }
    with torch.device('meta'):
        if folder.family == 'pi05':
            model: Any = Pi05(Pi05Config(**sizes))
        else:
            model = Pi0(Pi0Config(**sizes, state=shapes.of('state_proj.weight')[1]))
    return Stored(model, folder.weights, keys.key_map(rules, strip), keys.pi_dead(tied=tied))


def open_pi(folder: Folder, agreement: Agreement, settings: PolicySettings) -> Served:
    """Read a pi0 or pi0.5 folder. Raises CheckpointError or TokenizerError."""
    config, lerobot = folder.config, folder.format == 'lerobot'
    horizon = int(config.get('chunk_size', 0)) if lerobot else agreement.horizon
    if lerobot and agreement.horizon > horizon:
        raise CheckpointError(
            f'the checkpoint computes {horizon} steps; the contract asks for {agreement.horizon}'
        )
    stored = pi_network(folder, horizon)
    state, action = _statistics(folder, agreement)
    tokenizer = load_tokenizer(folder.path, agreement.tokenizer, folder.family)
    sizes = stored.model.config
    return Served(
        family=folder.family,
        stored=stored,
        slots=slots(config) if lerobot else OPENPI_SLOTS,
        image=sizes.vision.image,
        state=state,
        action=action,
        words=_words(folder, agreement, tokenizer),
        state_width=0 if folder.family == 'pi05' else sizes.state,
        chunk=(sizes.horizon, sizes.action),
        steps=settings.steps or int(config.get('num_inference_steps', 10)),
    )


def slots(config: Any) -> tuple[str, ...]:
    """Cameras that a lerobot config declares, in its order."""
    return tuple(
        name.removeprefix(IMAGES)
        for name, feature in config.get('input_features', {}).items()
        if feature.get('type') == 'VISUAL'
    )


def _statistics(folder: Folder, agreement: Agreement) -> tuple[Affine | None, Affine | None]:
    if folder.format == 'lerobot':
        return lerobot_statistics(folder.path, folder.config)
    mode = agreement.normalization or ('quantiles' if folder.family == 'pi05' else 'mean_std')
    return openpi_statistics(folder.path, agreement.statistics, mode)


def _words(
    folder: Folder, agreement: Agreement, tokenizer: Tokenizer
) -> Callable[[str, np.ndarray], list[int]]:
    """Prompt of the family: pi0.5 writes the state into it unless the contract says plain."""
    longest = int(folder.config.get('tokenizer_max_length', LONGEST[folder.family]))
    style = agreement.prompt or ('state' if folder.family == 'pi05' else 'plain')

    def words(instruction: str, state: np.ndarray) -> list[int]:
        if style == 'state':
            return pi_tokens(tokenizer, state_prompt(instruction, state), longest=longest)
        if folder.format == 'lerobot':  # lerobot changes nothing but the end of the line
            line = instruction if instruction.endswith('\n') else instruction + '\n'
            return pi_tokens(tokenizer, line, longest=longest)
        return pi_tokens(tokenizer, clean(instruction), tail='\n', longest=longest)

    return words
