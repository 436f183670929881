# SPDX-License-Identifier: Apache-2.0
"""Folders that are not whole refuse to load and say why; nothing stays at random values."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantvla_ros.bench.parity_case import CASES, relative_error
from quantvla_ros.policies.checkpoints import CheckpointError, DictSource, Stored, pickle_source
from quantvla_ros.policies.folders import identify
from quantvla_ros.policies.groot_folder import groot_network
from quantvla_ros.policies.pi_folder import pi_network
from quantvla_ros.policies.tokenizers import TokenizerError

PI = CASES['pi05_lerobot']


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder that a test may spoil."""

    def make(name):
        return shutil.copytree(folders(name), tmp_path / name)

    return make


def rewrite(folder, change):
    tensors = load_file(str(folder / 'model.safetensors'))
    change(tensors)
    save_file(tensors, str(folder / 'model.safetensors'))


def test_a_missing_tensor_is_named(copy):
    folder = copy('pi05_lerobot')
    rewrite(folder, lambda t: t.pop('model.action_out_proj.bias'))
    with pytest.raises(CheckpointError, match=r'1 missing: action_out\.bias'):
        PI.ours(folder)


def test_an_unexpected_tensor_is_named(copy):
    folder = copy('pi05_lerobot')
    rewrite(folder, lambda t: t.update({'model.adapter.weight': torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r'1 unexpected: model\.adapter\.weight'):
        PI.ours(folder)


def test_a_wrong_shape_is_named_with_both_shapes(copy):
    folder = copy('pi05_lerobot')
    rewrite(folder, lambda t: t.update({'model.time_mlp_in.weight': torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=r'time_mlp_in\.weight is \[3, 5\], expected \[16, '):
        PI.ours(folder)


def test_a_refused_model_holds_no_weights(folders):
    model = pi_network(identify(folders('pi05_lerobot')), 10).model
    with pytest.raises(CheckpointError):
        Stored(model, DictSource({}), lambda key: None, lambda key: False)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_part_is_read_alone_and_the_rest_stays_without_storage(folders):
    stored = pi_network(identify(folders('pi05_lerobot')), 10)
    stored.fill(only='backbone.layers.1.')
    held = {name for name, value in stored.model.state_dict().items() if not value.is_meta}
    assert held
    assert all(name.startswith('backbone.layers.1.') for name in held)


def test_a_missing_weights_file_is_named(copy):
    folder = copy('pi05_lerobot')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='not a complete checkpoint'):
        PI.ours(folder)


def test_a_missing_shard_is_named(copy):
    folder = copy('groot_n15_isaac')
    shard = sorted(folder.glob('model-*.safetensors'))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        CASES['groot_n15_isaac'].ours(folder)


def test_a_cut_file_is_refused(copy):
    folder = copy('pi05_lerobot')
    data = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match='copy it again'):
        PI.ours(folder)


def test_a_missing_statistics_file_is_named(copy):
    folder = copy('pi05_lerobot')
    name = next(folder.glob('*unnormalizer_processor.safetensors'))
    name.unlink()
    with pytest.raises(CheckpointError, match=name.name):
        PI.ours(folder)


def test_a_missing_tokenizer_says_where_users_get_it(copy):
    folder = copy('pi05_lerobot')
    (folder / 'tokenizer.json').unlink()
    with pytest.raises(TokenizerError, match='paligemma_tokenizer.model'):
        PI.ours(folder)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    (tmp_path / 'head.pt').write_bytes(pickle.dumps({'a': Boom()}, protocol=2))
    with pytest.raises(CheckpointError, match='more than tensors'):
        pickle_source(tmp_path / 'head.pt')
    assert not (tmp_path / 'ran').exists()


def test_a_jax_checkpoint_is_told_how_to_be_converted(tmp_path):
    (tmp_path / 'params').mkdir()
    with pytest.raises(CheckpointError, match='quantvla convert'):
        identify(tmp_path)


def test_openpi_names_and_statistics_give_the_chunk_of_the_same_lerobot_weights(
        folders, copy, stored, tmp_path):
    """The same network stored as openpi's converter does; guards of 1e-6 aside."""
    source = folders('pi05_lerobot')
    folder = tmp_path / 'openpi'
    folder.mkdir()
    tensors = load_file(str(source / 'model.safetensors'))
    embedding = 'paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight'
    renamed = {key.removeprefix('model.'): value for key, value in tensors.items()}
    head = 'paligemma_with_expert.paligemma.lm_head.weight'
    renamed[head] = renamed.pop(embedding)  # openpi stores the tied table once, as the head
    save_file(renamed, str(folder / 'model.safetensors'))
    shutil.copy(source / 'tokenizer.json', folder)
    stats = load_file(str(next(source.glob('*_normalizer_processor.safetensors'))))
    pick = lambda name: {k: stats[f'{name}.{k}'].tolist()  # noqa: E731
                         for k in ('mean', 'std', 'q01', 'q99')}
    (folder / 'assets' / 'robot').mkdir(parents=True)
    (folder / 'assets' / 'robot' / 'norm_stats.json').write_text(json.dumps({
        'norm_stats': {'state': pick('observation.state'), 'actions': pick('action')}}))
    case = replace(PI, model={**PI.model, 'statistics': 'robot'})
    theirs = np.array(stored('pi05_lerobot')['chunk'])
    assert identify(folder).format == 'openpi'
    assert relative_error(case.ours(folder), theirs) < 1e-4


def test_only_the_used_embodiment_is_held(folders):
    folder = identify(folders('groot_n15_isaac'))
    whole = sum(int(np.prod(shape)) for shape in folder.weights.shapes.values())
    chunks = []
    for slot in (31, 2):
        stored = groot_network(folder, 16, slot)
        stored.fill()
        model = stored.model
        chunks.append(model.state_encoder.fc1.weight)
        assert sum(p.numel() for p in model.parameters()) < whole / 2
    assert not torch.equal(*chunks)
