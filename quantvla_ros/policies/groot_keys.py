# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5's tensors as Isaac-GR00T and lerobot store them, and one embodiment out of many."""

from __future__ import annotations

from collections.abc import Callable

from quantvla_ros.policies.checkpoints import Place
from quantvla_ros.policies.keys import DECODER, key_map, layered, pairs, slot, vision_rules

EAGLE = 'backbone.eagle_model'
TOWER = f'{EAGLE}.vision_model.vision_model'
LAYERS = f'{EAGLE}.language_model.model.layers'
EMBEDDING = f'{EAGLE}.language_model.model.embed_tokens.weight'
LM_HEAD = f'{EAGLE}.language_model.lm_head.weight'
HEAD = 'action_head'
BLOCKS = f'{HEAD}.model.transformer_blocks'
CONTEXT = f'{HEAD}.vl_self_attention.transformer_blocks'

BLOCK = pairs(
    *((f'attn1.to_{x}', f'attn.{x}_proj') for x in 'qkv'),
    ('attn1.to_out.0', 'attn.o_proj'),
    ('ff.net.0.proj', 'mlp.fc1'),
    ('ff.net.2', 'mlp.fc2'),
)
RULES = [
    *vision_rules(TOWER),
    *pairs((f'{EAGLE}.mlp1.0', 'projector')),
    (EMBEDDING, 'embedding.weight'),
    *layered(LAYERS, 'backbone.layers', [
        *DECODER,
        ('self_attn.q_norm.weight', 'q_norm.weight'),
        ('self_attn.k_norm.weight', 'k_norm.weight'),
    ]),
    (f'{EAGLE}.language_model.model.norm.weight', 'backbone.norm.weight'),
    *pairs((f'{HEAD}.vlln', 'context_norm')),
    *layered(CONTEXT, 'context_layers', [
        *BLOCK, *pairs(('norm1', 'attn_norm'), ('norm3', 'mlp_norm')),
    ]),
    *layered(BLOCKS, 'blocks', [*BLOCK, *pairs(('norm1.linear', 'attn_norm.dense'))]),
    *pairs(
        (f'{HEAD}.model.timestep_encoder.timestep_embedder.linear_1', 'time_in'),
        (f'{HEAD}.model.timestep_encoder.timestep_embedder.linear_2', 'time_out'),
        (f'{HEAD}.model.proj_out_1', 'last_modulation'),
        (f'{HEAD}.model.proj_out_2', 'out'),
    ),
    (f'{HEAD}.future_tokens.weight', 'future'),
    (f'{HEAD}.position_embedding.weight', 'position'),
]
STACKED = {
    f'{HEAD}.{theirs}': ours
    for theirs, ours in (
        ('state_encoder.layer1', 'state_encoder.fc1'),
        ('state_encoder.layer2', 'state_encoder.fc2'),
        ('action_encoder.W1', 'action_encoder.enter'),
        ('action_encoder.W2', 'action_encoder.mix'),
        ('action_encoder.W3', 'action_encoder.leave'),
        ('action_decoder.layer1', 'action_decoder.fc1'),
        ('action_decoder.layer2', 'action_decoder.fc2'),
    )
}


def groot_map(embodiment: int, strip: str, *, tied: bool) -> Callable[[str], Place | None]:
    """Key map that takes one embodiment out of the stacked tensors.

    tied: the file stores the embedding only under the name of the head over words, as lerobot
    does when it drops duplicates.
    """
    plain = key_map([*RULES, (LM_HEAD, 'embedding.weight')] if tied else RULES, strip)

    def look_up(key: str) -> Place | None:
        name, _, part = key.removeprefix(strip).rpartition('.')
        if name not in STACKED:
            return plain(key)
        if part == 'W':  # (slots, in, out) -> (out, in)
            turn = slot(embodiment, transpose=True)
            return Place(f'{STACKED[name]}.weight', turn, lambda shape: (shape[2], shape[1]))
        turn = slot(embodiment, transpose=False)
        return Place(f'{STACKED[name]}.bias', turn, lambda shape: shape[1:])

    return look_up


def groot_dead(strip: str, *, tied: bool) -> Callable[[str], bool]:
    """Tensors that make no action: the head over words, the vision tower's pooling head."""
    heads = (f'{TOWER}.head.',) if tied else (f'{TOWER}.head.', LM_HEAD)
    return lambda key: key.removeprefix(strip).startswith(heads)
