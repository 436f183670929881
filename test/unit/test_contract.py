# SPDX-License-Identifier: Apache-2.0
"""A contract is checked as a whole and says what is wrong in sentences."""

import copy

import pytest
import yaml

from quantvla_ros.contract import ContractError, load_contract, parse_contract
from quantvla_ros.resources import share_path

SHIPPED = sorted(path.stem for path in share_path('config/contracts').glob('*.yaml'))


@pytest.fixture
def data():
    return copy.deepcopy(
        yaml.safe_load(share_path('config/contracts/libero_panda.yaml').read_text())
    )


@pytest.mark.parametrize('name', SHIPPED)
def test_every_shipped_contract_loads(name):
    contract = load_contract(name)
    assert contract.cameras and contract.action.joints


def test_topics_cover_every_input(data):
    topics = parse_contract(data).topics()
    assert topics['agentview/image_raw'] == 'sensor_msgs/msg/Image'
    assert topics['joint_states'] == 'sensor_msgs/msg/JointState'
    assert 'instruction' in topics


def test_all_problems_are_reported_at_once(data):
    data['cameras']['wrist']['width'] = -3
    data['action']['kind'] = 'velocity'
    data['colour'] = 'red'
    with pytest.raises(ContractError) as error:
        parse_contract(data)
    message = str(error.value)
    assert '3 problem(s)' in message
    assert 'cameras.wrist.width is -3' in message
    assert "action.kind is 'velocity'; expected one of absolute, delta" in message
    assert "colour is 'red'; expected no such field" in message


def change(data, path, value):
    *parents, last = path.split('.')
    for key in parents:
        data = data.setdefault(key, {})
    data[last] = value


@pytest.mark.parametrize(
    ('path', 'value', 'sentence'),
    [
        ('contract', 2, 'contract is 2'),
        ('cameras', {}, 'at least one camera'),
        ('cameras.wrist.encoding', 'jpeg', 'an encoding that'),
        ('cameras.wrist.encoding', '16UC1', 'one of rgb8'),
        ('cameras.wrist.topic', 'agentview/image_raw', 'a topic of its own'),
        ('joints.units', ['rad'], '9 of them'),
        ('joints.names', ['a', 'a'], 'all different'),
        ('action.execute', 17, 'at most the horizon'),
        ('action.horizon', True, 'a positive number'),
        ('action.joints', ['elbow', *'bcdefgh'], 'joints.names lacks'),
        ('controller.joints', ['panda_joint1'], 'in the order of the controller'),
        ('gripper.joint', 'thumb', 'expected one of action.joints'),
        ('gripper.open_position', 0.0, 'another value than closed_position'),
        ('limits', {'thumb': {'velocity': 1.0}}, 'expected joints of action.joints'),
        ('limits', {'panda_joint1': {'velocity': 0.0}}, 'a positive number'),
        ('limits', {'panda_joint1': {'lower': 1.0, 'upper': -1.0}}, 'less than upper'),
    ],
)
def test_a_wrong_field_is_named_with_its_value(data, path, value, sentence):
    change(data, path, value)
    with pytest.raises(ContractError, match=sentence):
        parse_contract(data)


def test_a_text_that_is_no_mapping_is_refused():
    with pytest.raises(ContractError, match='expected a mapping'):
        parse_contract({'contract': 1, 'robot': 'r', 'policy': 'p', 'cameras': 'front'})


def test_broken_yaml_is_refused_with_its_path(tmp_path):
    path = tmp_path / 'robot.yaml'
    path.write_text('a: [')
    with pytest.raises(ContractError, match=r'robot\.yaml is not YAML'):
        load_contract(path)


def test_an_unknown_contract_names_every_path_tried():
    with pytest.raises(FileNotFoundError, match=r'contracts/nowhere\.yaml'):
        load_contract('nowhere')


def test_limits_are_read_as_si_numbers(data):
    data['limits'] = {'panda_joint1': {'velocity': 1, 'lower': -1.5}}
    limits = parse_contract(data).limits['panda_joint1']
    assert limits.velocity == 1.0 and limits.lower == -1.5 and limits.upper is None
