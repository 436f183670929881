# SPDX-License-Identifier: Apache-2.0
"""What is dropped changes nothing; what is folded changes what it should, exactly."""

import copy

import pytest
import torch

from quantvla_ros.bench.random_weights import randomize
from quantvla_ros.policies import savings
from quantvla_ros.policies.decoder import DecoderConfig
from quantvla_ros.policies.embedding import DiskEmbedding
from quantvla_ros.policies.gemma import GemmaConfig
from quantvla_ros.policies.groot_n15 import IMAGE, GrootConfig, GrootN15
from quantvla_ros.policies.pi0 import Pi0, Pi0Config
from quantvla_ros.policies.pi05 import Pi05, Pi05Config
from quantvla_ros.policies.siglip import VisionConfig
from quantvla_ros.policies.sites import policy_sites
from quantvla_ros.policies.smolvla import SmolVla, SmolVlaConfig, llama
from quantvla_ros.quant.tensor_file import TensorFile, write_tensors

VISION = VisionConfig(width=32, depth=2, hidden=48, heads=4, patch=14, image=28)
BIG, SMALL = GemmaConfig(32, 3, 48, 8, 1, 8), GemmaConfig(16, 3, 32, 8, 1, 8)
STEPS = 3


def pi05():
    return Pi05(Pi05Config(VISION, BIG, SMALL, 50, 8, 6))


def pi0():
    return Pi0(Pi0Config(VISION, BIG, SMALL, 50, 8, 8, 6))


def groot():
    backbone = DecoderConfig(32, 2, 48, 4, 2, 8)
    return GrootN15(GrootConfig(VISION, backbone, 50, 1, 48, 4, 32, 4, 48, 4, 32, 8, 16, 8, 3,
                                16, 6))


def smolvla():
    vision = VisionConfig(width=24, depth=1, hidden=48, heads=12, patch=16, image=64)
    return SmolVla(SmolVlaConfig(vision, llama(64, 96, 4, 4), llama(48, 64, 4, 4), 50, 2, 2, 8,
                                 8, 6))


MODELS = {'pi05': pi05, 'pi0': pi0, 'groot_n15': groot, 'smolvla': smolvla}


def made(name):
    model = MODELS[name]()
    randomize(model, 0)
    return model.eval().requires_grad_(False)


def inputs(model):
    size = model.config.vision.image
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    words = torch.arange(5, 12)
    if isinstance(model, GrootN15):
        patches = torch.full((2 * model.config.vision.tokens,), IMAGE)
        words = torch.cat([words[:3], patches, words[3:]])
    state = torch.randn(8, generator=generator)
    noise = torch.randn(1, 6, 8, generator=generator)
    return images, words, state, noise


def chunk(model, conditions=None):
    images, words, state, x = inputs(model)
    with torch.inference_mode():
        context = model.prefix(images, words, state)
        conditions = conditions or savings.condition_table(model, STEPS)
        for step in range(STEPS):
            x = x + model.velocity(context, x, conditions[step]) / STEPS
    return x


@pytest.mark.parametrize('name', MODELS)
def test_dropping_what_no_action_needs_leaves_the_chunk_bit_for_bit(name):
    model = made(name)
    whole = chunk(model)
    table = savings.condition_table(model, STEPS)
    dropped = savings.drop_unused(model, STEPS, tokens=10)
    assert dropped
    assert torch.equal(chunk(model, table), whole)


@pytest.mark.parametrize('name', ['pi05', 'pi0', 'groot_n15'])
def test_a_saving_reports_the_parameters_that_are_gone(name):
    model = made(name)
    before = savings.count(model)
    dropped = savings.drop_unused(model, STEPS, tokens=10)
    assert sum(saving.parameters for saving in dropped) == before - savings.count(model)
    assert all(saving.operations > 0 for saving in dropped)


def test_cross_attention_of_groot_sees_the_context_once_per_chunk():
    model = made('groot_n15')
    calls = []
    for block in model.blocks:
        if block.cross:
            block.attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    chunk(model)
    assert len(calls) == sum(block.cross for block in model.blocks)


def test_a_camera_that_is_left_out_equals_a_masked_one():
    """Keys of masked tokens have no weight: computed here the long way, with a mask."""
    model = made('pi05')
    images, words, _, _ = inputs(model)
    short = model.encode(images[:1], words)
    patches = model.config.vision.tokens
    seen = model.projector(model.vision(images)).flatten(0, 1)
    read = model.embedding(words) * model.config.backbone.width**0.5
    x = torch.cat([seen[:patches], torch.full_like(seen[patches:], 7.0), read])[None]
    valid = torch.ones(x.shape[1], dtype=torch.bool)
    valid[patches : 2 * patches] = False
    from quantvla_ros.policies.blocks import rotary, rotate

    table = rotary(valid.cumsum(0) - 1, 8)
    for i, layer in enumerate(model.backbone.layers):
        normed, _ = layer.attn_norm(x)
        k, v = layer.keys_values(normed, table)
        assert torch.allclose(k[:, :, valid], short[i][0], atol=1e-5)
        assert torch.allclose(v[:, :, valid], short[i][1], atol=1e-5)
        q = rotate(layer.attn.queries(normed), table)
        mask = valid.expand(len(valid), -1)
        x = x + layer.attn.attend(q, (k, v), mask)
        x = x + layer.mlp(layer.mlp_norm(x)[0])


def test_a_table_of_words_on_disk_is_exact(tmp_path):
    model = made('pi05')
    whole = chunk(model)
    path = tmp_path / 'words.safetensors'
    table = model.embedding.weight
    write_tensors(path, {'table': (table.dtype, tuple(table.shape))}, lambda name: table)
    file = TensorFile(path)
    model.embedding = DiskEmbedding(lambda rows: file.rows('table', rows), torch.float32)
    assert torch.equal(chunk(model), whole)
    assert not [p for n, p in model.named_parameters() if n.startswith('embedding')]


@pytest.mark.parametrize('name', ['pi05', 'pi0', 'groot_n15', 'smolvla'])
def test_folding_alpha_and_beta_equals_scaling_logits_and_outputs(name):
    model = made(name)
    generator = torch.Generator().manual_seed(1)
    reference, folded = copy.deepcopy(model), copy.deepcopy(model)
    sites = [s for s in policy_sites(model).attentions if s.alpha_foldable and s.beta_foldable]
    assert sites
    with torch.no_grad():
        for site in sites:
            alpha = 1 + 0.3 * torch.randn(site.heads, generator=generator)
            beta = 1.2
            for kind in ('weight', 'bias'):
                q = getattr(folded.get_submodule(site.q), kind)
                o = getattr(folded.get_submodule(site.o), kind)
                if q is not None:
                    rows = alpha.repeat_interleave(site.head_dim)
                    q.mul_(rows[:, None] if q.ndim == 2 else rows)
                if o is not None:
                    o.mul_(beta)
            _scale_logits(reference.get_submodule(site.name), alpha)
            reference.get_submodule(site.o).register_forward_hook(
                lambda module, args, out, beta=beta: out * beta)
    ours, theirs = chunk(folded), chunk(reference)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert not torch.allclose(ours, chunk(model), rtol=1e-2, atol=1e-2)


def _scale_logits(attention, alpha):
    """alpha_h on the logits of head h is alpha_h on its queries as they enter the core."""
    attention.core.register_forward_pre_hook(
        lambda module, args: (args[0] * alpha[None, :, None, None], *args[1:]))


def test_forgetting_the_bias_of_groot_would_show():
    model = made('groot_n15')
    whole = copy.deepcopy(model)
    with torch.no_grad():
        for site in policy_sites(model).attentions:
            if site.alpha_foldable:
                model.get_submodule(site.q).bias.mul_(1.4)
    assert not torch.allclose(chunk(model), chunk(whole), rtol=1e-3, atol=1e-3)
