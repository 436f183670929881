# SPDX-License-Identifier: Apache-2.0
"""OpenVLA and OpenVLA-OFT from their folders: shards, dataset statistics, head files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.policies.checkpoints import (
    CheckpointError,
    Place,
    Source,
    Stored,
    pickle_source,
)
from quantvla_ros.policies.decoder import DecoderConfig
from quantvla_ros.policies.folders import Folder
from quantvla_ros.policies.keys import DECODER, key_map, layered, pairs
from quantvla_ros.policies.normalize import Affine
from quantvla_ros.policies.openvla import OpenVla, OpenVlaConfig, VitConfig
from quantvla_ros.policies.sizes import Shapes

VIT_HEADS = 16
FIRST, SECOND = 'vision_backbone.featurizer', 'vision_backbone.fused_featurizer'
LANGUAGE = 'language_model'
HEAD, PROPRIO = 'action_head.', 'proprio_projector.'  # where the .pt files are put
BIN_COUNT = 256

_BLOCK = [
    *pairs(('norm1', 'attn_norm'), ('attn.qkv', 'qkv'), ('attn.proj', 'out'),
           ('norm2', 'mlp_norm'), ('mlp.fc1', 'mlp.fc1'), ('mlp.fc2', 'mlp.fc2')),
    ('ls1.scale_factor', 'attn_scale'),
    ('ls2.scale_factor', 'mlp_scale'),
]


def _vit_rules(stored: str, ours: str) -> list[tuple[str, str]]:
    return [
        *pairs((f'{stored}.patch_embed.proj', f'{ours}.patch')),
        *layered(f'{stored}.blocks', f'{ours}.layers', _BLOCK),
    ]


RULES = [
    *_vit_rules(FIRST, 'vision_first'),
    *_vit_rules(SECOND, 'vision_second'),
    *pairs(*((f'projector.fc{i}', f'projector.fc{i}') for i in (1, 2, 3))),
    (f'{LANGUAGE}.model.embed_tokens.weight', 'embedding.weight'),
    *layered(f'{LANGUAGE}.model.layers', 'backbone.layers', DECODER),
    (f'{LANGUAGE}.model.norm.weight', 'backbone.norm.weight'),
    (f'{LANGUAGE}.lm_head.weight', 'lm_head.weight'),
    *pairs((f'{HEAD}model.layer_norm1', 'head.norm_in'), (f'{HEAD}model.fc1', 'head.fc1'),
           (f'{HEAD}model.layer_norm2', 'head.norm_out'), (f'{HEAD}model.fc2', 'head.fc2'),
           (f'{PROPRIO}fc1', 'proprio.fc1'), (f'{PROPRIO}fc2', 'proprio.fc2')),
    *layered(f'{HEAD}model.mlp_resnet_blocks', 'head.blocks',
             pairs(('ffn.0', 'norm'), ('ffn.1', 'linear'))),
]
# stored with a leading dimension of one
FLAT = {
    f'{FIRST}.pos_embed': 'vision_first.position',
    f'{FIRST}.cls_token': 'vision_first.class_token',
    f'{FIRST}.reg_token': 'vision_first.registers',
    f'{SECOND}.pos_embed': 'vision_second.position',
}


class JoinedSource:
    """Shards and the files of the heads beside them, under one set of names."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.files = tuple(file for source in sources.values() for file in source.files)
        self._at = {
            prefix + key: (source, key)
            for prefix, source in sources.items()
            for key in source.shapes
        }
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: source.shapes[key] for name, (source, key) in self._at.items()
        }

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        source, name = self._at[key]
        return source.read(name)

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix."""
        source, name = self._at[key]
        return source.rows(name, rows)


def is_oft(path: Path) -> bool:
    """Whether a folder holds the head of OpenVLA-OFT."""
    return any(path.glob('action_head--*.pt'))


def _joined(folder: Folder) -> JoinedSource:
    sources: dict[str, Source] = {'': folder.weights}
    for prefix, pattern in ((HEAD, 'action_head--*.pt'), (PROPRIO, 'proprio_projector--*.pt')):
        found = sorted(folder.path.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(f'{folder.path} holds several {pattern}: keep one')
        if found:
            sources[prefix] = pickle_source(found[0])
    return JoinedSource(sources)


def _map(key: str) -> Place | None:
    if key in FLAT:
        return Place(FLAT[key], lambda tensor: tensor[0], lambda shape: shape[1:])
    return _PLAIN(key)


_PLAIN = key_map(RULES)


def _vit(shapes: Shapes, name: str) -> VitConfig:
    hidden, width = shapes.of(f'{name}.blocks.0.mlp.fc1.weight')
    patch = shapes.of(f'{name}.patch_embed.proj.weight')[2]
    tokens = shapes.of(f'{name}.pos_embed')[1]
    registers = shapes.of(f'{name}.reg_token')[1] + 1 if f'{name}.reg_token' in shapes else 0
    return VitConfig(
        width, shapes.depth(f'{name}.blocks') - 1, hidden, VIT_HEADS, patch,
        patch * round(tokens**0.5), registers, f'{name}.blocks.0.ls1.scale_factor' in shapes,
    )


def _language(shapes: Shapes, text: Mapping[str, Any]) -> DecoderConfig:
    first = f'{LANGUAGE}.model.layers.0'
    inner, width = shapes.of(f'{first}.self_attn.q_proj.weight')
    heads = int(text.get('num_attention_heads', 32))
    return DecoderConfig(
        width, shapes.depth(f'{LANGUAGE}.model.layers'),
        shapes.of(f'{first}.mlp.gate_proj.weight')[0], heads,
        shapes.of(f'{first}.self_attn.k_proj.weight')[0] * heads // inner, inner // heads,
        float(text.get('rope_theta', 10000.0)), float(text.get('rms_norm_eps', 1e-6)), False,
    )


def openvla_network(folder: Folder, horizon: int, action: int) -> Stored:
    """Build the network without storage, and match it with the folder."""
    source = _joined(folder)
    shapes = Shapes(source.shapes)
    text = folder.config.get('text_config', {})
    vocabulary = shapes.of(f'{LANGUAGE}.model.embed_tokens.weight')[0]
    oft = is_oft(folder.path)
    config = OpenVlaConfig(
        first=_vit(shapes, FIRST),
        second=_vit(shapes, SECOND),
        language=_language(shapes, text),
        vocabulary=vocabulary,
        words=vocabulary - int(folder.config.get('pad_to_multiple_of', 64)),
        action=shapes.of(f'{HEAD}model.fc2.weight')[0] if oft else action,
        chunk=horizon if oft else 0,
        proprio=shapes.of(f'{PROPRIO}fc1.weight')[1] if f'{PROPRIO}fc1.weight' in shapes else 0,
    )
    with torch.device('meta'):
        model = OpenVla(config)
    return Stored(model, source, _map, _dead(config, oft=oft))


def _dead(config: OpenVlaConfig, *, oft: bool) -> Callable[[str], bool]:
    """Tensors behind the last used block of each vision transformer; OFT's head over words."""
    unused = (
        f'{FIRST}.blocks.{config.first.depth}.', f'{FIRST}.norm.', f'{FIRST}.attn_pool.',
        f'{SECOND}.blocks.{config.second.depth}.', f'{SECOND}.norm.', f'{SECOND}.attn_pool.',
        *((f'{LANGUAGE}.lm_head.',) if oft else ()),
    )
    return lambda key: key.startswith(unused)


def read_statistics(folder: Folder, dataset: str) -> Mapping[str, Any]:
    """Statistics of one dataset, from dataset_statistics.json or config.json's norm_stats."""
    file = folder.path / 'dataset_statistics.json'
    if file.is_file():
        found = json.loads(file.read_text())
    else:
        found = folder.config.get('norm_stats') or {}
    if dataset in found:
        return found[dataset]
    if len(found) == 1 and not dataset:
        return next(iter(found.values()))
    raise CheckpointError(
        f'{folder.path} has statistics of {", ".join(found) or "no dataset"}; say which in '
        f'model.statistics of the contract (it says {dataset!r})'
    )


def bounded(stats: Mapping[str, Any], margin: float) -> Affine:
    """[-1, 1] over the 1 % quantiles where the mask says so, the number itself elsewhere."""
    low = np.asarray(stats['q01'], np.float64)
    span = np.asarray(stats['q99'], np.float64) - low + margin
    kept = ~np.asarray(stats.get('mask', np.ones(len(low))), dtype=bool)
    centre = np.where(kept, 0.0, low + span / 2)
    scale = np.where(kept, 1.0, np.where(span == 0, 1.0, span / 2))
    return Affine(centre, scale, np.where(kept, 1.0, span / 2), centre, np.ones(len(low)))


def bin_centres() -> np.ndarray:
    """Middles of the 255 bins between 256 edges over [-1, 1]."""
    edges = np.linspace(-1, 1, BIN_COUNT)
    return (edges[:-1] + edges[1:]) / 2
