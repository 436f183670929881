# SPDX-License-Identifier: Apache-2.0
"""The simulated robot's parameters: one table, one file."""

import yaml

from quantvla_ros.nodes.parameters import defaults, yaml_text
from quantvla_ros.resources import share_path
from quantvla_ros.sim.parameters import SIM_NODE, problems


def test_the_shipped_file_is_the_table():
    assert share_path('config/sim_node.yaml').read_text() == yaml_text(SIM_NODE)


def test_the_shipped_file_holds_every_default():
    tree = yaml.safe_load(share_path('config/sim_node.yaml').read_text())['/**']['ros__parameters']
    for name, value in defaults(SIM_NODE).items():
        node = tree
        for part in name.split('.'):
            node = node[part]
        assert node == value


def test_the_defaults_are_allowed():
    assert problems(defaults(SIM_NODE)) == []


def test_a_task_that_its_suite_lacks_is_refused_with_the_tasks_there_are():
    values = {**defaults(SIM_NODE), 'suite': 'libero_goal', 'task': 10}
    assert problems(values) == ['libero_goal has the tasks 0 to 9, not 10']


def test_task_89_of_the_largest_suite_is_allowed():
    assert problems({**defaults(SIM_NODE), 'suite': 'libero_90', 'task': 89}) == []
