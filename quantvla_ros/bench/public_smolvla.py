# SPDX-License-Identifier: Apache-2.0
"""SmolVLA as lerobot builds, saves and runs it, at small sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from quantvla_ros.bench.public_pi import ACTION, CAMERAS, HORIZON, STATE, VOCABULARY, PublicLerobot

IMAGE = 64


class PublicSmolVla(PublicLerobot):
    """SmolVLA with cross-attention in every second layer, as published."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(_build(), folder, seed)


def _vlm_config() -> Any:
    from transformers import SmolVLMConfig

    return SmolVLMConfig(
        vision_config={
            'hidden_size': 24, 'intermediate_size': 48, 'num_hidden_layers': 2,
            'num_attention_heads': 12, 'image_size': IMAGE, 'patch_size': 16,
            'hidden_act': 'gelu_pytorch_tanh',
        },
        text_config={
            'model_type': 'llama', 'hidden_size': 64, 'intermediate_size': 96,
            'num_hidden_layers': 4, 'num_attention_heads': 15, 'num_key_value_heads': 5,
            'head_dim': 4, 'vocab_size': VOCABULARY, 'rms_norm_eps': 1e-5,
            'pad_token_id': 0, 'bos_token_id': 2, 'eos_token_id': 1,
        },
        scale_factor=2, image_token_id=3, tie_word_embeddings=False, pad_token_id=0,
    )


def _processor() -> Any:
    """Stand in for the image processor, of which the policy reads two token numbers only."""
    tokenizer = mock.Mock(fake_image_token_id=3, global_image_token_id=3)
    return mock.Mock(tokenizer=tokenizer)


def _build() -> Any:
    import lerobot.policies.smolvla.smolvlm_with_expert as inner
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    visual = PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE))
    config = SmolVLAConfig(
        input_features={
            **{f'observation.images.{name}': visual for name in CAMERAS},
            'observation.state': PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={'action': PolicyFeature(FeatureType.ACTION, (ACTION,))},
        resize_imgs_with_padding=(IMAGE, IMAGE),
        chunk_size=HORIZON,
        n_action_steps=HORIZON,
        num_vlm_layers=4,
        device='cpu',
    )
    with (
        mock.patch.object(inner.AutoConfig, 'from_pretrained', lambda *a, **k: _vlm_config()),
        mock.patch.object(inner.AutoProcessor, 'from_pretrained', lambda *a, **k: _processor()),
    ):
        return SmolVLAPolicy(config).float()
