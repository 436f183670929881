# SPDX-License-Identifier: Apache-2.0
"""Times of layers: what is counted, what is measured, and what a file may hold."""

import json

import pytest
import torch

from quantvla_ros.kernels import dispatch
from quantvla_ros.quant import times
from quantvla_ros.quant.layout import lay_out
from quantvla_ros.quant.scheme import parse_scheme
from quantvla_ros.quant.sites import LinearSite, PolicySites
from quantvla_ros.quant.times import Times, measure_times, read_times, watch_work

SITES = PolicySites((
    LinearSite('a.q_proj', 'backbone_attention', 64, 64, False),
    LinearSite('a.k_proj', 'backbone_attention', 64, 32, False),
    LinearSite('down_proj', 'backbone_mlp', 128, 64, False),
), (), ())
LAYOUT = lay_out(SITES, ('backbone_attention', 'backbone_mlp'), parse_scheme('w4a8'))


def test_calls_of_a_chunk_are_counted_by_their_tokens():
    net = torch.nn.ModuleDict({'one': torch.nn.Linear(8, 4), 'two': torch.nn.Linear(8, 4)})

    def run():
        net['one'](torch.zeros(2, 3, 8))
        for _ in range(5):
            net['one'](torch.zeros(7, 8))

    assert watch_work(net, ['one', 'two'], run) == {'one': {6: 1, 7: 5}, 'two': {}}


def test_layers_that_read_one_input_are_timed_as_one_product(monkeypatch):
    asked = []

    def pretend(columns, rows, tokens, act_bits):
        asked.append((columns, rows, tokens, act_bits))
        return {2: 1.0, 4: 2.0, 8: 3.0}

    monkeypatch.setattr(times, 'layer_ms', pretend)
    monkeypatch.setattr(dispatch, 'library', lambda: 'some')
    monkeypatch.setattr(dispatch, 'threads', lambda: 1)
    work = {'a.q_proj': {20: 1}, 'a.k_proj': {20: 1}, 'down_proj': {16: 10, 1: 1}}
    found = measure_times(SITES, LAYOUT, work)
    assert asked == [(64, 96, 20, 8), (128, 64, 16, 8), (128, 64, 1, 8)]
    assert list(found.ms.values()) == [{2: 1.0, 4: 2.0, 8: 3.0}, {2: 11.0, 4: 22.0, 8: 33.0}]
    assert found.equal(3) == found.equal(4) == 24.0  # codes of 3 bits are stored as 4


def test_a_larger_layer_takes_longer():
    small, large = (times.layer_ms(64 * n, 64 * n, 64, 8, seconds=0.005) for n in (1, 16))
    assert set(small) == {2, 4, 8}
    assert all(0 < small[width] < large[width] for width in small)


def test_nothing_is_timed_without_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, 'library', lambda: None)
    with pytest.raises(ValueError, match='nothing to time'):
        measure_times(SITES, LAYOUT, {})


def test_times_come_back_from_their_file(tmp_path):
    made = Times({'a.qkv/64': {2: 0.5, 4: 1.0, 8: 2.0}}, 'avx2', 2, 'some processor')
    made.write(tmp_path / 'robot' / 'times.json')
    assert read_times(tmp_path / 'robot' / 'times.json') == made


@pytest.mark.parametrize('change', [
    lambda d: d.update(format=2), lambda d: d.pop('ms'), lambda d: d.update(more=1),
    lambda d: d.update(ms={'a': {'4': 0.0}}), lambda d: d.update(ms={'a': {'4': float('nan')}}),
    lambda d: d.update(ms=[1]),
])
def test_a_file_of_something_else_is_refused(tmp_path, change):
    path = tmp_path / 'times.json'
    Times({'a': {4: 1.0}}, 'avx2', 2, 'some').write(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r'times\.json holds'):
        read_times(path)
    with pytest.raises(FileNotFoundError, match='leave --times out'):
        read_times(tmp_path / 'none.json')
