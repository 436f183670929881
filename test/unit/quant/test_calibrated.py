# SPDX-License-Identifier: Apache-2.0
"""A calibration multiplies stored scales, is read with proof, and leaves without a trace."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantvla_ros.kernels.weights import dequantize
from quantvla_ros.quant.artifact import ArtifactError, Provenance, read_artifact, write_artifact
from quantvla_ros.quant.calibrated import (
    DOCUMENT,
    FOLDER,
    TENSORS,
    Calibration,
    calibration_names,
    load_calibration,
    read_calibration,
    write_calibration,
)
from quantvla_ros.quant.evidence import ErrorFigures, Evidence
from quantvla_ros.quant.linear import QuantizedLayer
from quantvla_ros.quant.pack import absmax_scale, packed, quantize
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.sites import AttentionSite, LinearSite, PolicySites

W4 = parse_scheme('w4a8')
EVIDENCE = Evidence(4, ErrorFigures(0.004, 0.01, 0.02), ErrorFigures(0.002, 0.005, 0.01),
                    ErrorFigures(0.001, 0.004, 0.008))
SITES = PolicySites(
    (LinearSite('q', 'action_attention', 64, 8, True),
     LinearSite('o', 'action_attention', 8, 64, False)),
    (AttentionSite('attn', 'q', 'o', 2, 4, True, True),), (),
)


def layer(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    scale = absmax_scale(w, 4, W4.weight)
    return QuantizedLayer(W4, packed(quantize(w, scale, 4, W4.weight), scale, 4, W4.weight),
                          torch.randn(rows, generator=torch.Generator().manual_seed(seed + 1)))


@pytest.fixture
def folder(tmp_path):
    layers = {'q': layer(8, 64, 0), 'o': layer(64, 8, 5)}
    write_artifact(tmp_path / 'w4a8', layers, Provenance('c' * 64, 'rtn', 'w4a8'))
    return tmp_path / 'w4a8'


@pytest.fixture
def artifact(folder):
    return read_artifact(folder)


def calibration(of, **changes):
    made = Calibration(
        of.sha256, 'c' * 64, 'w4a8', EVIDENCE,
        alpha={'attn': torch.tensor([1.25, 0.8])}, beta={'attn': torch.tensor([1.1])},
        activations={'q': torch.tensor([1.0, 2.0, 3.0])},
        logits={'attn': torch.tensor([0.5, 0.6, 0.9])},
        provenance={'bag': 'b', 'seed': 3},
    )
    return replace(made, **changes)


def written(folder, made, name='robot'):
    write_calibration(folder / FOLDER / name, made)
    return folder / FOLDER / name


def test_what_is_written_is_read_to_the_bit(folder, artifact):
    made = calibration(artifact, layers={'q': layer(8, 64, 9)})
    found = read_calibration(written(folder, made), artifact)
    for part in ('alpha', 'beta', 'activations', 'logits'):
        one, other = getattr(found, part), getattr(made, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert found.evidence == EVIDENCE
    assert found.provenance == made.provenance
    assert torch.equal(found.layers['q'].weight.data, made.layers['q'].weight.data)


def test_factors_multiply_rows_and_bias_and_leave_the_artifact_alone(folder, artifact):
    before = dequantize(artifact.layers['q'].weight)
    found = read_calibration(written(folder, calibration(artifact)), artifact)
    applied = found.applied(artifact.layers, SITES)
    factors = torch.tensor([1.25] * 4 + [0.8] * 4)
    weight, bias = applied['q'].folded()
    torch.testing.assert_close(dequantize(weight), before * factors[:, None])
    torch.testing.assert_close(bias, artifact.layers['q'].bias * factors)
    torch.testing.assert_close(applied['o'].folded()[1], artifact.layers['o'].bias * 1.1)
    assert torch.equal(dequantize(artifact.layers['q'].folded()[0]), before)


def test_factors_join_those_of_the_artifact(artifact):
    layers = {**artifact.layers, 'o': replace(artifact.layers['o'], fold=torch.full((64,), 2.0))}
    applied = calibration(artifact).applied(layers, SITES)
    torch.testing.assert_close(applied['o'].fold, torch.full((64,), 2.2))


def test_factors_reach_a_linear_that_stayed_in_float(artifact):
    net = torch.nn.ModuleDict({'q': torch.nn.Linear(64, 8), 'o': torch.nn.Linear(8, 64)})
    weight, bias = net['q'].weight.detach().clone(), net['q'].bias.detach().clone()
    calibration(artifact).scale_float(net, {'o': artifact.layers['o']}, SITES)
    factors = torch.tensor([1.25] * 4 + [0.8] * 4)
    torch.testing.assert_close(net['q'].weight.detach(), weight * factors[:, None])
    torch.testing.assert_close(net['q'].bias.detach(), bias * factors)


def test_refitted_layers_stand_in_for_stored_ones(artifact):
    refitted = layer(8, 64, 9)
    applied = calibration(artifact, alpha={}, layers={'q': refitted}).applied(
        artifact.layers, SITES)
    assert torch.equal(applied['q'].weight.data, refitted.weight.data)


def test_writing_twice_gives_the_same_bytes(folder, artifact):
    made = calibration(artifact, layers={'q': layer(8, 64, 9)})
    one, other = written(folder, made, 'one'), written(folder, made, 'other')
    files = sorted(p.relative_to(one) for p in one.rglob('*') if p.is_file())
    assert len(files) == 4
    assert all((one / f).read_bytes() == (other / f).read_bytes() for f in files)


def test_newest_is_the_last_one_of_this_artifact(folder, artifact):
    for number, name in enumerate(('old', 'new')):
        path = written(folder, calibration(artifact), name)
        os.utime(path / DOCUMENT, (number, number))
    stranger = written(folder, calibration(artifact, artifact='f' * 64), 'stranger')
    os.utime(stranger / DOCUMENT, (9, 9))
    assert calibration_names(folder) == ['stranger', 'new', 'old']
    assert load_calibration(folder, 'newest', artifact)[0] == 'new'
    assert load_calibration(folder, '', artifact) == ('', None)


def test_newest_is_none_where_there_is_none(folder, artifact):
    assert load_calibration(folder, 'newest', artifact) == ('', None)


def change(key, value):
    def do(path):
        document = json.loads((path / DOCUMENT).read_text())
        document[key] = value
        (path / DOCUMENT).write_text(json.dumps(document))
    return do


def truncate(name):
    def do(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])
    return do


def retensor(path):
    tensors = load_file(path / TENSORS)
    tensors['alpha/attn'] += 0.1
    save_file(tensors, path / TENSORS)


def edit_evidence(path):
    document = json.loads((path / DOCUMENT).read_text())
    document['evidence']['after']['mean_rad'] = 0.0
    (path / DOCUMENT).write_text(json.dumps(document))


DAMAGES = {
    'truncated tensors': (truncate(TENSORS), 'truncated or was changed'),
    'truncated document': (truncate(DOCUMENT), 'is damaged'),
    'other tensors': (retensor, 'truncated or was changed'),
    'edited evidence': (edit_evidence, 'was changed after it was written'),
    'unknown key': (change('surprise', 1), "unknown \\['surprise'\\]"),
    'another format': (change('format', 9), 'has format 9'),
    'no tensors': (lambda path: (path / TENSORS).unlink(), 'lacks'),
    'no document': (lambda path: (path / DOCUMENT).unlink(), 'is not beside'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_calibration_is_refused_with_a_sentence(folder, artifact, damage):
    path = written(folder, calibration(artifact))
    do, sentence = DAMAGES[damage]
    do(path)
    with pytest.raises(ArtifactError, match=sentence):
        load_calibration(folder, 'robot', artifact)


def test_refitted_layers_that_were_exchanged_are_refused(folder, artifact):
    path = written(folder, calibration(artifact, layers={'q': layer(8, 64, 9)}))
    write_artifact(path / 'layers', {'q': layer(8, 64, 10)}, Provenance('c' * 64, 'x', 'w4a8'))
    with pytest.raises(ArtifactError, match='is not what calibration.json describes'):
        read_calibration(path, artifact)


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'artifact': 'f' * 64}, 'was made for artifact ffff'),
    ({'checkpoint': 'f' * 64}, 'was made for checkpoint ffff'),
])
def test_a_calibration_of_something_else_is_refused(folder, artifact, changes, sentence):
    path = written(folder, calibration(artifact, **changes))
    with pytest.raises(ArtifactError, match=sentence):
        read_calibration(path, artifact)


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'alpha': {'attn': torch.tensor([1.0, float('nan')])}}, 'not finite'),
    ({'alpha': {'attn': torch.tensor([1.0, -1.0])}}, 'not positive'),
    ({'activations': {'q': torch.ones(2)}}, 'expected \\(3,\\)'),
])
def test_nonsense_is_never_written(folder, artifact, changes, sentence):
    with pytest.raises(ArtifactError, match=sentence):
        written(folder, calibration(artifact, **changes))
    assert calibration_names(folder) == []


@pytest.mark.parametrize(('changes', 'sentence'), [
    ({'alpha': {'attn': torch.ones(3)}}, 'has 2 heads'),
    ({'beta': {'elsewhere': torch.ones(1)}}, "attention 'elsewhere'"),
])
def test_factors_that_do_not_fit_the_policy_are_refused(artifact, changes, sentence):
    with pytest.raises(ArtifactError, match=sentence):
        calibration(artifact, **changes).applied(artifact.layers, SITES)


def test_an_unknown_name_lists_those_there_are(folder, artifact):
    written(folder, calibration(artifact), 'kitchen')
    with pytest.raises(ArtifactError, match='there are: kitchen'):
        load_calibration(folder, 'robot', artifact)


def gone_process():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_what_a_killed_process_left_is_cleared_by_the_next_run(folder, artifact):
    left = folder / FOLDER / f'.robot.{gone_process()}'
    left.mkdir(parents=True)
    (left / TENSORS).write_text('half')
    assert calibration_names(folder) == []
    written(folder, calibration(artifact))
    assert not left.exists()
    assert calibration_names(folder) == ['robot']


def test_the_old_one_survives_a_writer_that_fails(folder, artifact, monkeypatch):
    path = written(folder, calibration(artifact))
    before = (path / DOCUMENT).read_bytes()

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('quantvla_ros.quant.calibrated.save_file', full)
    with pytest.raises(OSError, match='No space'):
        written(folder, calibration(artifact, alpha={}))
    assert (path / DOCUMENT).read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ['robot']


def test_the_only_copy_of_a_killed_exchange_is_put_back(folder, artifact):
    path = written(folder, calibration(artifact))
    path.rename(path.with_name(f'.robot.old.{gone_process()}'))
    with pytest.raises(ArtifactError, match='nothing was written'):
        written(folder, calibration(artifact, alpha={'attn': torch.zeros(2)}))
    written(folder, calibration(artifact))
    assert [p.name for p in path.parent.iterdir()] == ['robot']
