# SPDX-License-Identifier: Apache-2.0
"""The table of recipes: who is marked, what is counted, where success comes from."""

import json

import pytest

from quantvla_ros.bench.recipes import ablation
from quantvla_ros.bench.recipes_report import read_success, table


def row(recipe, mean, precision='w4a4', nbytes=1_000_000):
    return {'model': 'policy', 'recipe': recipe, 'precision': precision, 'mean_mrad': mean,
            'p95_mrad': 2 * mean, 'gripper': 0.01, 'nbytes': nbytes}


def test_least_error_of_a_precision_is_marked_and_simulations_do_not_compete():
    text = table([row('rtn', 3.0), row('gptq', 2.0), row('literal', 1.0, nbytes=0),
                  row('awq', 1.5, 'w8a8'), row('another noise seed', 0.1, 'float')])
    assert text.count('**2.00**') == 1 and '**1.50**' in text
    assert '**1.00**' not in text and '**0.10**' not in text


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
