# SPDX-License-Identifier: Apache-2.0
"""Which processes make a running robot, described once, as values.

`launch/` and `quantvla up` both read this; neither adds a parameter, a remapping or a variable of
its own. Starts nothing and imports neither launch nor rclpy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.recording import recorded_topics
from quantvla_ros.resources import share_path

Value = bool | int | float | str
PROFILES = {'local': 'config/dds/shared_memory.xml', 'network': 'config/dds/network.xml'}
PROFILES_VARIABLE = 'FASTRTPS_DEFAULT_PROFILES_FILE'
RANGE_VARIABLE = 'ROS_AUTOMATIC_DISCOVERY_RANGE'


@dataclass(frozen=True)
class Argument:
    """One argument of a graph: what differs per deployment. The type is that of the default."""

    name: str
    default: Value
    description: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The default as it is written on a command line."""
        return as_text(self.default)

    def parse(self, text: str) -> Value:
        """Return the value of a text. Raises ValueError with what is allowed."""
        if self.choices and text not in self.choices:
            raise ValueError(f'{self.name} is {text!r}; expected one of {", ".join(self.choices)}')
        kind = type(self.default)
        try:
            if kind is bool:
                return {'true': True, 'false': False}[text.lower()]
            return kind(text)
        except (KeyError, ValueError):
            allowed = {bool: 'true or false', int: 'a whole number', float: 'a number'}[kind]
            raise ValueError(f'{self.name} is {text!r}; expected {allowed}') from None


@dataclass(frozen=True)
class Process:
    """One process. executable: a name of `executables.py`, or command: any other program.

    parameter_files are read before parameters, which win. A process that is not required may end
    without ending the rest.
    """

    name: str
    executable: str = ''
    node: str = ''
    namespace: str = ''
    parameter_files: tuple[str, ...] = ()
    parameters: Mapping[str, Value] = field(default_factory=dict)
    remappings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    log_level: str = 'info'
    required: bool = True
    command: tuple[str, ...] = ()

    def ros_arguments(self) -> list[str]:
        """Return the `--ros-args` that carry all of this to a node."""
        words = ['--ros-args', '--log-level', self.log_level, '-r', f'__node:={self.node}']
        if self.namespace:
            words += ['-r', f'__ns:={self.namespace}']
        for path in self.parameter_files:
            words += ['--params-file', path]
        for name, value in self.parameters.items():
            words += ['-p', f'{name}:={json.dumps(value)}']
        for old, new in self.remappings.items():
            words += ['-r', f'{old}:={new}']
        return words


@dataclass(frozen=True)
class Graph:
    """A named set of processes and the arguments that shape it."""

    name: str
    description: str
    arguments: tuple[Argument, ...]
    build: Callable[[Mapping[str, Value]], list[Process]]

    def values(self, given: Mapping[str, str]) -> dict[str, Value]:
        """Return every argument's value. Raises ValueError with one sentence per problem."""
        known = {argument.name: argument for argument in self.arguments}
        problems = [
            f'{name!r} is no argument of {self.name}; known are {", ".join(known)}'
            for name in given if name not in known
        ]
        values = {argument.name: argument.default for argument in self.arguments}
        for name in given:
            try:
                if name in known:
                    values[name] = known[name].parse(given[name])
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError('\n'.join(problems))
        return values

    def processes(self, given: Mapping[str, str] | None = None) -> list[Process]:
        """Return the processes for the given arguments; the rest take their defaults."""
        return self.build(self.values(given or {}))


def as_text(value: Value) -> str:
    """Write a value the way launch arguments are written."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def environment(dds: str) -> dict[str, str]:
    """Return the DDS variables of a profile; what the user has set already is left alone."""
    found = {}
    if dds in PROFILES and not os.environ.get(PROFILES_VARIABLE):
        found[PROFILES_VARIABLE] = str(share_path(PROFILES[dds]))
    if dds == 'local' and not os.environ.get(RANGE_VARIABLE):
        found[RANGE_VARIABLE] = 'LOCALHOST'
    return found


def _common(values: Mapping[str, Value], defaults: str) -> dict:
    """Return what every process of a graph shares, and its own file of defaults."""
    namespace = str(values['namespace']).strip('/')
    files = [str(share_path(defaults))]
    if values['params_file']:
        files.append(str(values['params_file']))
        if not Path(files[-1]).is_file():
            raise ValueError(f'params_file is {files[-1]!r}; there is no such file')
    return {
        'namespace': f'/{namespace}' if namespace else '',
        'parameter_files': tuple(files),
        'environment': environment(str(values['dds'])),
        'log_level': str(values['log_level']),
    }


def _policy(values: Mapping[str, Value]) -> Process:
    names = ('contract', 'policy', 'model', 'precision', 'calibration', 'device', 'autostart',
             'use_sim_time', 'dry_run', 'enable_on_activate')
    parameters: dict[str, Value] = {name: values[name] for name in names}
    parameters['limits.speed_scale'] = values['speed_scale']
    common = _common(values, 'config/policy_node.yaml')
    return Process('policy', 'policy_node', 'policy_node', parameters=parameters, **common)


def _sim(values: Mapping[str, Value]) -> Process:
    names = ('contract', 'suite', 'task', 'init', 'seed', 'lighting', 'mode')
    parameters = {name: values[name] for name in names}
    parameters['camera.rate_hz'] = values['camera_rate']
    parameters['pace'] = values['pace']
    common = _common(values, 'config/sim_node.yaml')
    return Process('sim', 'sim_node', 'sim_node', parameters=parameters, **common)


def _has_ros2_bag() -> bool:
    return bool(shutil.which('ros2')) and importlib.util.find_spec('ros2bag') is not None


def bag_folder(values: Mapping[str, Value]) -> str:
    """Return where the bag goes: `bag`, or a new folder named by the time of day."""
    return str(values['bag']) or time.strftime('bags/quantvla_%Y%m%d_%H%M%S')


def _recorder(values: Mapping[str, Value]) -> Process:
    common = _common(values, 'config/record_node.yaml')
    kind = str(values['recorder'])
    if kind == 'ros2bag' or (kind == 'auto' and _has_ros2_bag()):
        topics = recorded_topics(load_contract(str(values['contract'])))
        resolved = [topic if topic.startswith('/') else f'{common["namespace"]}/{topic}'
                    for topic in topics]
        sim_time = ['--use-sim-time'] if values['use_sim_time'] else []
        command = ('ros2', 'bag', 'record', '--storage', 'mcap', '--output', bag_folder(values),
                   *sim_time, *resolved)
        return Process('record', command=command, required=False,
                       environment=common['environment'])
    parameters: dict[str, Value] = {
        'contract': values['contract'],
        'bag': str(values['bag']),
        'autostart': True,
        'record_on_activate': values['record_at_start'],
        'use_sim_time': values['use_sim_time'],
    }
    return Process('record', 'record_node', 'record_node', parameters=parameters,
                   required=False, **common)


def _with_recorder(values: Mapping[str, Value], *processes: Process) -> list[Process]:
    return [*processes, *([_recorder(values)] if values['record'] else [])]


def robot_graph(values: Mapping[str, Value]) -> list[Process]:
    """The policy node beside a robot's own drivers and controllers."""
    return _with_recorder(values, _policy(values))


LIBERO_STEP_RAD = 2.0


def sim_graph(values: Mapping[str, Value]) -> list[Process]:
    """The simulated Panda and the policy node."""
    slow = float(values['pace']) < 1.0
    values = {**values, 'use_sim_time': slow or values['mode'] == 'lockstep'}
    policy = _policy(values)
    # LIBERO's controller pulls far targets closer, and policies trained on it may ask for them;
    # the joint limits hold all the same.
    patient = {**policy.parameters, 'guard.huge_step_rad': LIBERO_STEP_RAD}
    policy = replace(policy, parameters=patient)
    return _with_recorder(values, _sim(values), policy)


def record_graph(values: Mapping[str, Value]) -> list[Process]:
    """The recorder alone."""
    return [_recorder(values)]


CALIBRATED = ('bag', 'model', 'precision', 'output', 'frames', 'held_out', 'learn', 'recipe',
              'seed', 'beside_active', 'nice', 'autostart', 'use_sim_time')


def calibrate_graph(values: Mapping[str, Value]) -> list[Process]:
    """The calibration node alone, beside whatever else runs."""
    common = _common(values, 'config/calibration_node.yaml')
    parameters = {name: values[name] for name in CALIBRATED}
    parameters['contract'] = values['contract']
    return [Process('calibrate', 'calibration_node', 'calibration_node', parameters=parameters,
                    **common)]


COMMON = (
    Argument('contract', 'libero_panda',
             'Contract of robot and policy: a shipped name or a path to a YAML file.'),
    Argument('namespace', '', 'Namespace of every node and every relative topic.'),
    Argument('params_file', '', 'A parameter file read after the shipped one.'),
    Argument('log_level', 'info', 'Smallest severity that is logged.',
             ('debug', 'info', 'warn', 'error', 'fatal')),
)
SIM_TIME = Argument('use_sim_time', False, 'Take the time from /clock.', ('true', 'false'))
POLICY = (
    Argument('policy', '', "Policy; empty takes the contract's."),
    Argument('model', '', "Folder of the checkpoint; empty takes the policy's own."),
    Argument('precision', 'float', 'float, or the name of an artifact beside the checkpoint.'),
    Argument('calibration', '', 'Calibration of the artifact: name, path, newest, or empty.'),
    Argument('device', 'cpu', 'Where the policy runs.', ('cpu', 'cuda')),
    Argument('speed_scale', 1.0, 'Scale 0..1 on every velocity limit.'),
    Argument('autostart', True, 'Configure and activate the policy node without a manager.',
             ('true', 'false')),
    Argument('enable_on_activate', True, 'Move at once; false waits for ~/enable.',
             ('true', 'false')),
    Argument('dry_run', False, 'Run the whole loop, send no command.', ('true', 'false')),
)
RECORD = (
    Argument('bag', '', 'Folder of the new bag; empty makes bags/quantvla_DATE_TIME.'),
    Argument('recorder', 'auto', 'auto takes `ros2 bag record` when it is installed.',
             ('auto', 'ros2bag', 'record_node')),
    Argument('record_at_start', True, 'Record at once; false waits for ~/record (record_node).',
             ('true', 'false')),
)
WITH_RECORD = (Argument('record', False, 'Start the recorder too.', ('true', 'false')), *RECORD)
SIM = (
    Argument('suite', 'libero_object', 'LIBERO suite.',
             ('libero_object', 'libero_goal', 'libero_spatial', 'libero_10')),
    Argument('task', 0, 'Number of the task in its suite, 0 to 9.'),
    Argument('init', 0, 'Official initial state, 0 to 49; -1 places the objects at random.'),
    Argument('seed', 0, 'Seed of random placements.'),
    Argument('lighting', 'day', 'day, overcast, lamp, night, or numbers as sim_node takes them.'),
    Argument('pace', 1.0, 'Simulated seconds per second; below 1 is slow motion on /clock.'),
    Argument('camera_rate', 20.0, 'Most pictures per second and camera.'),
    Argument('mode', 'realtime', 'lockstep waits for a command in each step and drives /clock.',
             ('realtime', 'lockstep')),
)

CALIBRATE = (
    Argument('bag', '', 'Bag to calibrate from; may be set later, as a parameter.'),
    Argument('model', '', "Folder of the checkpoint; empty takes the policy's own."),
    Argument('precision', 'w4a8', 'Artifact to calibrate.'),
    Argument('output', '', "Name of the calibration, or a path; empty takes the bag's name."),
    Argument('frames', 128, 'Frames to fit on.'),
    Argument('held_out', 32, 'Frames to judge by.'),
    Argument('learn', 'activations,alpha,beta',
             'What is tried: any of rounding, smoothing, activations, alpha, beta.'),
    Argument('recipe', '', "Recipe of rounding and smoothing; empty takes the artifact's own."),
    Argument('seed', 0, 'Seed of frames and noise.'),
    Argument('beside_active', False, 'Calibrate although the arm moves.', ('true', 'false')),
    Argument('nice', 19, 'Priority: 0 normal, 19 only what others leave.'),
    Argument('autostart', True, 'Configure and activate without a manager.', ('true', 'false')),
)


def _dds(default: str) -> Argument:
    return Argument(
        'dds', default,
        'Fast DDS profile: local (shared memory, this host only), network (shared memory + UDP) '
        'or none; a FASTRTPS_DEFAULT_PROFILES_FILE that is already set wins.',
        ('local', 'network', 'none'))


GRAPHS: dict[str, Graph] = {
    graph.name: graph for graph in (
        Graph('robot', 'The policy node for a real robot (launch/bringup.launch.py).',
              (*COMMON, SIM_TIME, _dds('network'), *POLICY, *WITH_RECORD), robot_graph),
        Graph('sim', 'The simulated Panda and the policy node (launch/sim.launch.py).',
              (*COMMON, _dds('local'), *SIM, *POLICY, *WITH_RECORD), sim_graph),
        Graph('record', 'The recorder alone (launch/record.launch.py).',
              (*COMMON, SIM_TIME, _dds('network'), *RECORD), record_graph),
        Graph('calibrate', 'The calibration node alone (launch/calibrate.launch.py).',
              (*COMMON, SIM_TIME, _dds('network'), *CALIBRATE), calibrate_graph),
    )
}


def graph_named(name: str) -> Graph:
    """Return a graph. Raises ValueError that lists the known names."""
    if name not in GRAPHS:
        raise ValueError(f'graph {name!r} is unknown; known are {", ".join(GRAPHS)}')
    return GRAPHS[name]


def arguments_markdown(names: Sequence[str] = tuple(GRAPHS)) -> str:
    """Return the README table of arguments."""
    rows = ['| argument | graphs | default | allowed | meaning |', '|---|---|---|---|---|']
    seen: dict[str, tuple[Argument, list[str], list[str]]] = {}
    for name in names:
        for argument in GRAPHS[name].arguments:
            # two graphs may mean different things by one word, such as the bag
            key = f'{argument.name}: {argument.description}'
            entry = seen.setdefault(key, (argument, [], []))
            entry[1].append(name)
            entry[2].append(argument.text)
    for argument, graphs, defaults in seen.values():
        default = defaults[0] if len(set(defaults)) == 1 else ', '.join(
            f'{value} ({graph})' for graph, value in zip(graphs, defaults, strict=True))
        allowed = ', '.join(argument.choices) or type(argument.default).__name__
        rows.append(f'| `{argument.name}` | {", ".join(graphs)} | `{default}` | {allowed} '
                    f'| {argument.description} |')
    return '\n'.join(rows) + '\n'
