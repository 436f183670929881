# SPDX-License-Identifier: Apache-2.0
"""OpenVLA and OpenVLA-OFT out of the public parts they are made of, small and random.

The published classes are no package; they join two timm transformers, a projector and a
transformers Llama. This joins the same parts in the same order and saves the same names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantvla_ros.bench.parity_case import TASK
from quantvla_ros.bench.public_models import small_tokenizer, statistics
from quantvla_ros.bench.random_weights import randomize

IMAGE, WIDTH, VISION, ACTION, STATE, CHUNK = 28, 64, 32, 7, 9, 4
WORDS, PADDING = 320, 64
DATASET = 'made_up'


class PublicOpenVla:
    """A random model and the folder it was saved to; form is 'hf' or 'oft'."""

    def __init__(self, form: str, folder: Path, seed: int) -> None:
        self.oft, self.folder, self.seed = form == 'oft', folder, seed
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = small_tokenizer(folder, WORDS, ('<s>', '\u2581'))
        self.parts: Any = nn.ModuleDict(_parts())
        if self.oft:
            self.parts['action_head'] = _head()
            self.parts['proprio_projector'] = _two(STATE, WIDTH)
        self.parts.float().eval()
        randomize(self.parts, seed)
        self.names = {n: tuple(p.shape) for n, p in self.parts.named_parameters()}
        self.stats = {
            'action': _bounds(ACTION, seed, gripper=True),
            'proprio': _bounds(STATE, seed + 1, gripper=False),
        }
        self._save()

    def _save(self) -> None:
        from safetensors.torch import save_file

        tensors = {
            key.replace('.gamma', '.scale_factor'): value.clone().contiguous()
            for key, value in self.parts.state_dict().items()
            if key.startswith(('vision_backbone', 'projector', 'language_model'))
        }
        shards: dict[str, Any] = {f'model-0000{i}-of-00002.safetensors': {} for i in (1, 2)}
        for i, (key, value) in enumerate(sorted(tensors.items())):
            shards[list(shards)[2 * i // len(tensors)]][key] = value
        for name, part in shards.items():
            save_file(part, str(self.folder / name))
        index = {'weight_map': {key: name for name, part in shards.items() for key in part}}
        (self.folder / 'model.safetensors.index.json').write_text(json.dumps(index))
        (self.folder / 'config.json').write_text(json.dumps({
            'model_type': 'openvla',
            'pad_to_multiple_of': PADDING,
            'text_config': {'model_type': 'llama', 'num_attention_heads': 4},
            'norm_stats': {} if self.oft else {DATASET: self.stats},
        }))
        if self.oft:
            (self.folder / 'dataset_statistics.json').write_text(json.dumps({DATASET: self.stats}))
            for name in ('action_head', 'proprio_projector'):
                state = {f'module.{k}': v for k, v in self.parts[name].state_dict().items()}
                torch.save(state, self.folder / f'{name}--10_checkpoint.pt')

    def _seen(self, images: list[np.ndarray]) -> torch.Tensor:
        """Patches of all images, projected, as the published vision backbone does."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        backbone, projected = self.parts['vision_backbone'], []
        for image in images:
            pixels = torch.tensor(image).float() / 255
            views = ((pixels - mean) / std, (pixels - 0.5) / 0.5)
            patches = [
                net.get_intermediate_layers(view.permute(2, 0, 1)[None], n={len(net.blocks) - 2})
                for net, view in zip(backbone.values(), views, strict=True)
            ]
            x = torch.cat([found[0] for found in patches], dim=2)
            fc = self.parts['projector']
            x = fc['fc2'](nn.functional.gelu(fc['fc1'](x)))
            projected.append(fc['fc3'](nn.functional.gelu(x)))
        return torch.cat(projected, dim=1)

    def _embedded(self, seen: torch.Tensor, extra: int) -> torch.Tensor:
        prompt = f'In: What action should the robot take to {TASK.lower()}?\nOut:'
        ids = self.tokenizer(prompt, add_special_tokens=False)['input_ids']
        marks = [self.tokenizer.convert_tokens_to_ids(m) for m in ('<s>', '\u2581')]
        read = self.parts['language_model'].get_input_embeddings()(
            torch.tensor([[marks[0], *ids, marks[1], *([1] * extra), *([2] * bool(extra))]]))
        if extra:
            read[:, -extra - 1 : -1] = 0
        return torch.cat([read[:, :1], seen, read[:, 1:]], dim=1)

    @torch.no_grad()
    def chunk(self, images: list[np.ndarray], state: np.ndarray, seed: int) -> np.ndarray:
        """Raw observation -> chunk in the units of the robot, as published."""
        del seed
        seen = self._seen(images)
        stats = {k: np.array(v) for k, v in self.stats['action'].items()}
        span = stats['q99'] - stats['q01'] + (1e-8 if self.oft else 0.0)
        normal = self._regress(seen, state) if self.oft else self._write(seen)
        return np.where(stats['mask'], 0.5 * (normal + 1) * span + stats['q01'], normal)

    def _write(self, seen: torch.Tensor) -> np.ndarray:
        out = self.parts['language_model'].generate(
            inputs_embeds=self._embedded(seen, 0), max_new_tokens=ACTION, min_new_tokens=ACTION,
            do_sample=False, eos_token_id=None, pad_token_id=0)
        bins = np.linspace(-1, 1, 256)
        centres = (bins[:-1] + bins[1:]) / 2
        return centres[np.clip(WORDS - out.numpy() - 1, 0, 254)]

    def _regress(self, seen: torch.Tensor, state: np.ndarray) -> np.ndarray:
        stats = {k: np.array(v) for k, v in self.stats['proprio'].items()}
        span = stats['q99'] - stats['q01'] + 1e-8
        proprio = np.clip(2 * (state - stats['q01']) / span - 1, -1, 1)
        net = self.parts['proprio_projector']
        token = net['fc2'](nn.functional.gelu(net['fc1'](torch.tensor(proprio).float()[None])))
        x = self._embedded(torch.cat([seen, token[None]], dim=1), CHUNK * ACTION)
        everything = torch.zeros(1, 1, x.shape[1], x.shape[1])
        hidden = self.parts['language_model'](
            inputs_embeds=x, attention_mask=everything, output_hidden_states=True
        ).hidden_states[-1]
        first = x.shape[1] - CHUNK * ACTION - 2
        y = hidden[:, first : first + CHUNK * ACTION].reshape(1, CHUNK, -1)
        head = self.parts['action_head']['model']
        y = torch.relu(head['fc1'](head['layer_norm1'](y)))
        for block in head['mlp_resnet_blocks']:
            y = block['ffn'](y) + y
        return head['fc2'](head['layer_norm2'](y))[0].numpy()


def _bounds(size: int, seed: int, *, gripper: bool) -> dict[str, Any]:
    stats = {name: value.tolist() for name, value in statistics(size, seed).items()}
    return {**stats, 'mask': [True] * (size - 1) + [not gripper]}


def _two(inner: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({'fc1': nn.Linear(inner, width), 'fc2': nn.Linear(width, width)})


def _head() -> nn.ModuleDict:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({'ffn': nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU())})

    return nn.ModuleDict({'model': nn.ModuleDict({
        'layer_norm1': nn.LayerNorm(WIDTH * ACTION), 'fc1': nn.Linear(WIDTH * ACTION, WIDTH),
        'mlp_resnet_blocks': nn.ModuleList([block(), block()]),
        'layer_norm2': nn.LayerNorm(WIDTH), 'fc2': nn.Linear(WIDTH, ACTION),
    })})


def _parts() -> dict[str, nn.Module]:
    import timm
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {'img_size': IMAGE, 'embed_dim': VISION, 'depth': 3, 'num_heads': 16,
                  'num_classes': 0}
    seen = 2 * VISION
    return {
        'vision_backbone': nn.ModuleDict({
            'featurizer': timm.create_model('vit_large_patch14_reg4_dinov2', **sizes),
            'fused_featurizer': timm.create_model('vit_so400m_patch14_siglip_224', **sizes),
        }),
        'projector': nn.ModuleDict({
            'fc1': nn.Linear(seen, 4 * seen), 'fc2': nn.Linear(4 * seen, WIDTH),
            'fc3': nn.Linear(WIDTH, WIDTH),
        }),
        'language_model': LlamaForCausalLM(LlamaConfig(
            hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=WORDS + PADDING, bos_token_id=4, eos_token_id=2,
        )),
    }
