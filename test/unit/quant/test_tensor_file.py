# SPDX-License-Identifier: Apache-2.0
"""Safetensors files a tensor at a time: the same file as everybody's, or a refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantvla_ros.quant.tensor_file import Spool, TensorFile, TensorFileError, write_tensors

TENSORS = {
    'a.odd': torch.arange(7, dtype=torch.uint8),
    'b.wide': torch.arange(6, dtype=torch.int64).reshape(2, 3),
    'c.float': torch.linspace(-1, 1, 15).reshape(5, 3),
    'd.half': torch.linspace(-1, 1, 9).to(torch.bfloat16),
    'e.scalar': torch.tensor(2.5),
    'f.empty': torch.empty(4, 0),
    'g.true': torch.tensor([True, False]),
}
DESCRIBED = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.fixture
def path(tmp_path):
    write_tensors(tmp_path / 'x.safetensors', DESCRIBED, TENSORS.__getitem__)
    return tmp_path / 'x.safetensors'


def test_others_read_what_is_written_here(path):
    found = load_file(path)
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_what_others_wrote_is_read_here(tmp_path):
    save_file(TENSORS, tmp_path / 'y.safetensors')
    file = TensorFile(tmp_path / 'y.safetensors')
    assert set(file.entries) == set(TENSORS)
    for name, tensor in TENSORS.items():
        found = file.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def test_rows_are_read_alone_in_the_order_asked_for(path):
    file = TensorFile(path)
    assert torch.equal(file.rows('c.float', [4, 0, 4]), TENSORS['c.float'][[4, 0, 4]])
    with pytest.raises(IndexError, match='row 5 of 5'):
        file.rows('c.float', [5])


def test_a_spool_gives_back_what_it_took_and_leaves_no_file(tmp_path):
    spool = Spool(tmp_path)
    for name, tensor in TENSORS.items():
        spool.add(name, tensor)
    assert list(tmp_path.iterdir()) == []
    assert spool.described == DESCRIBED
    for name in reversed(TENSORS):
        assert torch.equal(spool.read(name), TENSORS[name])
    spool.close()


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    with pytest.raises(ValueError, match='was announced'):
        write_tensors(tmp_path / 'z', {'a': (torch.float32, (2,))}, lambda name: torch.ones(3))


@pytest.mark.parametrize('keep', [0, 5, 8, 40, -1])
def test_a_cut_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TensorFileError, match=r'x\.safetensors: '):
        TensorFile(path)


@pytest.mark.parametrize(('change', 'sentence'), [
    (lambda h: h['c.float'].update(dtype='F8_E4M3'), 'dtype F8_E4M3'),
    (lambda h: h['c.float'].update(shape=[5, 4]), r'takes 60 bytes for shape \[5, 4\]'),
    (lambda h: h.pop('g.true'), 'its header tells of'),
    (lambda h: h.pop('b.wide'), 'overlap or leave holes'),
    (lambda h: h['c.float'].pop('shape'), "'shape'"),
])
def test_a_header_that_does_not_fit_is_refused(path, change, sentence):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + length :])
    with pytest.raises(TensorFileError, match=sentence):
        TensorFile(path)


def test_a_file_that_shrinks_while_it_is_read_is_told(path):
    file = TensorFile(path)
    with path.open('r+b') as other:
        other.truncate(200)
    with pytest.raises(TensorFileError, match='became shorter'):
        file.read('g.true')
