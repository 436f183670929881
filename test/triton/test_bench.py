# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench gpu` end to end at tiny sizes, so that the first real run dies of no typo."""

import argparse
import json

import numpy as np
import pytest
import torch

from quantvla_ros.bench import (
    gpu,
    gpu_chunk,
    gpu_estimate,
    gpu_gemm,
    gpu_profile,
    gpu_tune,
    gpu_ways,
)
from quantvla_ros.bench.gpu_policy import RandomPi05
from quantvla_ros.bench.gpu_source import Precision, RandomSource
from quantvla_ros.bench.gpu_time import Bench, Deadline
from quantvla_ros.contract import load_contract
from quantvla_ros.kernels.cuda import interpreted, tiles
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.resources import share_path

# a dry run says in the environment that kernels are interpreted, which no later test would undo
pytestmark = pytest.mark.skipif(
    not interpreted.active(), reason='dry runs are interpreted; on a card run the bench itself')


def arguments(tmp_path, *words):
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args([*words, '--dry', '--json', str(tmp_path / 'figures.json')])


@pytest.fixture
def bench():
    return Bench(torch.device('cpu'), True, True, Deadline(600))


def test_every_section_runs_and_keeps_its_figures(tmp_path, capsys, device, monkeypatch):
    monkeypatch.setattr(gpu_chunk, 'SETTINGS', (gpu_chunk.Setting('pi05', 3, 2),))
    monkeypatch.setattr(gpu_chunk, 'PRECISIONS',
                        (Precision('float'), Precision('w4a8', rotate=True)))
    words = ['--only', 'estimate,check,ceilings,attention,gemm,chunk,memory,ros,sanitize']
    assert gpu.run(arguments(tmp_path, *words)) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / 'figures.json').read_text())
    assert set(found) == {'card', *words[1].split(',')}
    assert 'times mean nothing' in printed and 'not run: needs a card' in printed
    assert all('us' in row and row['error']['w4a8'] < 1e-6 for row in found['gemm'])
    (rows,) = found['chunk'].values()
    assert {'float', 'w4a8 rotated', 'eager modules'} <= set(rows)
    assert not [row for row in rows.values() if 'missing' in row]
    assert rows['w4a8 rotated']['weights'] < 0.5 * rows['float']['weights']  # padded, float32


def test_failing_section_does_not_take_the_others_along(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_gemm, 'table', lambda *_: 1 / 0)
    assert gpu.run(arguments(tmp_path, '--only', 'gemm,estimate')) == 1
    found = json.loads((tmp_path / 'figures.json').read_text())
    assert found['gemm'] == {'failed': 'division by zero'} and found['estimate']
    assert 'failed: gemm' in capsys.readouterr().out


def test_tuning_writes_tiles_that_are_read_back(tmp_path, device, monkeypatch):
    monkeypatch.setattr(gpu_tune, 'DRY', ((5, 96, 256, ''),))
    args = arguments(tmp_path, '--tune', '--tiles', str(tmp_path / 'tiles.json'))
    assert gpu.run(args) == 0
    written = json.loads((tmp_path / 'tiles.json').read_text())
    (entry, *_) = written['interpreted']['tiles']
    problem = tiles.Problem(8, 5, 96, 256, 0, 256)
    found = tiles.choose(problem, tiles.Chip('interpreted', 4), written)
    assert list(vars(found).values()) == entry['tile']


def test_wrong_result_is_never_timed(bench, device, monkeypatch):
    exact = gpu_gemm.exact
    monkeypatch.setattr(gpu_gemm, 'exact', lambda *args: exact(*args) * 1.01)
    with pytest.raises(RuntimeError, match='off by'):
        gpu_gemm.ours((3, 64, 128), 'w8a8', bench)


def test_unknown_section_is_named(tmp_path):
    with pytest.raises(ValueError, match='--only names speed; known are estimate'):
        gpu.run(arguments(tmp_path, '--only', 'speed'))


def test_family_narrows_what_is_run(tmp_path, device):
    bench = gpu.make_bench(arguments(tmp_path, '--family', 'groot_n15'))
    assert {s.family for s in gpu_chunk.settings_of(bench)} == {'groot_n15'}
    assert [s.steps for s in gpu_chunk.first_of_each(bench)] == [4]
    assert [s.family for s in gpu_chunk.first_of_each(gpu.make_bench(arguments(tmp_path)))] == [
        'pi05', 'groot_n15']
    with pytest.raises(ValueError, match='--family names pi9; known are pi05, groot_n15'):
        gpu.make_bench(arguments(tmp_path, '--family', 'pi9'))


def test_estimate_counts_what_a_chunk_multiplies():
    found = gpu_estimate.products('pi05', 50, 10)
    operations = sum(2.0 * p.tokens * p.weights * p.times for p in found)
    # vision 635, backbone 3837 less the end of its last layer, expert 311 GFLOP
    assert 4.5e12 < operations < 4.8e12
    groot = gpu_estimate.products('groot_n15', 49, 4)
    # vision 423, backbone 677, context layers 226, blocks 219 with cross keys made once
    counted = sum(2.0 * p.tokens * p.weights * p.times for p in groot)
    assert counted == pytest.approx(1.545e12, rel=0.01)
    board = gpu_estimate.BOARDS[0]
    times = {name: gpu_estimate.seconds(found, board, name) for name in gpu_estimate.PRECISIONS}
    assert times['bfloat16'] > times['w8a8'] > times['w4a8'] > 0


def test_random_source_makes_every_layer_at_its_precision():
    source = RandomSource('pi05', Precision('w4a8', rotate=True), torch.device('cpu'),
                          torch.float32)
    down = source.linear('expert.layers.0.mlp.down_proj')
    assert down.scheme.name == 'w4a8' and down.transform.hadamard == 64
    assert source.linear('vision.layers.0.mlp.fc2').transform.hadamard == 0  # 4304 columns
    assert isinstance(source.linear('action_out'), torch.nn.Linear)
    assert abs(float(down.float_weight().std()) * 4096**0.5 - 1) < 0.2


def test_random_policy_computes_and_holds_the_arm(tmp_path, device):
    contract = load_contract(share_path('config/contracts/libero_panda.yaml'))
    log = tmp_path / 'log.jsonl'
    policy = RandomPi05(contract, PolicySettings(model=f'tiny-w8a8 0 {log}', device='cpu'))
    names = contract.camera_names
    stamp = 10**18
    observation = Observation(
        images={name: np.full((28, 28, 3), 9, np.uint8) for name in names},
        image_stamps_ns=dict.fromkeys(names, stamp), joint_names=contract.joints.names,
        joint_positions=np.zeros(len(contract.joints.names)), joint_stamp_ns=stamp,
        instruction='go')
    chunk = policy.denoise(policy.prepare(observation), 0)
    assert np.abs(chunk.positions).max() < 1e-5 and len(log.read_text().splitlines()) == 1


def test_ways_are_asked_for_by_name_and_reach_other_processes(tmp_path, capsys):
    assert gpu.run(arguments(tmp_path, '--only', 'estimate', '--ways', 'pair,raw')) == 0
    assert tiles.asked() == ['pair', 'raw'] and 'gate and up' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no such ways: speed'):
        gpu.run(arguments(tmp_path, '--only', 'estimate', '--ways', 'speed'))
    assert gpu.run(arguments(tmp_path, '--only', 'estimate')) == 0
    assert tiles.asked() == []


def test_fastest_set_of_ways_is_named(bench, device, monkeypatch, capsys):
    def measure(setting, precision, bench, early):
        if precision.scheme == 'float':
            return {'whole': 9.0, 'prefix': 4.0, 'loop': 5.0}
        if tiles.asked() == ['pair', 'raw', 'turn']:
            raise RuntimeError('too large')
        whole = 7.0 - ('turn' in tiles.asked()) + ('raw' in tiles.asked())
        return {'whole': whole, 'prefix': 3.0, 'loop': whole - 3.0}

    monkeypatch.setattr(gpu_chunk, 'measure', measure)
    monkeypatch.setattr(gpu_chunk, 'free', lambda: None)
    tiles.ask(['raw'])
    found = gpu_ways.compare(bench)
    printed = capsys.readouterr().out
    assert 'w8a8: fastest with turn' in printed and 'w4a8: fastest with turn' in printed
    assert 'the best bfloat16 takes 9.000 ms' in printed
    assert found['w8a8, pair turn raw, nothing early'] == {'missing': 'too large'}
    assert tiles.asked() == ['raw']  # what was asked for before
    tiles.ask(())


def test_tuning_covers_the_ways_that_are_asked_for(tmp_path, device, monkeypatch):
    monkeypatch.setattr(gpu_tune, 'DRY', (
        (5, 96, 256, 'pair'), (5, 96, 256, 'raw'), (5, 768, 256, 'turned')))
    words = ['--tune', '--tiles', str(tmp_path / 'tiles.json'), '--ways', 'all']
    (tmp_path / 'tiles.json').write_text(json.dumps({'interpreted': {
        'source': '', 'early': {}, 'ways': ['raw'], 'tiles': [], 'attention': []}}))
    assert gpu.run(arguments(tmp_path, *words)) == 0
    tiles.ask(())
    written = json.loads((tmp_path / 'tiles.json').read_text())['interpreted']
    assert {'w8a8-pair', 'w4a8-raw', 'w8a8-turned'} <= {e['kind'] for e in written['tiles']}
    assert written['ways'] == ['raw']  # what was decided before stays


def test_kernels_of_a_trace_are_put_together_by_name_and_grid():
    event = {'cat': 'kernel', 'name': 'product', 'dur': 4.0, 'args': {'grid': [2, 1, 1]}}
    other = {**event, 'args': {'grid': [8, 1, 1]}, 'dur': 1.0}
    rows = gpu_profile.grouped([event, other, event, {'cat': 'cpu_op', 'name': 'x'}], 2)
    assert [(row['grid'], row['calls'], row['us']) for row in rows] == [
        ('[2, 1, 1]', 1.0, 4.0), ('[8, 1, 1]', 0.5, 0.5)]
