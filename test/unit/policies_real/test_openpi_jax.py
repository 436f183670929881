# SPDX-License-Identifier: Apache-2.0
"""openpi's JAX checkpoints: read as orbax stores them, converted bit for bit, or refused."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantvla_ros.bench.parity_case import CASES, relative_error
from quantvla_ros.cli import main

HEADS, VISION_HEADS = 8, 16
HERE = importlib.util.find_spec('tensorstore') is not None
with_tensorstore = pytest.mark.skipif(not HERE, reason='tensorstore is not installed')
TOWER = 'paligemma_with_expert.paligemma.model.vision_tower.vision_model'
LANGUAGE = 'paligemma_with_expert.paligemma.model.language_model'
EXPERT = 'paligemma_with_expert.gemma_expert.model'


class Flax:
    """The arrays that openpi would hold for some PyTorch tensors, made layer by layer."""

    def __init__(self, tensors):
        self.tensors = {key.removeprefix('model.'): value.numpy()
                        for key, value in tensors.items()}
        self.arrays = {}

    def take(self, name):
        return self.tensors[name]

    def stack(self, pattern, turn):
        found, i = [], 0
        while pattern.format(i) in self.tensors:
            found.append(turn(self.take(pattern.format(i))))
            i += 1
        return np.stack(found)

    def vision(self):
        put, block = self.arrays.__setitem__, 'PaliGemma/img/Transformer/encoderblock'
        layer = TOWER + '.encoder.layers.{}.'
        put('PaliGemma/img/embedding/kernel',
            self.take(f'{TOWER}.embeddings.patch_embedding.weight').transpose(2, 3, 1, 0))
        put('PaliGemma/img/embedding/bias',
            self.take(f'{TOWER}.embeddings.patch_embedding.bias'))
        put('PaliGemma/img/pos_embedding',
            self.take(f'{TOWER}.embeddings.position_embedding.weight')[None])
        for part, name in (('scale', 'weight'), ('bias', 'bias')):
            put(f'PaliGemma/img/Transformer/encoder_norm/{part}',
                self.take(f'{TOWER}.post_layernorm.{name}'))
            for a, b in (('LayerNorm_0', 'layer_norm1'), ('LayerNorm_1', 'layer_norm2')):
                put(f'{block}/{a}/{part}', self.stack(f'{layer}{b}.{name}', np.asarray))
        for a, b in (('Dense_0', 'fc1'), ('Dense_1', 'fc2')):
            dense = f'{block}/MlpBlock_0/{a}'
            put(f'{dense}/kernel', self.stack(f'{layer}mlp.{b}.weight', np.transpose))
            put(f'{dense}/bias', self.stack(f'{layer}mlp.{b}.bias', np.asarray))
        attention = f'{block}/MultiHeadDotProductAttention_0'
        for a, b in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj')):
            put(f'{attention}/{a}/kernel', self.stack(
                f'{layer}self_attn.{b}.weight',
                lambda w: w.reshape(VISION_HEADS, -1, w.shape[1]).transpose(2, 0, 1)))
            put(f'{attention}/{a}/bias', self.stack(
                f'{layer}self_attn.{b}.bias', lambda v: v.reshape(VISION_HEADS, -1)))
        put(f'{attention}/out/kernel', self.stack(
            f'{layer}self_attn.out_proj.weight',
            lambda w: w.T.reshape(VISION_HEADS, -1, w.shape[0])))
        put(f'{attention}/out/bias', self.stack(f'{layer}self_attn.out_proj.bias', np.asarray))
        linear = 'paligemma_with_expert.paligemma.model.multi_modal_projector.linear'
        put('PaliGemma/img/head/kernel', self.take(f'{linear}.weight').T)
        put('PaliGemma/img/head/bias', self.take(f'{linear}.bias'))

    def gemma(self, mark, ours):
        put, stored, layer = self.arrays.__setitem__, 'PaliGemma/llm/layers', ours + '.layers.{}.'
        put(f'{stored}/attn/q_einsum{mark}/w', self.stack(
            f'{layer}self_attn.q_proj.weight',
            lambda w: w.reshape(HEADS, -1, w.shape[1]).transpose(0, 2, 1)))
        both = [self.stack(f'{layer}self_attn.{x}_proj.weight', np.transpose) for x in 'kv']
        put(f'{stored}/attn/kv_einsum{mark}/w', np.stack(both, 1)[:, :, None])
        put(f'{stored}/attn/attn_vec_einsum{mark}/w', self.stack(
            f'{layer}self_attn.o_proj.weight', lambda w: w.T.reshape(HEADS, -1, w.shape[0])))
        both = [self.stack(f'{layer}mlp.{x}_proj.weight', np.transpose) for x in ('gate', 'up')]
        put(f'{stored}/mlp{mark}/gating_einsum', np.stack(both, 1))
        put(f'{stored}/mlp{mark}/linear', self.stack(f'{layer}mlp.down_proj.weight', np.transpose))
        norms = (('pre_attention_norm', 'input_layernorm'),
                 ('pre_ffw_norm', 'post_attention_layernorm'))
        if f'{ours}.norm.weight' in self.tensors:
            put(f'PaliGemma/llm/final_norm{mark}/scale', self.take(f'{ours}.norm.weight'))
            for a, b in norms:
                put(f'{stored}/{a}{mark}/scale', self.stack(f'{layer}{b}.weight', np.asarray))
            return
        for part, name, turn in (('kernel', 'weight', np.transpose), ('bias', 'bias', np.asarray)):
            put(f'PaliGemma/llm/final_norm{mark}/Dense_0/{part}',
                turn(self.take(f'{ours}.norm.dense.{name}')))
            for a, b in norms:
                put(f'{stored}/{a}{mark}/Dense_0/{part}',
                    self.stack(f'{layer}{b}.dense.{name}', turn))

    def all(self):
        self.vision()
        self.gemma('', LANGUAGE)
        self.gemma('_1', EXPERT)
        self.arrays['PaliGemma/llm/embedder/input_embedding'] = self.take(
            f'{LANGUAGE}.embed_tokens.weight')
        for name in [key for key in self.tensors if '.' in key and '_proj.' in key
                     and not key.startswith('paligemma')] + [
                         key for key in self.tensors if 'time_mlp' in key]:
            base, _, kind = name.rpartition('.')
            self.arrays[f'{base}/{"kernel" if kind == "weight" else "bias"}'] = (
                self.take(name).T if kind == 'weight' else self.take(name))
        return self.arrays


def write_orbax(params, arrays, *, packed, suffix, dtype='float32'):
    """Store arrays as orbax does: zarr, in one OCDBT database or in a folder each."""
    tensorstore = pytest.importorskip('tensorstore')
    base = params.resolve().as_uri() + '/'
    for path, array in arrays.items():
        name = 'params.' + path.replace('/', '.') + suffix + '/'
        kvstore = {'driver': 'ocdbt', 'base': base, 'path': name} if packed else base + name
        made = tensorstore.open({'driver': 'zarr', 'kvstore': kvstore}, create=True, dtype=dtype,
                                shape=array.shape).result()
        made.write(array.astype(made.dtype.numpy_dtype)).result()


@pytest.fixture
def jax_folder(folders, tmp_path):
    """A JAX checkpoint with the weights of a stored comparison, and its statistics."""

    def make(name, **how):
        source, folder = folders(name), tmp_path / 'jax'
        tensors = load_file(str(source / 'model.safetensors'))
        (folder / 'params').mkdir(parents=True)
        write_orbax(folder / 'params', Flax(tensors).all(), **how)
        stats = load_file(str(next(source.glob('*_normalizer_processor.safetensors'))))
        (folder / 'assets' / 'robot').mkdir(parents=True)
        (folder / 'assets' / 'robot' / 'norm_stats.json').write_text(json.dumps({'norm_stats': {
            ours: {k: stats[f'{theirs}.{k}'].tolist() for k in ('mean', 'std', 'q01', 'q99')}
            for ours, theirs in (('state', 'observation.state'), ('actions', 'action'))}}))
        return source, folder

    return make


@with_tensorstore
@pytest.mark.parametrize(('name', 'how'), [
    ('pi05_lerobot', {'packed': True, 'suffix': '.value'}),
    ('pi05_lerobot', {'packed': False, 'suffix': ''}),
    ('pi0_lerobot', {'packed': True, 'suffix': ''}),
])
def test_every_tensor_comes_out_bit_for_bit_and_is_served(
        name, how, jax_folder, stored, tmp_path):
    source, folder = jax_folder(name, **how)
    out = tmp_path / 'out'
    assert main(['convert', str(folder), '--out', str(out)]) == 0
    expected = {key.removeprefix('model.'): value
                for key, value in load_file(str(source / 'model.safetensors')).items()}
    made = load_file(str(out / 'model.safetensors'))
    heads = {key for key in expected if 'lm_head' in key}
    assert set(made) == set(expected) - heads
    assert all(torch.equal(made[key], expected[key]) for key in made)
    shutil.copy(source / 'tokenizer.json', out)
    case = replace(CASES[name], model={**CASES[name].model, 'statistics': 'robot'})
    chunk = case.ours(out)
    assert np.isfinite(chunk).all()
    if name == 'pi05_lerobot':  # pi0's prompt differs between lerobot and openpi
        assert relative_error(chunk, np.array(stored(name)['chunk'])) < 1e-4


@with_tensorstore
def test_values_in_bfloat16_keep_their_bits(jax_folder, tmp_path):
    source, folder = jax_folder('pi05_lerobot', packed=True, suffix='.value', dtype='bfloat16')
    main(['convert', str(folder), '--out', str(tmp_path / 'out')])
    made = load_file(str(tmp_path / 'out' / 'model.safetensors'))
    whole = load_file(str(source / 'model.safetensors'))
    key = 'action_in_proj.weight'
    assert made[key].dtype == torch.bfloat16
    assert torch.equal(made[key], whole[f'model.{key}'].to(torch.bfloat16))


@with_tensorstore
def test_an_array_that_pi_has_not_is_named_and_nothing_is_written(jax_folder, tmp_path, capsys):
    _, folder = jax_folder('pi05_lerobot', packed=True, suffix='')
    strange = {'PaliGemma/llm/layers/attn/q_einsum/lora_a': np.ones((2, 2), 'f')}
    write_orbax(folder / 'params', strange, packed=True, suffix='')
    assert main(['convert', str(folder), '--out', str(tmp_path / 'out')]) == 2
    assert 'lora_a' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_without_tensorstore_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorstore', None)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    (tmp_path / 'params').mkdir()
    assert main(['convert', str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
    assert 'pip install tensorstore' in capsys.readouterr().err


def test_a_folder_without_params_is_refused(tmp_path, capsys):
    assert main(['convert', str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
    assert 'has no params/' in capsys.readouterr().err
