# SPDX-License-Identifier: Apache-2.0
"""Key maps: what each published format calls the tensors of our architectures.

A map is a list of rules, one per stored name, with `*` for a layer's number. The names on the left
are those that lerobot, openpi, Isaac-GR00T and OpenVLA write; the ones on the right are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from quantvla_ros.policies.checkpoints import Place

Rules = Sequence[tuple[str, str]]


def layered(stored: str, ours: str, parts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rules of a stack of layers: (stored).*.(part) -> (ours).*.(part)."""
    return [(f'{stored}.*.{theirs}', f'{ours}.*.{own}') for theirs, own in parts]


def pairs(*names: tuple[str, str]) -> list[tuple[str, str]]:
    """Rules for the weight and the bias of modules."""
    return [(f'{a}.{kind}', f'{b}.{kind}') for a, b in names for kind in ('weight', 'bias')]


def key_map(rules: Rules, strip: str = '') -> Callable[[str], Place | None]:
    """Make a map from rules; `strip` is a prefix that a key may carry."""
    compiled = [
        (re.compile(re.escape(theirs).replace(r'\*', r'(\d+)')), ours.replace('*', r'\1'))
        for theirs, ours in rules
    ]
    plain = {theirs: ours for theirs, ours in rules if '*' not in theirs}

    def look_up(key: str) -> Place | None:
        key = key.removeprefix(strip)
        if key in plain:
            return Place(plain[key])
        for pattern, ours in compiled:
            match = pattern.fullmatch(key)
            if match:
                return Place(match.expand(ours))
        return None

    return look_up


ATTENTION = [(f'self_attn.{x}_proj.weight', f'attn.{x}_proj.weight') for x in 'qkvo']
MLP = [(f'mlp.{x}_proj.weight', f'mlp.{x}_proj.weight') for x in ('gate', 'up', 'down')]
DECODER = [
    *ATTENTION,
    *MLP,
    ('input_layernorm.weight', 'attn_norm.weight'),
    ('post_attention_layernorm.weight', 'mlp_norm.weight'),
]
ADAPTIVE = [
    *ATTENTION,
    *MLP,
    *pairs(('input_layernorm.dense', 'attn_norm.dense'),
           ('post_attention_layernorm.dense', 'mlp_norm.dense')),
]
VISION_LAYER = pairs(
    *((f'self_attn.{x}_proj', f'attn.{x}_proj') for x in 'qkv'),
    ('self_attn.out_proj', 'attn.o_proj'),
    ('layer_norm1', 'attn_norm'),
    ('layer_norm2', 'mlp_norm'),
    ('mlp.fc1', 'mlp.fc1'),
    ('mlp.fc2', 'mlp.fc2'),
)


def vision_rules(stored: str, ours: str = 'vision') -> list[tuple[str, str]]:
    """Rules of a SigLIP tower as transformers stores it."""
    return [
        *pairs((f'{stored}.embeddings.patch_embedding', f'{ours}.patch')),
        (f'{stored}.embeddings.position_embedding.weight', f'{ours}.position'),
        *layered(f'{stored}.encoder.layers', f'{ours}.layers', VISION_LAYER),
        *pairs((f'{stored}.post_layernorm', f'{ours}.norm')),
    ]


_PALIGEMMA = 'paligemma_with_expert.paligemma.model'
_EXPERT = 'paligemma_with_expert.gemma_expert.model'
PI_PREFIX = [
    *vision_rules(f'{_PALIGEMMA}.vision_tower.vision_model'),
    *pairs((f'{_PALIGEMMA}.multi_modal_projector.linear', 'projector')),
    (f'{_PALIGEMMA}.language_model.embed_tokens.weight', 'embedding.weight'),
    *layered(f'{_PALIGEMMA}.language_model.layers', 'backbone.layers', DECODER),
    (f'{_PALIGEMMA}.language_model.norm.weight', 'backbone.norm.weight'),
    *pairs(('action_in_proj', 'action_in'), ('action_out_proj', 'action_out')),
]
PI05 = [
    *PI_PREFIX,
    *layered(f'{_EXPERT}.layers', 'expert.layers', ADAPTIVE),
    *pairs((f'{_EXPERT}.norm.dense', 'expert.norm.dense')),
    *pairs(('time_mlp_in', 'time_in'), ('time_mlp_out', 'time_out')),
]
PI0 = [
    *PI_PREFIX,
    *layered(f'{_EXPERT}.layers', 'expert.layers', DECODER),
    (f'{_EXPERT}.norm.weight', 'expert.norm.weight'),
    *pairs(('state_proj', 'state_in'), ('action_time_mlp_in', 'action_time_in'),
           ('action_time_mlp_out', 'action_time_out')),
]
PI_LM_HEAD = 'paligemma_with_expert.paligemma.lm_head.weight'
PI_TIED = [(PI_LM_HEAD, 'embedding.weight')]


def pi_dead(*, tied: bool) -> Callable[[str], bool]:
    """Tensors of pi0 and pi0.5 that make no action: the heads over words.

    tied: the file stores the embedding only under the name of the head, which then is not dead.
    """
    names = {'paligemma_with_expert.gemma_expert.lm_head.weight'}
    if not tied:
        names.add(PI_LM_HEAD)
    return lambda key: key.removeprefix('model.') in names


def slot(number: int, *, transpose: bool) -> Callable[[Tensor], Tensor]:
    """Keep one embodiment of a stacked tensor, as a linear layer wants it."""
    return lambda tensor: tensor[number].T if transpose else tensor[number]
