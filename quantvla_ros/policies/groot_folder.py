# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 from Isaac-GR00T's shards and from lerobot folders, into a served model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from quantvla_ros.policies import groot_keys as names
from quantvla_ros.policies.agreement import Agreement
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.checkpoints import CheckpointError, Stored
from quantvla_ros.policies.decoder import DecoderConfig
from quantvla_ros.policies.folders import Folder, Served
from quantvla_ros.policies.groot_n15 import IMAGE, GrootConfig, GrootN15
from quantvla_ros.policies.normalize import Affine, groot_affine, join
from quantvla_ros.policies.sizes import Shapes, vision_sizes
from quantvla_ros.policies.tokenizers import Tokenizer, load_tokenizer

HEADS = 32  # of the blocks and of the context layers
STEPS = 4
LEROBOT_PREFIX = '_groot_model.'
# embodiment tag -> slot of the stacked layers
EMBODIMENTS = {
    'new_embodiment': 31,
    'oxe_droid': 17,
    'agibot_genie1': 26,
    'gr1': 24,
    'so100': 2,
    'unitree_g1': 3,
}


def groot_sizes(shapes: Shapes, horizon: int) -> GrootConfig:
    """Sizes from the shapes of a checkpoint."""
    first = f'{names.LAYERS}.0'
    inner, seen = shapes.of(f'{first}.self_attn.q_proj.weight')
    head_width = shapes.of(f'{first}.self_attn.q_norm.weight')[0]
    backbone = DecoderConfig(
        width=seen,
        depth=shapes.depth(names.LAYERS),
        hidden=shapes.of(f'{first}.mlp.gate_proj.weight')[0],
        heads=inner // head_width,
        kv_heads=shapes.of(f'{first}.self_attn.k_proj.weight')[0] // head_width,
        head_width=head_width,
    )
    hidden, width = shapes.of(f'{names.BLOCKS}.0.ff.net.0.proj.weight')
    slots, state, state_hidden = shapes.of(f'{names.HEAD}.state_encoder.layer1.W')
    return GrootConfig(
        vision=vision_sizes(shapes, names.TOWER),
        backbone=backbone,
        vocabulary=shapes.of(_embedding(shapes))[0],
        context_layers=shapes.depth(names.CONTEXT),
        context_hidden=shapes.of(f'{names.CONTEXT}.0.ff.net.0.proj.weight')[0],
        context_heads=HEADS,
        width=width,
        depth=shapes.depth(names.BLOCKS),
        hidden=hidden,
        heads=HEADS,
        output=shapes.of(f'{names.HEAD}.model.proj_out_2.weight')[0],
        state=state,
        state_hidden=state_hidden,
        action=shapes.of(f'{names.HEAD}.action_encoder.W1.W')[1],
        future=shapes.of(f'{names.HEAD}.future_tokens.weight')[0],
        positions=shapes.of(f'{names.HEAD}.position_embedding.weight')[0],
        horizon=horizon,
        embodiments=slots,
    )


def _embedding(shapes: Shapes) -> str:
    return names.EMBEDDING if names.EMBEDDING in shapes else names.LM_HEAD


def groot_network(folder: Folder, horizon: int, embodiment: int) -> Stored:
    """Build the network without storage, and match it with the folder."""
    strip = LEROBOT_PREFIX if folder.format == 'lerobot' else ''
    _check_config(folder.config.get('action_head_cfg', {}))
    shapes = Shapes(folder.weights.shapes, strip)
    sizes = groot_sizes(shapes, horizon)
    tied = _embedding(shapes) == names.LM_HEAD
    if not 0 <= embodiment < sizes.embodiments:
        raise CheckpointError(f'embodiment slot {embodiment} is not one of {sizes.embodiments}')
    with torch.device('meta'):
        model = GrootN15(sizes)
    return Stored(model, folder.weights, names.groot_map(embodiment, strip, tied=tied),
                  names.groot_dead(strip, tied=tied))


def _check_config(head: Mapping[str, Any]) -> None:
    """Refuse a variant whose shapes look alike and whose arithmetic differs."""
    for part in ('diffusion_model_cfg', 'vl_self_attention_cfg'):
        config = head.get(part) or {}
        heads = config.get('num_attention_heads', HEADS)
        positions = config.get('positional_embeddings')
        if heads != HEADS or positions is not None:
            raise CheckpointError(
                f'action_head_cfg.{part} has {heads} heads and positional_embeddings '
                f'{positions!r}; GR00T N1.5 has {HEADS} and none'
            )


def open_groot(folder: Folder, agreement: Agreement, settings: PolicySettings) -> Served:
    """Read a GR00T N1.5 folder. Raises CheckpointError or TokenizerError."""
    config = folder.config
    head = config.get('action_head_cfg', {})
    horizon = int(head.get('action_horizon') or config.get('action_horizon') or 16)
    if agreement.horizon > horizon:
        raise CheckpointError(
            f'the checkpoint computes {horizon} steps; the contract asks for {agreement.horizon}'
        )
    tag, embodiment = _embodiment(folder, agreement)
    stored = groot_network(folder, horizon, embodiment)
    if folder.format == 'lerobot':
        state, action = _lerobot_statistics(folder.path)
    else:
        state, action = _isaac_statistics(folder.path, tag, agreement)
    tokenizer = load_tokenizer(folder.path, agreement.tokenizer, 'groot_n15')
    sizes = stored.model.config
    return Served(
        family='groot_n15',
        stored=stored,
        slots=(),
        image=sizes.vision.image,
        state=state,
        action=action,
        words=_words(tokenizer, len(agreement.cameras), sizes.vision.tokens, agreement.prompt),
        state_width=sizes.state,
        chunk=(sizes.horizon, sizes.action),
        steps=settings.steps or int(head.get('num_inference_timesteps') or STEPS),
    )


def _embodiment(folder: Folder, agreement: Agreement) -> tuple[str, int]:
    """Tag of the embodiment, and its slot; the contract's word goes before the folder's."""
    tag = agreement.statistics or folder.config.get('embodiment_tag', 'new_embodiment')
    pipeline = folder.path / 'policy_preprocessor.json'
    known = dict(EMBODIMENTS)
    if pipeline.is_file():
        for step in json.loads(pipeline.read_text()).get('steps', []):
            known.update(step.get('config', {}).get('embodiment_mapping', {}))
    if tag not in known:
        raise CheckpointError(
            f'embodiment {tag!r} is unknown; model.statistics may be {", ".join(sorted(known))}'
        )
    return tag, known[tag]


def _lerobot_statistics(path: Path) -> tuple[Affine | None, Affine | None]:
    found: list[Affine | None] = []
    for pipeline, step, feature in (
        ('policy_preprocessor.json', 'groot_pack_inputs_v3', 'observation.state'),
        ('policy_postprocessor.json', 'groot_action_unpack_unnormalize_v1', 'action'),
    ):
        file = path / pipeline
        if not file.is_file():
            raise CheckpointError(f'{path} lacks {pipeline}, which names its statistics')
        parts = json.loads(file.read_text()).get('steps', [])
        states = [p['state_file'] for p in parts
                  if p.get('registry_name') == step and p.get('state_file')]
        tensors = load_file(str(path / states[0])) if states else {}
        stats = {key.rpartition('.')[2]: value for key, value in tensors.items()
                 if key.rpartition('.')[0] == feature}
        found.append(groot_affine('min_max', stats, f'{path}: {feature}') if stats else None)
    return found[0], found[1]


def _isaac_statistics(
    path: Path, tag: str, agreement: Agreement
) -> tuple[Affine, Affine]:
    """experiment_cfg/metadata.json; the order of its parts stands in the contract."""
    file = path / 'experiment_cfg' / 'metadata.json'
    if not file.is_file():
        raise CheckpointError(f'{path} lacks experiment_cfg/metadata.json, its statistics')
    metadata = json.loads(file.read_text())
    if tag not in metadata:
        raise CheckpointError(
            f'{file} has no {tag!r}; model.statistics may be {", ".join(sorted(metadata))}'
        )
    statistics = metadata[tag]['statistics']
    mode = agreement.normalization or 'min_max'
    return (
        _ordered(statistics['state'], agreement.state_parts, mode, f'{file.name}: state'),
        _ordered(statistics['action'], agreement.action_parts, mode, f'{file.name}: action'),
    )


def _ordered(
    statistics: Mapping[str, Any], parts: Sequence[str], mode: str, source: str
) -> Affine:
    if not parts and len(statistics) > 1:
        raise CheckpointError(
            f'{source} has the parts {", ".join(statistics)}, in an order that the folder does '
            'not tell; list them in model.state.parts and model.action.parts of the contract'
        )
    absent = [part for part in parts if part not in statistics]
    if absent:
        raise CheckpointError(
            f'{source} has no {", ".join(absent)}; it has {", ".join(statistics)}'
        )
    return join([
        groot_affine(mode, statistics[part], f'{source}.{part}')
        for part in parts or list(statistics)
    ])


def chat(instruction: str, images: int, patches: int) -> str:
    """Eagle 2.5's chat around some images and one instruction."""
    seen = ''.join(
        f'<image {i + 1}><img>' + '<IMG_CONTEXT>' * patches + '</img>' for i in range(images)
    )
    return (
        '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'
        f'<|im_start|>user\n{seen}{instruction}<|im_end|>\n<|im_start|>assistant\n'
    )


def _words(
    tokenizer: Tokenizer, images: int, patches: int, style: str
) -> Callable[[str, np.ndarray], list[int]]:
    """The published inference path writes the instruction as a list of one text."""
    patch = tokenizer.token('<IMG_CONTEXT>')

    def words(instruction: str, state: np.ndarray) -> list[int]:
        del state
        text = instruction if style == 'plain' else str([instruction])
        tokens = tokenizer.encode(chat(text, images, patches))
        return [IMAGE if token == patch else token for token in tokens]

    return words
