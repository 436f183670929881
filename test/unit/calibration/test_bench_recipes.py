# SPDX-License-Identifier: Apache-2.0
"""The table of recipes is made end to end, on a tiny policy and its twin."""

import json

import pytest

from quantvla_ros.bench import recipes_work
from quantvla_ros.bench.recipes_subject import Subject
from quantvla_ros.cli import main


@pytest.fixture
def rows(model, frames_path, tmp_path):
    def make(*more):
        out = tmp_path / 'rows.json'
        status = main(['bench', 'recipes', '--model', str(model), '--frames', str(frames_path),
                       '--threads', '1', '--json', str(out), *more])
        assert status == 0
        return json.loads(out.read_text())['rows']

    return make


def test_policy_and_twin_meet_the_same_recipes(rows, capsys):
    rows('--precisions', 'w4a4,w8a8', '--recipes', 'rtn')
    found = rows('--precisions', 'w4a4', '--recipes', 'onboard,quantvla_first_batch')
    by_key = {(r['model'], r['recipe'], r['precision']): r for r in found}
    for model in ('policy', 'twin'):
        floor = by_key[model, 'another noise seed', 'float']['mean_mrad']
        wide, narrow = (by_key[model, 'rtn', p]['mean_mrad'] for p in ('w8a8', 'w4a4'))
        assert 0 < wide < narrow and wide < floor
        assert by_key[model, 'quantvla_first_batch', 'w4a4']['nbytes'] == 0
    assert by_key['twin', 'rtn', 'w4a4']['mean_mrad'] > by_key['policy', 'rtn', 'w4a4'][
        'mean_mrad']
    assert by_key['twin', 'onboard', 'w4a4']['mean_mrad'] < by_key['twin', 'rtn', 'w4a4'][
        'mean_mrad']
    assert by_key['policy', 'rtn', 'w4a4']['nbytes'] < by_key['policy', 'rtn', 'w8a8']['nbytes']
    assert '| recipe | policy w4a4 | twin w4a4 |' in capsys.readouterr().out


def test_a_second_run_measures_only_what_is_missing(rows, capsys):
    first = rows('--precisions', 'w4a4', '--recipes', 'rtn', '--models', 'policy')
    capsys.readouterr()
    both = rows('--precisions', 'w4a4', '--recipes', 'rtn,smoothquant', '--models', 'policy')
    assert [r for r in both if r['recipe'] != 'smoothquant'] == first
    said = capsys.readouterr().out.split('| model |')[0]
    assert 'smoothquant' in said and 'rtn' not in said
    rows('--precisions', 'w4a4', '--recipes', 'rtn', '--models', 'policy', '--redo', 'rtn')
    assert 'rtn' in capsys.readouterr().out.split('| model |')[0]
    assert rows('--show') == rows('--show', '--models', 'policy')
    shown = capsys.readouterr().out
    assert '| policy | smoothquant | w4a4 |' in shown and '| gptq |' not in shown


def test_tables_of_a_file_are_written_into_a_page_without_frames(rows, tmp_path):
    rows('--precisions', 'w4a4', '--recipes', 'rtn', '--models', 'policy')
    page = tmp_path / 'page.md'
    page.write_text(''.join(f'<!-- {n}:begin --><!-- {n}:end -->' for n in
                            ('mean', 'few', 'bytes')))
    shown = ['bench', 'recipes', '--show', '--json', str(tmp_path / 'rows.json')]
    assert main([*shown, '--write', str(page)]) == 0
    assert page.read_text().count('| rtn |') == 3
    assert main(['bench', 'recipes', '--json', str(tmp_path / 'rows.json')]) == 2


def test_ablation_measures_every_layout(rows):
    found = rows('--ablation', 'w4a8', '--precisions', '', '--models', 'policy')
    errors = {r['recipe']: r['mean_mrad'] for r in found if r['precision'] == 'w4a8'}
    assert len(errors) == 16 and all(name.startswith('quantvla:') for name in errors)
    assert errors['quantvla:backbone'] < errors['quantvla:full']


def test_two_processes_measure_what_one_does(rows, tmp_path, capsys, monkeypatch):
    # two threads for so small a network wait for each other, for long where a core is taken
    monkeypatch.setattr(recipes_work, 'PREPARING_THREADS', 1)
    few = ('--precisions', 'w4a4', '--recipes', 'rtn,gptq', '--models', 'twin')
    alone = {(r['model'], r['recipe']): r['mean_mrad'] for r in rows(*few)}
    (tmp_path / 'rows.json').unlink()
    capsys.readouterr()
    shared = {(r['model'], r['recipe']): r['mean_mrad'] for r in rows(*few, '--workers', '2')}
    assert shared == pytest.approx(alone, rel=1e-4)
    assert '2/2, 0.0 min left' in capsys.readouterr().out


def test_a_cell_that_fails_is_named_and_the_others_are_measured(
    model, frames_path, monkeypatch, capsys
):
    def broken(*_, **__):
        raise FloatingPointError('it was too much')

    monkeypatch.setattr(Subject, 'measure_literal', broken)
    assert main(['bench', 'recipes', '--model', str(model), '--frames', str(frames_path),
                 '--models', 'policy', '--precisions', 'w4a4',
                 '--recipes', 'omega_literal,rtn']) == 1
    said = capsys.readouterr().out
    assert 'not measured: policy w4a4 omega_literal: FloatingPointError: it was too much' in said
    assert '| policy | rtn | w4a4 | **' in said


def test_unknown_model_is_a_sentence(model, frames_path, capsys):
    assert main(['bench', 'recipes', '--model', str(model), '--frames', str(frames_path),
                 '--models', 'other']) == 2
    assert 'known are policy and twin' in capsys.readouterr().err
