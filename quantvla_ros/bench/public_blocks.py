# SPDX-License-Identifier: Apache-2.0
"""One block of each kind at its published size, public against ours, random weights, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantvla_ros.bench.random_weights import randomize
from quantvla_ros.policies.blocks import causal_mask
from quantvla_ros.policies.decoder import Decoder, DecoderConfig
from quantvla_ros.policies.gemma import GEMMA_2B, GEMMA_300M, AdaptiveNorm, GemmaStack, PlainNorm
from quantvla_ros.policies.groot_keys import BLOCK
from quantvla_ros.policies.groot_n15 import ActionBlock, GrootConfig
from quantvla_ros.policies.keys import ADAPTIVE, DECODER, VISION_LAYER, pairs
from quantvla_ros.policies.siglip import VisionConfig, VisionLayer

TOKENS = 64


def _take(ours: nn.Module, public: nn.Module, rules: Any) -> None:
    """Copy a public module's weights by the rules that the readers use; all of them."""
    found = dict(rules)
    state = {found[key]: value for key, value in public.state_dict().items()}
    ours.load_state_dict(state)


def _x(width: int, tokens: int = TOKENS) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(0))


def gemma(variant: Any, *, adaptive: bool) -> tuple[Tensor, Tensor]:
    """One Gemma layer and the last norm: backbone, or expert with adaptive norms."""
    from lerobot.policies.pi_gemma import PiGemmaModel
    from transformers import GemmaConfig

    public = PiGemmaModel(GemmaConfig(
        hidden_size=variant.width, intermediate_size=variant.hidden, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256, vocab_size=8,
        hidden_activation='gelu_pytorch_tanh', use_adarms=adaptive,
        adarms_cond_dim=variant.width if adaptive else None, attn_implementation='eager'))
    public.embed_tokens = None
    randomize(public, 0)
    c = type(variant)(variant.width, 1, variant.hidden)
    ours = GemmaStack(c, AdaptiveNorm if adaptive else PlainNorm)
    rules = [(f'layers.0.{a}', f'layers.0.{b}') for a, b in (ADAPTIVE if adaptive else DECODER)]
    last = pairs(('norm.dense', 'norm.dense')) if adaptive else [('norm.weight', 'norm.weight')]
    _take(ours, public, [*rules, *last])
    x, condition = _x(variant.width), _x(variant.width, 1)[0]
    theirs = public(
        inputs_embeds=x, attention_mask=torch.zeros(1, 1, TOKENS, TOKENS), use_cache=False,
        position_ids=torch.arange(TOKENS)[None], adarms_cond=condition if adaptive else None,
    ).last_hidden_state
    empty = (torch.zeros(1, 1, 0, 256), torch.zeros(1, 1, 0, 256))
    modulation = ours.modulation(condition) if adaptive else None
    return ours(x, [empty], modulation)[0], theirs


def siglip() -> tuple[Tensor, Tensor]:
    """One layer of So400m."""
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

    c = VisionConfig()
    config = SiglipVisionConfig(hidden_size=c.width, intermediate_size=c.hidden,
                                num_attention_heads=c.heads)
    config._attn_implementation = 'eager'
    public = SiglipEncoderLayer(config)
    randomize(public, 0)
    ours = VisionLayer(c)
    _take(ours, public, VISION_LAYER)
    out = public(_x(c.width), attention_mask=None)
    return ours(_x(c.width)), out[0] if isinstance(out, tuple) else out


def qwen3() -> tuple[Tensor, Tensor]:
    """One layer of Qwen3-1.7B and the last norm."""
    from transformers import Qwen3Config, Qwen3Model

    c = DecoderConfig(depth=1)
    public = Qwen3Model(Qwen3Config(
        hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=1,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_width,
        vocab_size=8, rope_theta=c.base, attn_implementation='eager'))
    public.embed_tokens = None
    randomize(public, 0)
    ours = Decoder(c)
    inner = [*DECODER, *((f'self_attn.{n}.weight', f'{n}.weight') for n in ('q_norm', 'k_norm'))]
    _take(ours, public, [*((f'layers.0.{a}', f'layers.0.{b}') for a, b in inner),
                         ('norm.weight', 'norm.weight')])
    x = _x(c.width)
    theirs = public(inputs_embeds=x, use_cache=False).last_hidden_state
    return ours(x, mask=causal_mask(TOKENS, x.device))[0], theirs


def groot_block(context: int | None) -> tuple[Tensor, Tensor]:
    """One block of the diffusion transformer, over the context or over itself."""
    from lerobot.policies.groot.action_head.cross_attention_dit import BasicTransformerBlock

    c = GrootConfig()
    public = BasicTransformerBlock(
        c.width, c.heads, c.width // c.heads, cross_attention_dim=context,
        activation_fn='gelu-approximate', attention_bias=True, norm_type='ada_norm',
        norm_elementwise_affine=False, final_dropout=True).eval()
    randomize(public, 0)
    ours = ActionBlock(c, context)
    _take(ours, public, [*BLOCK, *pairs(('norm1.linear', 'attn_norm.dense'))])
    x, time = _x(c.width), _x(c.width, 1)[0]
    seen = _x(context) if context else None
    theirs = public(x, encoder_hidden_states=seen, temb=time)
    modulation = ours.attn_norm.dense(nn.functional.silu(time))
    keys = ours.attn.keys_values(seen) if seen is not None else None
    return ours(x, modulation, keys), theirs


BLOCKS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    'pi05 backbone layer, 2048': lambda: gemma(GEMMA_2B, adaptive=False),
    'pi05 expert layer, 1024, adaptive norms': lambda: gemma(GEMMA_300M, adaptive=True),
    'SigLIP So400m layer, 1152': siglip,
    'groot_n15 Qwen3 layer, 2048': qwen3,
    'groot_n15 cross-attention block, 1536 over 2048': lambda: groot_block(2048),
    'groot_n15 self-attention block, 1536': lambda: groot_block(None),
}


def compare_blocks() -> float:
    """Print the relative difference of each block, and return the largest."""
    worst = 0.0
    for name, make in BLOCKS.items():
        with torch.no_grad():
            ours, theirs = make()
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        print(f'{name:50s} relative difference {error:.1e}')
        worst = max(worst, error)
    return worst
