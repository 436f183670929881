# SPDX-License-Identifier: Apache-2.0
"""One description of the processes: launch files and `quantvla up` start the same."""

import importlib.util
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from quantvla_ros import graph as graphs
from quantvla_ros.executables import EXECUTABLES
from quantvla_ros.graph import GRAPHS, PROFILES, PROFILES_VARIABLE, RANGE_VARIABLE, graph_named
from quantvla_ros.processes import command_of, environment_of
from quantvla_ros.resources import share_path

FILES = {'robot': 'bringup', 'sim': 'sim', 'record': 'record', 'calibrate': 'calibrate'}
GIVEN = {
    'robot': {'namespace': 'left', 'precision': 'w4a8', 'speed_scale': '0.5', 'record': 'true',
              'use_sim_time': 'true', 'recorder': 'record_node', 'model': '007'},
    'sim': {'suite': 'libero_goal', 'task': '3', 'mode': 'lockstep', 'log_level': 'warn'},
    'record': {'recorder': 'ros2bag', 'bag': 'here', 'namespace': 'left'},
    'calibrate': {'bag': 'here', 'frames': '64', 'precision': 'w8a8', 'nice': '5'},
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (PROFILES_VARIABLE, RANGE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


# What launch_ros hands to a process, read back from the actions ------------------------------


@dataclass
class Action:
    """What stands for any class of launch in these tests: it keeps what it was made with."""

    args: tuple
    options: dict

    def __getattr__(self, name):
        return self.options[name]


def stand_in(name):
    def make(self, *args, **options):
        Action.__init__(self, args, options)
    return type(name, (Action,), {'__init__': make})


class Configuration(stand_in('LaunchConfiguration')):
    def perform(self, context):
        return context[self.args[0]]


@pytest.fixture
def stand_in_launch(monkeypatch):
    """Put recording stand-ins where launch and launch_ros would be imported from."""
    names = {
        'launch': ['LaunchContext', 'LaunchDescription'],
        'launch.actions': ['DeclareLaunchArgument', 'ExecuteProcess', 'OpaqueFunction',
                           'Shutdown'],
        'launch.substitutions': [],
        'launch_ros': [],
        'launch_ros.actions': ['Node'],
        'launch_ros.parameter_descriptions': ['ParameterValue'],
    }
    for module_name, classes in names.items():
        module = types.ModuleType(module_name)
        for name in classes:
            setattr(module, name, stand_in(name))
        monkeypatch.setitem(sys.modules, module_name, module)
    sys.modules['launch.substitutions'].LaunchConfiguration = Configuration
    monkeypatch.delitem(sys.modules, 'quantvla_ros.launching', raising=False)
    yield
    sys.modules.pop('quantvla_ros.launching', None)


def load(file):
    path = share_path(f'launch/{file}.launch.py')
    spec = importlib.util.spec_from_file_location('launch_file', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.generate_launch_description()


def plain(value):
    return value.args[0] if type(value).__name__ == 'ParameterValue' else value


def of_action(action):
    """What a launch action would start: program, node, parameters, remappings, variables."""
    if type(action).__name__ == 'ExecuteProcess':
        return {'command': action.cmd, 'env': action.additional_env,
                'required': 'on_exit' in action.options}
    *files, values = action.parameters
    return {
        'executable': action.executable, 'node': action.name,
        'namespace': action.namespace, 'files': files,
        'parameters': {name: plain(value) for name, value in values.items()},
        'remappings': dict(action.remappings), 'env': action.additional_env,
        'level': action.ros_arguments[1], 'required': 'on_exit' in action.options,
    }


def of_command(process):
    """The same, read from the command line that `quantvla up` runs."""
    words = command_of(process)
    added = {name: environment_of(process)[name] for name in process.environment}
    if process.command:
        return {'command': words, 'env': added, 'required': process.required}
    found = {'executable': words[words.index('-m') + 2], 'node': '', 'namespace': '', 'files': [],
             'parameters': {}, 'remappings': {}, 'env': added, 'required': process.required,
             'level': words[words.index('--log-level') + 1]}
    for flag, word in zip(words, words[1:], strict=False):
        name, _, value = word.partition(':=')
        if flag == '-p':
            found['parameters'][name] = yaml.safe_load(value)
        elif flag == '--params-file':
            found['files'].append(word)
        elif flag == '-r' and name in ('__node', '__ns'):
            found['node' if name == '__node' else 'namespace'] = value
        elif flag == '-r':
            found['remappings'][name] = value
    return found


@pytest.mark.parametrize('name', GRAPHS)
def test_launch_file_and_up_start_the_same_with_stand_ins_for_launch(name, stand_in_launch):
    *declared, start = load(FILES[name]).args[0]
    graph = graph_named(name)
    assert [(d.args[0], d.default_value, d.options.get('choices')) for d in declared] == [
        (a.name, a.text, list(a.choices) or None) for a in graph.arguments]
    for given in ({}, GIVEN[name]):
        values = {a.name: given.get(a.name, a.text) for a in graph.arguments}
        actions = start.options['function'](values, *start.options['args'])
        processes = graph.processes(given)
        assert [of_action(a) for a in actions] == [of_command(p) for p in processes]


@pytest.mark.parametrize('name', GRAPHS)
def test_launch_file_starts_the_described_command_line_with_real_launch(name, an_install):
    pytest.importorskip('launch_ros.actions', reason='launch_ros comes with a ROS 2 installation')
    from launch import LaunchService

    processes = graph_named(name).processes(GIVEN[name])
    an_install.expect(len(processes))
    service = LaunchService(argv=[f'{k}:={v}' for k, v in GIVEN[name].items()])
    arguments = [(a.name, GIVEN[name].get(a.name, a.text)) for a in graph_named(name).arguments]
    description = load(FILES[name])
    service.context.launch_configurations.update(arguments)
    service.include_launch_description(description)
    assert service.run() == 0
    for process in processes:
        words = an_install.words_of(process.executable or process.command[0])
        if process.command:
            assert words == list(process.command[1:])
            continue
        assert f'__node:={process.node}' in words
        assert not process.namespace or f'__ns:={process.namespace}' in words
        files = [w for f, w in zip(words, words[1:], strict=False) if f == '--params-file']
        assert tuple(files[:-1]) == process.parameter_files
        (node,) = an_install.parameters_of(process.executable).values()
        assert flat(node['ros__parameters']) == dict(process.parameters)


def flat(tree, prefix=''):
    found = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        found.update(flat(value, f'{prefix}{name}.') if inner else {f'{prefix}{name}': value})
    return found


class Install:
    """An ament prefix whose executables write down how they were started, then end together."""

    STARTER = """#!/bin/sh
for word in "$@"; do file=$word; printf '%s\\0' "$word"; done > "{seen}/{name}.part"
cp "$file" "{seen}/{name}.yaml" 2>/dev/null
mv "{seen}/{name}.part" "{seen}/{name}.words"
while [ "$(ls "{seen}" | grep -c words)" -lt "$EXPECTED" ]; do sleep 0.05; done
"""

    def __init__(self, prefix, monkeypatch):
        self.monkeypatch = monkeypatch
        self.seen = prefix / 'seen'
        marker = prefix / 'share/ament_index/resource_index/packages/quantvla_ros'
        library = prefix / 'lib/quantvla_ros'
        for folder in (self.seen, marker.parent, library):
            folder.mkdir(parents=True)
        marker.touch()
        for name in (*EXECUTABLES, 'ros2'):
            (library / name).write_text(self.STARTER.format(seen=self.seen, name=name))
            (library / name).chmod(0o755)
        monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix))
        monkeypatch.setenv('PATH', str(library), prepend=':')

    def expect(self, count):
        self.monkeypatch.setenv('EXPECTED', str(count))

    def words_of(self, name):
        return (self.seen / f'{name}.words').read_text().split('\0')[:-1]

    def parameters_of(self, name):
        words = self.words_of(name)
        kept = self.seen / f'{name}.yaml'
        last = [w for f, w in zip(words, words[1:], strict=False) if f == '--params-file'][-1]
        return yaml.safe_load(kept.read_text() if words[-1] == last else Path(last).read_text())


@pytest.fixture
def an_install(tmp_path, monkeypatch):
    return Install(tmp_path, monkeypatch)


# The description itself ------------------------------------------------------------------------


def test_texts_stay_texts_and_numbers_numbers():
    (policy, *_) = graph_named('robot').processes({'model': '007', 'speed_scale': '0.5'})
    words = policy.ros_arguments()
    assert 'model:="007"' in words
    assert 'limits.speed_scale:=0.5' in words
    assert 'autostart:=true' in words


def test_shipped_profile_is_set_and_a_users_own_is_kept(monkeypatch):
    (sim, policy) = graph_named('sim').processes()
    assert sim.environment == policy.environment
    assert sim.environment[PROFILES_VARIABLE] == str(share_path(PROFILES['local']))
    assert sim.environment[RANGE_VARIABLE] == 'LOCALHOST'
    monkeypatch.setenv(PROFILES_VARIABLE, '/my.xml')
    monkeypatch.setenv(RANGE_VARIABLE, 'SUBNET')
    assert graph_named('sim').processes()[0].environment == {}


def test_network_profile_leaves_the_discovery_range_alone():
    (policy, *_) = graph_named('robot').processes()
    assert policy.environment == {PROFILES_VARIABLE: str(share_path(PROFILES['network']))}


def test_namespace_moves_every_node_and_recorded_topic():
    for given in ({'namespace': 'left'}, {'namespace': '/left/'}):
        assert {p.namespace for p in graph_named('sim').processes(given)} == {'/left'}
    (bag,) = graph_named('record').processes({'recorder': 'ros2bag', 'namespace': 'left'})
    assert '/left/joint_states' in bag.command
    assert '/diagnostics' in bag.command


def test_lockstep_puts_every_node_on_the_clock_of_the_simulator():
    sim, policy = graph_named('sim').processes({'mode': 'lockstep'})
    assert policy.parameters['use_sim_time'] is True
    slow = graph_named('sim').processes({'pace': '0.5', 'record': 'true'})
    assert all(process.parameters.get('use_sim_time', True) for process in slow)
    assert graph_named('sim').processes()[1].parameters['use_sim_time'] is False


def test_recorder_may_end_without_ending_the_robot():
    processes = graph_named('sim').processes({'record': 'true', 'recorder': 'record_node'})
    assert {p.name: p.required for p in processes} == {
        'sim': True, 'policy': True, 'record': False}


def test_ros2_bag_is_taken_when_it_is_installed(monkeypatch):
    monkeypatch.setattr(graphs, '_has_ros2_bag', lambda: True)
    assert graph_named('record').processes()[0].command[:3] == ('ros2', 'bag', 'record')
    monkeypatch.setattr(graphs, '_has_ros2_bag', lambda: False)
    assert graph_named('record').processes()[0].executable == 'record_node'


def test_missing_parameter_file_is_named():
    with pytest.raises(ValueError, match='nowhere.yaml'):
        graph_named('robot').processes({'params_file': '/nowhere.yaml'})


@pytest.mark.parametrize(('name', 'text', 'allowed'), [
    ('task', 'three', 'a whole number'), ('speed_scale', 'fast', 'a number'),
    ('record', 'maybe', 'one of true, false'), ('device', 'tpu', 'one of cpu, cuda')])
def test_value_of_another_kind_is_refused_with_what_is_allowed(name, text, allowed):
    with pytest.raises(ValueError, match=f'{name} is {text!r}; expected {allowed}'):
        graph_named('sim').values({name: text})


def test_parameters_of_the_graph_exist_in_the_tables_of_the_nodes():
    from quantvla_ros.nodes.calibrating import CALIBRATION_NODE
    from quantvla_ros.nodes.parameters import POLICY_NODE
    from quantvla_ros.nodes.recording import RECORD_NODE
    from quantvla_ros.sim.parameters import SIM_NODE

    tables = {'policy_node': POLICY_NODE, 'record_node': RECORD_NODE, 'sim_node': SIM_NODE,
              'calibration_node': CALIBRATION_NODE}
    for graph in GRAPHS.values():
        known = {argument.name for argument in graph.arguments}
        given = {'record': 'true', 'recorder': 'record_node'}
        given = {name: value for name, value in given.items() if name in known}
        for process in graph.processes(given):
            if process.node in tables:
                known = {parameter.name: parameter for parameter in tables[process.node]}
                for name, value in process.parameters.items():
                    assert name == 'use_sim_time' or known[name].problem(value) is None
                    json.dumps(value)
