# SPDX-License-Identifier: Apache-2.0
"""pi0 and pi0.5 as lerobot builds, saves and runs them, at small sizes with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantvla_ros.bench.parity_case import TASK
from quantvla_ros.bench.public_models import IMAGE, fix_noise, small_tokenizer, statistics
from quantvla_ros.bench.random_weights import randomize

STATE, ACTION, HORIZON = 9, 8, 10
VOCABULARY = 300
CAMERAS = ('base_0_rgb', 'left_wrist_0_rgb', 'right_wrist_0_rgb')


class PublicLerobot:
    """One random policy of lerobot, its processors, and the folder it was saved to."""

    def __init__(self, policy: Any, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = small_tokenizer(folder, VOCABULARY)
        self.policy = policy
        randomize(self.policy, seed)
        self.names = {n: tuple(p.shape) for n, p in self.policy.named_parameters()}
        self.policy.eval()
        self.before, self.after = self._processors()
        self.policy.save_pretrained(folder)
        self.before.save_pretrained(folder)
        self.after.save_pretrained(folder)

    def _processors(self) -> tuple[Any, Any]:
        from lerobot.policies.factory import make_pre_post_processors
        from lerobot.processor import tokenizer_processor

        auto = tokenizer_processor.AutoTokenizer
        kept = auto.from_pretrained
        auto.from_pretrained = lambda *args, **kwargs: self.tokenizer
        stats = {
            'observation.state': statistics(STATE, self.seed),
            'action': statistics(ACTION, self.seed + 1),
        }
        try:
            return make_pre_post_processors(self.policy.config, dataset_stats=stats)
        finally:
            auto.from_pretrained = kept

    def chunk(self, images: list[np.ndarray], state: np.ndarray, seed: int) -> np.ndarray:
        """Run the whole published path: raw observation -> chunk in the units of the robot."""
        batch: dict[str, Any] = {
            f'observation.images.{name}': torch.tensor(image).permute(2, 0, 1).float() / 255
            for name, image in zip(CAMERAS, images, strict=False)
        }
        batch['observation.state'] = torch.tensor(state).float()
        batch['task'] = TASK
        fix_noise(self.policy.model, seed)
        with torch.no_grad():
            actions = self.policy.predict_action_chunk(self.before(batch))
        return self.after(actions)[0].numpy()


class PublicPi(PublicLerobot):
    """pi0 or pi0.5."""

    def __init__(self, family: str, folder: Path, seed: int, width: int = 32) -> None:
        super().__init__(_build(family, width), folder, seed)


def _build(family: str, width: int) -> Any:
    import lerobot.policies.pi0.modeling_pi0 as pi0
    import lerobot.policies.pi05.modeling_pi05 as pi05
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    module, make = (pi05, PI05Config) if family == 'pi05' else (pi0, PI0Config)
    sizes = {
        'gemma_2b': module.GemmaConfig(width, 3, 2 * width, 8, 1, 8),
        'gemma_300m': module.GemmaConfig(width // 2, 3, width, 8, 1, 8),
    }
    kept = module.get_gemma_config
    module.get_gemma_config = sizes.__getitem__
    visual = PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE))
    config = make(
        input_features={
            **{f'observation.images.{name}': visual for name in CAMERAS},
            'observation.state': PolicyFeature(FeatureType.STATE, (STATE,)),
        },
        output_features={'action': PolicyFeature(FeatureType.ACTION, (ACTION,))},
        image_resolution=(IMAGE, IMAGE),
        chunk_size=HORIZON,
        n_action_steps=HORIZON,
        tokenizer_max_length=200,
        device='cpu',
    )
    try:
        with torch.device('meta'):
            config.device = 'meta'
            policy = (pi05.PI05Policy if family == 'pi05' else pi0.PI0Policy)(config)
    finally:
        module.get_gemma_config = kept
    return _shrink(policy, module, sizes)


def _shrink(policy: Any, module: Any, sizes: dict[str, Any]) -> Any:
    """Rebuild what the public class makes at full size whatever it is told."""
    from transformers.models.paligemma import PaliGemmaConfig  # noqa: F401  (registers)

    both = policy.model.paligemma_with_expert
    config = both.paligemma.config
    small = config.vision_config
    small.hidden_size, small.num_hidden_layers, small.num_attention_heads = 32, 2, 16
    small.intermediate_size, small.projection_dim = 48, sizes['gemma_2b'].width
    config.text_config.vocab_size = config.image_token_id = VOCABULARY
    config.projection_dim = sizes['gemma_2b'].width
    expert = both.gemma_expert.config
    expert.vocab_size = VOCABULARY
    both.paligemma = module.PaliGemmaForConditionalGenerationWithPiGemma(config=config)
    both.gemma_expert = module.PiGemmaForCausalLM(config=expert)
    both.gemma_expert.model.embed_tokens = None
    policy.config.device = 'cpu'
    for name, child in list(policy.model.named_children()):
        if isinstance(child, torch.nn.Linear):
            fresh = torch.nn.Linear(child.in_features, child.out_features)
            setattr(policy.model, name, fresh)
    return policy.float()
