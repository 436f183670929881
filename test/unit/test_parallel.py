# SPDX-License-Identifier: Apache-2.0
"""Tasks on processes: results, failures and deaths, none of which ends the others."""

import math
import operator
import os
from functools import partial

import pytest

from quantvla_ros.parallel import Failed, Task, run_tasks

ROOT = Task('root', partial(math.sqrt, 4.0))
WRONG = Task('wrong', partial(math.sqrt, -1.0))
BROKEN = Task('broken', partial(operator.truediv, 1, 0))
DEADLY = Task('deadly', partial(os._exit, 3))


def results(tasks, workers, start=None):
    return {task.name: found for task, found in run_tasks(tasks, workers, start)}


@pytest.mark.parametrize('workers', [1, 2])
def test_a_task_that_fails_is_told_with_its_cause(workers):
    found = results([WRONG, BROKEN, ROOT], workers)
    assert found['root'] == 2.0
    assert found['wrong'].cause == f'ValueError: {found["wrong"].sentence}'
    assert found['broken'].cause == 'ZeroDivisionError: division by zero'
    assert not found['broken'].sentence  # nothing that the user could mend


def test_a_process_that_dies_is_replaced():
    others = [Task(f'root {n}', partial(math.sqrt, n)) for n in (1.0, 4.0, 9.0)]
    found = results([DEADLY, *others], 2)
    assert found.pop('deadly') == Failed('its process ended with exit code 3')
    assert sorted(found.values()) == [1.0, 2.0, 3.0]


def test_each_process_is_started_with_its_number():
    number = Task('number', partial(os.getenv, 'QUANTVLA_TEST_NUMBER'))
    again = Task('again', partial(os.getenv, 'QUANTVLA_TEST_NUMBER'))
    assert set(results([number, again], 2, _remember).values()) <= {'0', '1'}


def _remember(number):
    os.environ['QUANTVLA_TEST_NUMBER'] = str(number)
