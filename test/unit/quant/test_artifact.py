# SPDX-License-Identifier: Apache-2.0
"""An artifact is read with proof or refused with a sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantvla_ros.kernels.weights import mix
from quantvla_ros.quant import artifact as art
from quantvla_ros.quant.artifact import (
    JSON_NAME,
    TENSOR_NAME,
    ArtifactError,
    Provenance,
    read_artifact,
    read_provenance,
    sha256_of,
    write_artifact,
)
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.pack import absmax_scale, packed, quantize
from quantvla_ros.quant.scheme import PerRow, PerStep, Scheme, parse_scheme
from quantvla_ros.quant.sites import LinearSite, PolicySites
from quantvla_ros.quant.transforms import InputTransform

SOURCE = Provenance('a' * 64, 'rtn', 'w4a8', 'f' * 64, 7, '0.1.0', {'clip': 0.9}, {'seconds': 1.5})


def weight(rows, k, scheme, seed=0):
    w = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    scale = absmax_scale(w, scheme.weight_bits, scheme.weight)
    return packed(
        quantize(w, scale, scheme.weight_bits, scheme.weight),
        scale,
        scheme.weight_bits,
        scheme.weight,
    )


def layers():
    w4, w8 = parse_scheme('w4a8g64'), parse_scheme('w8a8')
    steps = Scheme(4, 4, PerRow(), PerStep())
    mixed = mix([(weight(4, 64, w8), torch.arange(4))], 8)
    return {
        'blocks.0.q': QuantizedLayer(
            w4, weight(8, 128, w4), torch.ones(8), InputTransform(torch.ones(128), hadamard=64),
            fold=torch.full((8,), 1.2),
        ),
        'blocks.0.o': QuantizedLayer(
            steps, weight(8, 64, steps), None,
            InputTransform(permutation=torch.arange(64), blocks=torch.eye(64)[None]),
            torch.linspace(0.1, 1.0, 10),
        ),
        'blocks.0.mlp': QuantizedLayer(w8, mixed),
    }


@pytest.fixture
def folder(tmp_path):
    write_artifact(tmp_path / 'w4a8', layers(), SOURCE)
    return tmp_path / 'w4a8'


def test_what_is_written_is_read_to_the_bit(folder):
    found = read_artifact(folder, 'a' * 64)
    assert found.provenance == SOURCE == read_provenance(folder)
    assert found.nbytes == sum(layer.nbytes for layer in layers().values())
    for name, layer in layers().items():
        again, other = art._describe(found.layers[name]), art._describe(layer)
        assert again[1] == other[1]
        assert all(torch.equal(again[0][key], other[0][key]) for key in other[0])


def test_writing_twice_gives_the_same_bytes(folder, tmp_path):
    write_artifact(tmp_path / 'again', layers(), SOURCE)
    for name in (JSON_NAME, TENSOR_NAME):
        assert (tmp_path / 'again' / name).read_bytes() == (folder / name).read_bytes()


def test_an_interrupted_write_leaves_the_old_artifact(folder, monkeypatch):
    before = sha256_of(folder / TENSOR_NAME)

    def full_disk(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(art, 'sha256_of', full_disk)
    with pytest.raises(OSError):
        write_artifact(folder, {}, SOURCE)
    assert [path.name for path in folder.parent.iterdir()] == ['w4a8']
    assert sha256_of(folder / TENSOR_NAME) == before


def test_a_truncated_file_is_refused(folder):
    path = folder / TENSOR_NAME
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match='truncated or was changed'):
        read_artifact(folder)


def test_one_flipped_bit_is_refused(folder):
    path = folder / TENSOR_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match='has hash'):
        read_artifact(folder)


def test_an_artifact_of_another_checkpoint_is_refused(folder):
    with pytest.raises(ArtifactError, match='quantize this model again'):
        read_artifact(folder, 'b' * 64)


def rewrite(folder, change):
    tensors = load_file(folder / TENSOR_NAME)
    document = json.loads((folder / JSON_NAME).read_text())
    change(tensors, document)
    save_file(tensors, folder / TENSOR_NAME)
    document['sha256'] = sha256_of(folder / TENSOR_NAME)
    (folder / JSON_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda t, d: t.pop('blocks.0.q/bias'), r"missing \['bias'\]"),
        (lambda t, d: t.update({'blocks.0.q/extra': torch.ones(1)}), r"unknown \['extra'\]"),
        (lambda t, d: t.update({'blocks.9.q/bias': torch.ones(1)}), 'belongs to no layer'),
        (lambda t, d: d['layers'].pop('blocks.0.mlp'), 'belongs to no layer'),
        (lambda t, d: t['blocks.0.q/part0.scales'].fill_(float('nan')), 'not finite'),
        (lambda t, d: t['blocks.0.q/fold'].fill_(float('inf')), 'not finite'),
        (
            lambda t, d: t.update({'blocks.0.q/part0.data': torch.zeros(8, 3, dtype=torch.uint8)}),
            'blocks.0.q.*data is',
        ),
        (
            lambda t, d: t.update({'blocks.0.q/part0.data': t['blocks.0.q/part0.data'].float()}),
            'blocks.0.q.*float32',
        ),
        (lambda t, d: t.update({'blocks.0.q/bias': torch.ones(9)}), 'bias has shape'),
        (lambda t, d: d.update(format=99), 'this version reads'),
        (lambda t, d: d['layers']['blocks.0.q'].update(weight_bits=5), 'weight_bits is 5'),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(folder, change, sentence):
    rewrite(folder, change)
    with pytest.raises(ArtifactError, match=sentence):
        read_artifact(folder)


def test_a_layer_of_another_shape_than_the_policys_is_refused(folder):
    def sites(rows):
        return PolicySites(
            (
                LinearSite('blocks.0.q', 'backbone_attention', 128, rows, True),
                LinearSite('blocks.0.o', 'backbone_attention', 64, 8, True),
                LinearSite('blocks.0.mlp', 'backbone_mlp', 64, 8, True),
            ),
            (),
            (),
        )

    assert read_artifact(folder, sites=sites(8))
    with pytest.raises(ArtifactError, match=r'has shape \(8, 128\), the policy \(9, 128\)'):
        read_artifact(folder, sites=sites(9))


def test_a_folder_that_is_no_artifact_says_so(tmp_path):
    with pytest.raises(ArtifactError, match='not an artifact'):
        read_artifact(tmp_path)


def test_damaged_json_is_refused(folder):
    (folder / JSON_NAME).write_text('{')
    with pytest.raises(ArtifactError, match='damaged'):
        read_artifact(folder)
