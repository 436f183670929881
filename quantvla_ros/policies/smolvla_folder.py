# SPDX-License-Identifier: Apache-2.0
"""SmolVLA from lerobot folders, into a served model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantvla_ros.policies.agreement import Agreement
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.checkpoints import CheckpointError, Stored
from quantvla_ros.policies.folders import Folder, Served
from quantvla_ros.policies.keys import DECODER, key_map, layered, pairs, vision_rules
from quantvla_ros.policies.normalize import lerobot_statistics
from quantvla_ros.policies.pi_folder import slots
from quantvla_ros.policies.sizes import Shapes, vision_sizes
from quantvla_ros.policies.smolvla import SmolVla, SmolVlaConfig, llama
from quantvla_ros.policies.tokenizers import load_tokenizer

VLM = 'vlm_with_expert.vlm.model'
TEXT = f'{VLM}.text_model'
TOWER = f'{VLM}.vision_model'
EXPERT = 'vlm_with_expert.lm_expert'
EMBEDDING = f'{TEXT}.embed_tokens.weight'
LM_HEAD = 'vlm_with_expert.vlm.lm_head.weight'
VISION_HEADS, KV_HEADS = 12, 5
RULES = [
    *vision_rules(TOWER),
    (f'{VLM}.connector.modality_projection.proj.weight', 'projector.weight'),
    (EMBEDDING, 'embedding.weight'),
    *layered(f'{TEXT}.layers', 'backbone.layers', DECODER),
    (f'{TEXT}.norm.weight', 'backbone.norm.weight'),
    *layered(f'{EXPERT}.layers', 'expert.layers', DECODER),
    (f'{EXPERT}.norm.weight', 'expert.norm.weight'),
    *pairs(('state_proj', 'state_in'), ('action_in_proj', 'action_in'),
           ('action_out_proj', 'action_out'), ('action_time_mlp_in', 'action_time_in'),
           ('action_time_mlp_out', 'action_time_out')),
]


def smolvla_network(folder: Folder) -> Stored:
    """Build the network without storage, and match it with the folder."""
    config = folder.config
    if config.get('add_image_special_tokens') or config.get('attention_mode') != 'cross_attn':
        raise CheckpointError(
            f'add_image_special_tokens is {config.get("add_image_special_tokens")!r} and '
            f'attention_mode {config.get("attention_mode")!r}; served are False and cross_attn'
        )
    shapes = Shapes(folder.weights.shapes, 'model.')
    tied = EMBEDDING not in shapes
    rules = [*RULES, (LM_HEAD, 'embedding.weight')] if tied else RULES
    vision = vision_sizes(shapes, TOWER, VISION_HEADS)
    seen = shapes.of(f'{VLM}.connector.modality_projection.proj.weight')[1]
    sizes = SmolVlaConfig(
        vision=vision,
        backbone=_stack(shapes, TEXT),
        expert=_stack(shapes, EXPERT),
        vocabulary=shapes.of(LM_HEAD if tied else EMBEDDING)[0],
        shuffle=round((seen / vision.width) ** 0.5),
        self_every=int(config.get('self_attn_every_n_layers', 2)),
        state=shapes.of('state_proj.weight')[1],
        action=shapes.of('action_in_proj.weight')[1],
        horizon=int(config.get('chunk_size', 50)),
    )
    with torch.device('meta'):
        model = SmolVla(sizes)
    return Stored(model, folder.weights, key_map(rules, 'model.'),
                  lambda key: key.removeprefix('model.') == LM_HEAD and not tied)


def _stack(shapes: Shapes, name: str) -> Any:
    first = f'{name}.layers.0'
    return llama(
        shapes.of(f'{first}.self_attn.q_proj.weight')[1],
        shapes.of(f'{first}.mlp.gate_proj.weight')[0],
        shapes.depth(f'{name}.layers'),
        shapes.of(f'{first}.self_attn.k_proj.weight')[0] // KV_HEADS,
    )


def open_smolvla(folder: Folder, agreement: Agreement, settings: PolicySettings) -> Served:
    """Read a SmolVLA folder. Raises CheckpointError or TokenizerError."""
    config = folder.config
    stored = smolvla_network(folder)
    sizes = stored.model.config
    if agreement.horizon > sizes.horizon:
        raise CheckpointError(
            f'the checkpoint computes {sizes.horizon} steps; the contract asks for '
            f'{agreement.horizon}'
        )
    state, action = lerobot_statistics(folder.path, config)
    tokenizer = load_tokenizer(folder.path, agreement.tokenizer, 'smolvla')
    longest = int(config.get('tokenizer_max_length', 48))

    def words(instruction: str, state: np.ndarray) -> list[int]:
        del state
        line = instruction if instruction.endswith('\n') else instruction + '\n'
        return [*tokenizer.head, *tokenizer.encode(line)][:longest]

    return Served(
        family='smolvla',
        stored=stored,
        slots=slots(config),
        image=sizes.vision.image,
        state=state,
        action=action,
        words=words,
        state_width=sizes.state,
        chunk=(sizes.horizon, sizes.action),
        steps=settings.steps or int(config.get('num_steps', 10)),
    )
