# SPDX-License-Identifier: Apache-2.0
"""GR00T N1.5 as lerobot 0.5 carries it, small and random, in both of its folder formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from quantvla_ros.bench.parity_case import TASK
from quantvla_ros.bench.public_models import small_tokenizer, statistics
from quantvla_ros.bench.random_weights import randomize
from quantvla_ros.policies.flow import noise
from quantvla_ros.policies.groot_folder import chat

STATE, ACTION, HORIZON, IMAGE, VOCABULARY = 9, 8, 16, 28, 320
TAG = 'new_embodiment'
MARKS = ('<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>')
PARTS = {'arm': slice(0, 7), 'gripper': slice(7, None)}
HEAD = {
    'action_dim': 32,
    'action_horizon': HORIZON,
    'add_pos_embed': True,
    'backbone_embedding_dim': 64,
    'hidden_size': 32,
    'input_embedding_dim': 64,
    'max_num_embodiments': 32,
    'max_seq_len': 64,
    'max_state_dim': 64,
    'num_inference_timesteps': 4,
    'num_target_vision_tokens': 6,
    'num_timestep_buckets': 1000,
    'diffusion_model_cfg': {
        'attention_head_dim': 2,
        'cross_attention_dim': 64,
        'interleave_self_attention': True,
        'norm_type': 'ada_norm',
        'num_attention_heads': 32,
        'num_layers': 4,
        'output_dim': 32,
        'positional_embeddings': None,
    },
    'vl_self_attention_cfg': {
        'attention_head_dim': 2,
        'num_attention_heads': 32,
        'num_layers': 2,
        'positional_embeddings': None,
    },
}


class PublicGroot:
    """One random GR00T N1.5 and the folder it was saved to, as Isaac-GR00T or lerobot do."""

    def __init__(self, form: str, folder: Path, seed: int) -> None:
        self.form, self.folder, self.seed = form, folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = small_tokenizer(folder, VOCABULARY, MARKS)
        self.model = _build()
        self.model.eval()
        policy = self.model if form == 'isaac' else _lerobot_policy(self.model)
        randomize(policy, seed)
        self.names = {n: tuple(p.shape) for n, p in policy.named_parameters()}
        self.stats = {
            'observation.state': statistics(STATE, seed),
            'action': statistics(ACTION, seed + 1),
        }
        self._save(policy)

    def _save(self, policy: Any) -> None:
        if self.form == 'isaac':
            self.model.save_pretrained(self.folder, max_shard_size='2MB')
            metadata = {TAG: {'statistics': {
                'state': _parts(self.stats['observation.state']),
                'action': _parts(self.stats['action']),
            }}}
            (self.folder / 'experiment_cfg').mkdir(exist_ok=True)
            file = self.folder / 'experiment_cfg' / 'metadata.json'
            file.write_text(json.dumps(metadata))
            return
        policy.save_pretrained(self.folder)
        for part in self._processors(policy):
            part.save_pretrained(self.folder)

    def _processors(self, policy: Any) -> tuple[Any, Any]:
        from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors

        return make_groot_pre_post_processors(policy.config, dataset_stats=self.stats)

    def chunk(self, images: list[np.ndarray], state: np.ndarray, seed: int) -> np.ndarray:
        """Run the published network between the published packing and unpacking steps."""
        from lerobot.policies.groot.processor_groot import (
            GrootActionUnpackUnnormalizeStep,
            GrootPackInputsStep,
        )
        from lerobot.types import TransitionKey

        pack = GrootPackInputsStep(embodiment_tag=TAG, stats=self.stats)
        packed = pack({
            TransitionKey.OBSERVATION: {'observation.state': torch.tensor(state)[None].float()},
            TransitionKey.COMPLEMENTARY_DATA: {'task': TASK},
        })
        pixels = torch.stack([torch.tensor(i).permute(2, 0, 1).float() / 255 for i in images])
        patches = self.model.config.patches
        prompt = chat(str([packed[TransitionKey.COMPLEMENTARY_DATA]['language']]),
                      len(images), patches)
        tokens = self.tokenizer(prompt, return_tensors='pt', add_special_tokens=False)
        fixed = torch.from_numpy(noise(seed, (1, HORIZON, HEAD['action_dim'])))  # type: ignore[arg-type]
        with torch.no_grad(), mock.patch('torch.randn', lambda *args, **kwargs: fixed):
            out = self.model.get_action({
                'eagle_pixel_values': (pixels - 0.5) / 0.5,
                'eagle_input_ids': tokens['input_ids'],
                'eagle_attention_mask': tokens['attention_mask'],
                'eagle_image_sizes': torch.zeros(1),
                'state': packed[TransitionKey.OBSERVATION]['state'],
                'embodiment_id': packed[TransitionKey.COMPLEMENTARY_DATA]['embodiment_id'],
            })['action_pred']
        unpack = GrootActionUnpackUnnormalizeStep(env_action_dim=ACTION, stats=self.stats)
        rows = [unpack({TransitionKey.ACTION: out[:, i]})[TransitionKey.ACTION]
                for i in range(HORIZON)]
        return torch.cat(rows).numpy()


def _parts(stats: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        part: {name: value[where].tolist() for name, value in stats.items()}
        for part, where in PARTS.items()
    }


def _build() -> Any:
    from lerobot.policies.groot import groot_n1
    from lerobot.policies.groot.eagle2_hg_model.configuration_eagle2_5_vl import Eagle25VLConfig
    from lerobot.policies.groot.eagle2_hg_model.modeling_eagle2_5_vl import (
        Eagle25VLForConditionalGeneration,
    )
    from transformers import Qwen3ForCausalLM, SiglipVisionModel

    config = Eagle25VLConfig(
        vision_config={
            'model_type': 'siglip_vision_model', 'hidden_size': 32, 'intermediate_size': 48,
            'num_hidden_layers': 2, 'num_attention_heads': 16, 'image_size': IMAGE,
            'patch_size': 14,
        },
        text_config={
            'architectures': ['Qwen3ForCausalLM'], 'model_type': 'qwen3', 'hidden_size': 64,
            'intermediate_size': 96, 'num_hidden_layers': 3, 'num_attention_heads': 4,
            'num_key_value_heads': 2, 'head_dim': 8, 'vocab_size': VOCABULARY,
            'rope_theta': 1000000.0, 'tie_word_embeddings': True,
        },
        use_pixel_shuffle=False, mlp_connector_layers=1, select_layer=-1,
        force_image_size=IMAGE, image_token_index=4 + MARKS.index('<IMG_CONTEXT>'),
    )
    config._attn_implementation = 'sdpa'
    eagle = Eagle25VLForConditionalGeneration(
        config, SiglipVisionModel(config.vision_config), Qwen3ForCausalLM(config.text_config)
    )

    def start(self: Any, **options: Any) -> None:
        torch.nn.Module.__init__(self)
        self.eagle_model, self.eagle_linear = eagle, torch.nn.Identity()
        self.select_layer = len(eagle.language_model.model.layers)

    whole = groot_n1.GR00TN15Config(
        backbone_cfg={'select_layer': 3}, action_head_cfg=HEAD, action_horizon=HORIZON,
        action_dim=HEAD['action_dim'], compute_dtype='float32',
    )
    whole.patches = (IMAGE // 14) ** 2
    with mock.patch.object(groot_n1.EagleBackbone, '__init__', start):
        return groot_n1.GR00TN15(whole, local_model_path='')


def _lerobot_policy(model: Any) -> Any:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.groot.configuration_groot import GrootConfig
    from lerobot.policies.groot.modeling_groot import GrootPolicy

    visual = PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE))
    config = GrootConfig(
        input_features={
            'observation.images.base': visual,
            'observation.images.wrist': visual,
            'observation.state': PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={'action': PolicyFeature(FeatureType.ACTION, (ACTION,))},
        chunk_size=HORIZON, n_action_steps=HORIZON, embodiment_tag=TAG, device='cpu',
    )
    with mock.patch.object(GrootPolicy, '_create_groot_model', lambda self: model):
        return GrootPolicy(config)
