# SPDX-License-Identifier: Apache-2.0
"""The one parameter table against the YAML file, the README, the settings and a declared node."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from quantvla_ros.contract import load_contract
from quantvla_ros.control.guard import GuardSettings
from quantvla_ros.control.player import PlayerSettings
from quantvla_ros.nodes import parameters
from quantvla_ros.nodes.drift import DriftSettings
from quantvla_ros.nodes.parameters import CONFIGURE, POLICY_NODE, Parameter, check, defaults
from quantvla_ros.resources import share_path

ROOT = Path(__file__).resolve().parents[3]
BEGIN, END = '<!-- parameters:begin -->', '<!-- parameters:end -->'


def flat(tree, prefix=''):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def test_yaml_file_holds_every_parameter_at_its_default():
    text = share_path('config/policy_node.yaml').read_text()
    values = dict(flat(yaml.safe_load(text)['/**']['ros__parameters']))
    assert values == defaults()
    assert {k: type(v) for k, v in values.items()} == {p.name: p.type for p in POLICY_NODE}
    assert text == parameters.yaml_text(), 'write it again with parameters.yaml_text()'


def test_readme_holds_the_table():
    readme = ROOT / 'README.md'
    if not readme.is_file() or BEGIN not in readme.read_text():
        pytest.skip('README.md has no parameter table yet')
    block = readme.read_text().partition(BEGIN)[2].partition(END)[0]
    assert block.strip() == parameters.markdown().strip()


def test_every_default_passes_its_own_check():
    assert check(defaults()) == []


def test_names_are_all_different_and_snake_case():
    names = [parameter.name for parameter in POLICY_NODE]
    assert len(set(names)) == len(names)
    assert all(name == name.lower() and '-' not in name for name in names)


def test_every_number_has_a_range_and_every_parameter_a_meaning():
    for parameter in POLICY_NODE:
        if parameter.type in (int, float):
            assert parameter.low is not None, parameter.name
            assert parameter.high is not None, parameter.name
        assert parameter.description.endswith('.'), parameter.name


@pytest.mark.parametrize(('kind', 'group'), [
    (GuardSettings, 'guard'), (PlayerSettings, 'player'), (DriftSettings, 'drift'),
])
def test_defaults_are_those_of_the_control_core(kind, group):
    core = kind()
    for item in fields(kind):
        assert defaults()[f'{group}.{item.name}'] == getattr(core, item.name), item.name


@pytest.mark.parametrize(('name', 'value', 'words'), [
    ('steps', 1.5, 'expected a int'), ('steps', True, 'expected a int'),
    ('steps', 101, 'expected 0 to 100'), ('limits.speed_scale', float('nan'), 'finite'),
    ('limits.speed_scale', 1.01, 'expected 0 to 1'), ('device', 'tpu', 'one of cpu, cuda'),
    ('dry_run', 'yes', 'expected a bool'), ('guard.hold_s', -0.1, 'expected 0 to 60 s'),
])
def test_bad_value_gives_a_sentence_with_name_value_and_what_is_allowed(name, value, words):
    sentence, = check({name: value})
    assert name in sentence
    assert repr(value) in sentence
    assert words in sentence


def test_a_set_is_checked_as_a_whole():
    assert len(check({'steps': -1, 'device': 'tpu', 'seed': 1})) == 2


def test_only_live_parameters_change_while_a_policy_is_loaded():
    for parameter in POLICY_NODE:
        problems = check({parameter.name: parameter.default}, loaded=True)
        assert bool(problems) is (parameter.when == CONFIGURE)


def test_parameters_of_rclpy_are_left_to_rclpy():
    assert check({'use_sim_time': True}) == []


def test_descriptor_carries_range_meaning_and_read_only():
    found = parameters.descriptor(
        Parameter('a', 0.5, 's', parameters.START, 'Wait.', 0.0, 1.0))
    assert found.read_only
    assert found.description == 'Wait. [s]'
    assert found.floating_point_range[0].to_value == 1.0
    choice = Parameter('b', 'x', '', CONFIGURE, 'Choose.', allowed=('x', 'y'))
    assert 'one of x, y' in parameters.descriptor(choice).additional_constraints


def test_shipped_contract_is_the_default():
    assert load_contract(defaults()['contract']).policy == 'libero_panda'
