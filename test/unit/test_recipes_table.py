# SPDX-License-Identifier: Apache-2.0
"""The table of recipes: who is marked, what is counted, where success comes from."""

import json
from dataclasses import replace

import pytest

from quantvla_ros.bench.recipes import ablation
from quantvla_ros.bench.recipes_cells import Cells, Row, fingerprint
from quantvla_ros.bench.recipes_report import matrix, read_success, table
from quantvla_ros.quant.recipes import RECIPES


def row(recipe, mean, precision='w4a4', nbytes=1_000_000):
    return {'model': 'policy', 'recipe': recipe, 'precision': precision, 'mean_mrad': mean,
            'p95_mrad': 2 * mean, 'few_mrad': 3 * mean, 'gripper': 0.01, 'nbytes': nbytes}


def test_least_error_of_a_precision_is_marked_and_simulations_do_not_compete():
    text = table([row('rtn', 3.0), row('gptq', 2.0), row('literal', 1.0, nbytes=0),
                  row('awq', 1.5, 'w8a8'), row('another noise seed', 0.1, 'float')])
    assert text.count('**2.00**') == 1 and '**1.50**' in text
    assert '**1.00**' not in text and '**0.10**' not in text


def test_matrix_has_recipes_down_and_precisions_across():
    rows = [row('another noise seed', 0.5, 'float'), row('rtn', 3.0), row('rtn', 0.3, 'w8a8'),
            row('gptq', 2.0), row('literal', 1.0, nbytes=0)]
    lines = matrix(rows, 'mean_mrad').splitlines()
    assert lines[2] == '| recipe | w4a4 | w8a8 |'
    assert '| another noise seed | 0.50 | 0.50 |' in lines
    assert '| rtn | 3.00 | **0.30** |' in lines
    assert '| gptq | **2.00** |  |' in lines and '| literal | 1.00 |  |' in lines
    assert '| rtn | 1.00 | 1.00 |' in matrix(rows, 'nbytes')


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


def test_success_is_read_from_reports_by_the_name_of_the_artifact(tmp_path):
    path = tmp_path / 'report.json'
    rates = {'successes': 9, 'trials': 10}
    variants = {'w4a8': {'all': rates}, 'models/x/rtn-w4a4': {'all': rates}}
    path.write_text(json.dumps({'variants': variants}))
    found = read_success([path])
    assert found == {('onboard', 'w4a8'): '9/10', ('rtn', 'w4a4'): '9/10'}
    assert '| 9/10 |' in table([row('rtn', 3.0)], found)


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / 'report.json'
    path.write_text('{}')
    with pytest.raises(ValueError, match='not a report'):
        read_success([path])


def test_ablation_has_every_layout_without_and_with_matching():
    names = {recipe.name for recipe in ablation()}
    for layout in ('backbone', 'action', 'full', 'selective'):
        assert {f'quantvla:{layout}', f'quantvla:{layout}+alpha+beta'} <= names
    assert 'quantvla:selective+alpha' in names
