# SPDX-License-Identifier: Apache-2.0
"""The table of recipes: who is marked, what is counted, where success comes from."""

import json
from dataclasses import replace

import pytest

from quantvla_ros.bench.recipes import ablation
from quantvla_ros.bench.recipes_cells import Cells, Row, fingerprint
from quantvla_ros.bench.recipes_report import ablation as ablation_table
from quantvla_ros.bench.recipes_report import (
    against,
    details,
    matrix,
    success,
    tables,
    write_tables,
)
from quantvla_ros.quant.recipes import RECIPES


def row(recipe, mean, precision='w4a4', nbytes=1_000_000, model='policy'):
    return {'model': model, 'recipe': recipe, 'precision': precision, 'mean_mrad': mean,
            'p95_mrad': 2 * mean, 'few_mrad': 3 * mean, 'gripper': 0.01, 'nbytes': nbytes,
            'seconds': 1.0}


def test_least_error_of_a_precision_is_marked_and_simulations_do_not_compete():
    text = details([row('rtn', 3.0), row('gptq', 2.0), row('literal', 1.0, nbytes=0),
                    row('awq', 1.5, 'w8a8'), row('another noise seed', 0.1, 'float'),
                    row('quantvla:backbone', 0.2), row('alone', 7.0, 'w3a3', nbytes=0)])
    assert text.count('**2.00**') == 1 and '**1.50**' in text
    assert all(f'**{x}**' not in text for x in ('1.00', '0.10', '0.20', '7.00'))


def test_matrix_has_recipes_down_and_models_and_precisions_across():
    rows = [row('another noise seed', 0.5, 'float'), row('rtn', 3.0), row('rtn', 0.3, 'w8a8'),
            row('gptq', 2.0), row('literal', 1.0, nbytes=0), row('rtn', 9.0, model='twin'),
            row('quantvla:full', 0.1)]
    assert matrix(rows, 'mean_mrad').splitlines() == [
        '| recipe | policy w4a4 | policy w8a8 | twin w4a4 |',
        '| --- | --- | --- | --- |',
        '| another noise seed | 0.50 | 0.50 |  |',
        '| rtn | 3.00 | **0.30** | **9.00** |',
        '| gptq | **2.00** |  |  |',
        '| literal | 1.00 |  |  |',
    ]
    assert '| rtn | 1.00 | 1.00 | 1.00 |' in matrix(rows, 'nbytes')
    assert 'another noise seed' not in matrix(rows, 'few_mrad')


def test_ours_is_held_against_the_best_that_runs_on_integers():
    text = against([row('another noise seed', 8.0, 'float'), row('onboard', 2.0),
                    row('gptq', 4.0), row('awq', 5.0), row('literal', 1.0, nbytes=0)])
    assert text.splitlines()[-1] == (
        '| policy | w4a4 | 2.00 | 1.00 | gptq | 4.00 | 1.00 | 0.50 | 0.25 |')


def test_ablation_has_layouts_down_and_matchings_across():
    text = ablation_table([row('quantvla:full', 3.0), row('quantvla:full+alpha+beta', 2.0),
                           row('quantvla:backbone', 1.0), row('rtn', 7.0)])
    assert text.splitlines()[2:] == [
        '| policy | w4a4 | backbone | 1.00 | 1.00 |  |  |  |  |  |',
        '| policy | w4a4 | full | 1.00 | 3.00 | 2.00 |  |  |  |  |',
    ]


def made(recipe, made_by='a', mean=1.0):
    return Row('policy', recipe, 'w4a4', mean, 2.0, 3.0, 0.0, 10, 0.1, made_by)


def test_a_cell_is_found_again_unless_its_recipe_changed(tmp_path):
    Cells(tmp_path / 'cells.json', {'seed': 0}).add(made('rtn'))
    again = Cells(tmp_path / 'cells.json', {'seed': 0})
    assert again.find(('policy', 'rtn', 'w4a4'), 'a') == made('rtn')
    assert again.find(('policy', 'rtn', 'w4a4'), 'b') is None
    again.add(made('rtn', 'b', mean=4.0))
    assert Cells(tmp_path / 'cells.json', {'seed': 0}).rows == {
        ('policy', 'rtn', 'w4a4'): made('rtn', 'b', mean=4.0)}


def test_two_runs_share_one_file(tmp_path):
    one, two = (Cells(tmp_path / 'cells.json', {'seed': 0}) for _ in range(2))
    one.add(made('rtn'))
    two.add(made('gptq'))
    assert len(Cells(tmp_path / 'cells.json', {'seed': 0}).rows) == 2


def test_cells_of_other_frames_are_refused(tmp_path):
    Cells(tmp_path / 'cells.json', {'frames': 'x', 'seed': 0}).add(made('rtn'))
    with pytest.raises(ValueError, match='made with another frames'):
        Cells(tmp_path / 'cells.json', {'frames': 'y', 'seed': 0})
    (tmp_path / 'cells.json').write_text('[]')
    with pytest.raises(ValueError, match='holds no cells'):
        Cells(tmp_path / 'cells.json', {})


def test_words_of_a_recipe_do_not_change_its_fingerprint():
    recipe = RECIPES['gptq']
    assert fingerprint(recipe) == fingerprint(replace(recipe, differs='else'))
    assert fingerprint(recipe) != fingerprint(replace(recipe, group=64))


def report_file(path):
    def rate(solved):
        return {'all': {'successes': solved, 'trials': 10, 'low': 0.5, 'high': 1.0}}

    path.write_text(json.dumps({
        'variants': {'float': rate(10), 'runs/x/rtn-w4a4': rate(8)},
        'pairs': [{'first': 'float', 'second': 'runs/x/rtn-w4a4', 'pairs': 10,
                   'only_first': 3, 'only_second': 1, 'p': 0.625}]}))
    return path


def test_success_is_held_against_float_on_the_same_episodes(tmp_path):
    text = success({'twin': report_file(tmp_path / 'report.json')})
    first, second = text.splitlines()[2:]
    assert first == '| twin | float | 10/10 | 100.0 [50.0, 100.0] |  |  |  |  |'
    assert second.startswith('| twin | rtn-w4a4 | 8/10 | 80.0 [50.0, 100.0] | 3 | 1 | -20.00 [')
    assert second.endswith('| 0.625 |')


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / 'report.json'
    path.write_text('{}')
    with pytest.raises(ValueError, match='not a report'):
        success({'policy': path})
    with pytest.raises(FileNotFoundError, match='quantvla eval'):
        success({'policy': tmp_path / 'none.json'})


def test_tables_are_put_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- mean:begin -->\nold\n<!-- mean:end -->\nafter\n')
    found = tables([row('rtn', 3.0)], {})
    assert set(found) == {'mean', 'few', 'bytes'}
    write_tables(page, {'mean': found['mean']})
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('<!-- mean:end -->\nafter\n')
    assert '| rtn | **3.00** |' in text and 'old' not in text
    with pytest.raises(ValueError, match="no place for table 'few'"):
        write_tables(page, found)
    assert page.read_text() == text


def test_ablation_has_every_layout_without_and_with_matching():
    names = {recipe.name for recipe in ablation()}
    for layout in ('backbone', 'action', 'full', 'selective'):
        assert {f'quantvla:{layout}', f'quantvla:{layout}+alpha+beta'} <= names
    assert 'quantvla:selective+alpha' in names
