# SPDX-License-Identifier: Apache-2.0
"""The one table of parameters: it feeds the declaration, the YAML file and the README table.

Owns name, type, default, unit, range, allowed values and when a parameter may change, and checks
a set of values as a whole. Refuses with sentences; applies nothing: the node reads the values.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rclpy.node import Node

START, CONFIGURE, LIVE = 'start', 'configure', 'live'
Value = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One parameter. The type is that of the default.

    when: 'start' is read-only, 'configure' may change while no policy is loaded, 'live' always.
    low, high: inclusive range of a number. allowed: the texts that may be given, () for any.
    """

    name: str
    default: Value
    unit: str
    when: str
    description: str
    low: float | None = None
    high: float | None = None
    allowed: tuple[str, ...] = ()

    @property
    def type(self) -> type:
        """The Python type of the values."""
        return type(self.default)

    def problem(self, value: Any) -> str | None:
        """Return why a value is refused, as a sentence, or None."""
        if not isinstance(value, self.type) or (isinstance(value, bool) and self.type is not bool):
            return f'{self.name} is {value!r}; expected a {self.type.__name__}'
        if isinstance(value, float) and not math.isfinite(value):
            return f'{self.name} is {value!r}; expected a finite number'
        if self.allowed and value not in self.allowed:
            return f'{self.name} is {value!r}; expected one of {", ".join(self.allowed)}'
        number = value if isinstance(value, (int, float)) else 0.0
        if self.low is None or self.high is None or self.low <= number <= self.high:
            return None
        unit = f' {self.unit}' if self.unit else ''
        return f'{self.name} is {value!r}; expected {self.low:g} to {self.high:.10g}{unit}'


POLICY_NODE: tuple[Parameter, ...] = (
    Parameter('contract', 'libero_panda', '', START,
              'Contract of robot and policy: the name of a shipped one, or a path to a YAML.'),
    Parameter('autostart', False, '', START,
              'Configure and activate without a lifecycle manager.'),
    Parameter('policy', '', '', CONFIGURE,
              "Name of the policy; empty takes the contract's."),
    Parameter('model', '', '', CONFIGURE,
              "Folder of the checkpoint; empty takes the policy's own."),
    Parameter('precision', 'float', '', LIVE,
              'Precision: float, or the name of an artifact beside the checkpoint. Once '
              'configured it reads what runs: a set is a wish, and ~/status tells what becomes '
              'of it.'),
    Parameter('calibration', '', '', LIVE,
              "Calibration of the artifact: its name or path, newest for the artifact's newest "
              'one, or empty for none.'),
    Parameter('device', 'cpu', '', CONFIGURE,
              'Where the policy runs.', allowed=('cpu', 'cuda')),
    Parameter('steps', 0, '', CONFIGURE,
              "Denoising steps of one inference; 0 takes the policy's own.", 0, 100),
    Parameter('threads', 0, '', CONFIGURE,
              'Threads of the kernels; 0 lets them choose.', 0, 256),
    Parameter('policy_process', True, '', CONFIGURE,
              'Give each policy a process of its own, so that loading, inference and crashes hold '
              'up no control tick; false keeps it in the node.'),
    Parameter('seed', 0, '', CONFIGURE,
              'Seed of the first inference; each further one adds 1.', 0, 2**31 - 1),
    Parameter('warmup', 2, '', CONFIGURE,
              'Inferences run at configure, left out of every latency figure.', 1, 20),
    Parameter('dry_run', False, '', CONFIGURE,
              'Run the full loop and publish everything except commands.'),
    Parameter('enable_on_activate', True, '', CONFIGURE,
              'Start moving at activate; false waits for ~/enable.'),
    Parameter('require_controller', True, '', CONFIGURE,
              'Refuse to activate, and stop, when nothing subscribes to the command topic.'),
    Parameter('control_priority', 50, '', CONFIGURE,
              'SCHED_FIFO priority asked for the control thread; where it is refused, it runs '
              'at normal priority; 0 does not ask.', 0, 99),
    Parameter('inference.timeout_s', 2.0, 's', CONFIGURE,
              'Longest inference on the steady clock; past it the arm stops.', 0.05, 120.0),
    Parameter('inference.margin_s', 0.05, 's', CONFIGURE,
              'How long before it is needed the next chunk should be ready; half of it earlier or '
              'later at most, to begin with pictures that just came.', 0.0, 2.0),
    Parameter('player.seam', 'blend', '', CONFIGURE,
              'How a new chunk takes over: blended, or as the continuation of a prefix that the '
              'policy was given.', allowed=('blend', 'prefix')),
    Parameter('player.blend_s', 0.1, 's', CONFIGURE,
              'Shortest time over which a new chunk takes over from the old one.', 0.001, 2.0),
    Parameter('player.max_blend_s', 0.5, 's', CONFIGURE,
              'A chunk that would need a longer blend than this is refused.', 0.01, 5.0),
    Parameter('player.prefix_tolerance', 0.005, 'rad or m', CONFIGURE,
              'How far a chunk made with a prefix may be from the plan to join it unblended.',
              0.0, 1.0),
    Parameter('limits.speed_scale', 1.0, '', LIVE,
              'Scale on every velocity limit; 0 holds the arm where it is.', 0.0, 1.0),
    Parameter('limits.lead_rad', 0.5, 'rad', CONFIGURE,
              'Largest distance of a turning joint between command and measured position.',
              0.001, 10.0),
    Parameter('limits.lead_m', 0.1, 'm', CONFIGURE,
              'Largest distance of a sliding joint between command and measured position.',
              0.0001, 10.0),
    Parameter('limits.allow_unlimited', False, '', CONFIGURE,
              'Accept commanded joints that have no position or velocity limit.'),
    Parameter('limits.description_timeout_s', 10.0, 's', CONFIGURE,
              'How long configure waits for robot_description.', 0.1, 120.0),
    Parameter('freshness.camera_max_age_s', 0.0, 's', CONFIGURE,
              "Oldest camera frame by its header stamp; 0 takes the contract's.", 0.0, 10.0),
    Parameter('freshness.camera_max_silence_s', 0.0, 's', CONFIGURE,
              "Longest silence of a camera on the steady clock; 0 takes the contract's.",
              0.0, 10.0),
    Parameter('freshness.joints_max_age_s', 0.0, 's', CONFIGURE,
              "Oldest joint states by their header stamp; 0 takes the contract's.", 0.0, 10.0),
    Parameter('freshness.joints_max_silence_s', 0.0, 's', CONFIGURE,
              "Longest silence of the joint states on the steady clock; 0 takes the contract's.",
              0.0, 10.0),
    Parameter('freshness.wait_s', 5.0, 's', CONFIGURE,
              'How long activate waits for fresh inputs and for the controller.', 0.1, 120.0),
    Parameter('freshness.frozen_s', 1.0, 's', CONFIGURE,
              'A camera that repeats one picture this long while the arm moves is frozen; '
              '0 switches the check off.', 0.0, 60.0),
    Parameter('freshness.clock_jump_s', 0.1, 's', CONFIGURE,
              'A clock that jumps off the steady one by more than this stops the arm; 0, and '
              'use_sim_time, switch the check off.', 0.0, 10.0),
    Parameter('guard.max_tick_gap_s', 0.1, 's', CONFIGURE,
              'A control tick that comes later than this stops the arm.', 0.01, 5.0),
    Parameter('guard.first_chunk_s', 5.0, 's', CONFIGURE,
              'How long the start pose is held while the first chunk is computed.', 0.1, 120.0),
    Parameter('guard.hold_s', 1.0, 's', CONFIGURE,
              'How long the rest pose is published after a stop, before silence.', 0.0, 60.0),
    Parameter('guard.start_ramp_s', 1.0, 's', CONFIGURE,
              'Time over which the speed limit grows to its value after a start.', 0.0, 10.0),
    Parameter('guard.start_speed', 0.1, '', CONFIGURE,
              'Share of the speed limit that a start begins with.', 0.01, 1.0),
    Parameter('guard.long_clip_s', 1.0, 's', CONFIGURE,
              'Clipping that lasts longer than this stops the arm.', 0.01, 60.0),
    Parameter('guard.estop_cooldown_s', 0.5, 's', CONFIGURE,
              'How long after an e-stop a reset is refused.', 0.0, 60.0),
    Parameter('guard.max_refusals', 3, '', CONFIGURE,
              'So many refused chunks in a row stop the arm.', 1, 100),
    Parameter('guard.max_future_s', 0.5, 's', CONFIGURE,
              'A chunk stamped farther ahead than this is refused.', 0.001, 10.0),
    Parameter('guard.huge_step_rad', 0.5, 'rad', CONFIGURE,
              'A step of a turning joint in a chunk that is farther than this is refused.',
              0.001, 10.0),
    Parameter('guard.huge_step_m', 0.1, 'm', CONFIGURE,
              'A step of a sliding joint in a chunk that is farther than this is refused.',
              0.0001, 10.0),
    Parameter('guard.start_tolerance_rad', 0.02, 'rad', CONFIGURE,
              'How far outside its limits a turning joint may be at a start.', 0.0, 1.0),
    Parameter('guard.start_tolerance_m', 0.005, 'm', CONFIGURE,
              'How far outside its limits a sliding joint may be at a start.', 0.0, 1.0),
    Parameter('guard.min_tick_s', 0.0005, 's', CONFIGURE,
              'A tick that comes sooner than this after a command publishes nothing.',
              0.00001, 0.005),
    Parameter('swap.mode', 'beside', '', LIVE,
              'How precision or calibration changes on a configured node: loaded beside the '
              'running one; or hold: the arm rests, the running one is freed first, then it goes '
              'on.', allowed=('beside', 'hold')),
    Parameter('swap.good_chunks', 3, '', LIVE,
              'Chunks that a new precision must make before the one before it is freed; until '
              'then a bad chunk leads back.', 1, 1000),
    Parameter('swap.max_difference_rad', 0.2, 'rad', LIVE,
              'How far the answer of a new precision to a kept observation may be from that of '
              'the running one, turning joints.', 0.0001, 10.0),
    Parameter('swap.max_difference_m', 0.05, 'm', LIVE,
              'The same for sliding joints; a gripper that opens or closes is not judged.',
              0.0001, 10.0),
    Parameter('swap.nice', 19, '', LIVE,
              'Priority at which a policy with a process of its own is loaded beside the running '
              'one: 0 normal, 19 only what the others leave.', 0, 19),
    Parameter('swap.reserve_mb', 200, 'MB', LIVE,
              'Memory that must stay free beside a second policy.', 0, 1000000),
    Parameter('shadow', '', '', LIVE,
              'A second precision that answers the same observations without commanding; it reads '
              'what shadows, empty for none. Differences on ~/shadow and in ~/status.'),
    Parameter('drift.every', 40, '', CONFIGURE,
              'Chunks from one look at the activations to the next; 0 never looks.', 0, 100000),
    Parameter('drift.share', 0.05, '', CONFIGURE,
              'Share of the layers outside the calibrated range above which /diagnostics warns.',
              0.0, 1.0),
    Parameter('drift.margin', 0.1, '', CONFIGURE,
              'How far beyond the calibrated range still counts as inside, as a share of it.',
              0.0, 10.0),
    Parameter('drift.excess', 1.2, '', CONFIGURE,
              'A single layer that stays outside its range by this factor warns as well.',
              1.0, 1000.0),
    Parameter('gate.mean_ratio', 1.0, '', LIVE,
              'Largest mean action error of a precision, as a multiple of what another noise seed '
              'makes; above it the precision may not be activated.', 0.001, 1000.0),
    Parameter('gate.worst_ratio', 1.5, '', LIVE,
              "The same for the worst frame's error.", 0.001, 1000.0),
    Parameter('gate.needs_evidence', False, '', LIVE,
              'Refuse a precision whose action error nobody has measured.'),
    Parameter('gate.override', False, '', LIVE,
              'Activate a precision that the gate keeps out; ~/status and /diagnostics show it.'),
    Parameter('trajectory.lead_s', 0.02, 's', CONFIGURE,
              'time_from_start of the first point sent to joint_trajectory_controller; at least '
              'one control period.', 0.001, 1.0),
)


def defaults(table: Sequence[Parameter] = POLICY_NODE) -> dict[str, Value]:
    """Return name -> default."""
    return {parameter.name: parameter.default for parameter in table}


def check(
    values: Mapping[str, Any], table: Sequence[Parameter] = POLICY_NODE, loaded: bool = False
) -> list[str]:
    """Check a set of values as a whole; return every problem as a sentence.

    loaded: a policy is configured, so that only 'live' parameters may change.
    """
    known = {parameter.name: parameter for parameter in table}
    problems = []
    for name, value in values.items():
        if name not in known:
            continue  # use_sim_time and the like belong to rclpy
        parameter = known[name]
        problem = parameter.problem(value)
        if problem is None and loaded and parameter.when == CONFIGURE:
            problem = f'{name} can only change before configure; clean the node up first'
        if problem is not None:
            problems.append(problem)
    return problems


def descriptor(parameter: Parameter) -> Any:
    """Return the rcl_interfaces descriptor of a parameter."""
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

    unit = f' [{parameter.unit}]' if parameter.unit else ''
    message = ParameterDescriptor(
        description=parameter.description + unit,
        additional_constraints=_constraints(parameter),
        read_only=parameter.when == START,
    )
    if parameter.low is not None and parameter.high is not None:
        if parameter.type is float:
            message.floating_point_range = [
                FloatingPointRange(from_value=parameter.low, to_value=parameter.high)
            ]
        else:
            message.integer_range = [
                IntegerRange(from_value=int(parameter.low), to_value=int(parameter.high), step=1)
            ]
    return message


def declare(node: Node, table: Sequence[Parameter] = POLICY_NODE) -> None:
    """Declare every parameter of the table on a node."""
    for parameter in table:
        node.declare_parameter(parameter.name, parameter.default, descriptor(parameter))


def read(node: Node, table: Sequence[Parameter] = POLICY_NODE) -> dict[str, Any]:
    """Return the present value of every parameter of the table."""
    return {parameter.name: node.get_parameter(parameter.name).value for parameter in table}


def yaml_text(table: Sequence[Parameter] = POLICY_NODE) -> str:
    """Return the text of the parameter file: every parameter at its default, with its meaning."""
    lines = [
        '# Parameters of the node at their defaults; ranges and meanings are also in',
        '# `ros2 param describe`. [start]: read-only. [configure]: may change while unconfigured.',
        '# [live]: may change at any time.',
        '/**:',
        '  ros__parameters:',
    ]
    group = ''
    for parameter in table:
        head, _, tail = parameter.name.rpartition('.')
        if head != group:
            group = head
            lines += [f'    {group}:'] if group else []
        indent = '      ' if head else '    '
        meaning = f'{parameter.description} [{parameter.when}]{_range(parameter)}'
        lines += textwrap.wrap(
            meaning, 95, initial_indent=f'{indent}# ', subsequent_indent=f'{indent}# '
        )
        lines.append(f'{indent}{tail}: {_yaml(parameter.default)}')
    return '\n'.join(lines) + '\n'


def markdown(table: Sequence[Parameter] = POLICY_NODE) -> str:
    """Return the README table."""
    lines = [
        '| parameter | default | unit | allowed | changes | meaning |',
        '|---|---|---|---|---|---|',
    ]
    for parameter in table:
        allowed = _range(parameter).strip() or parameter.type.__name__
        lines.append(
            f'| `{parameter.name}` | `{_yaml(parameter.default)}` | {parameter.unit} | {allowed} '
            f'| {parameter.when} | {parameter.description} |'
        )
    return '\n'.join(lines) + '\n'


def _constraints(parameter: Parameter) -> str:
    words = ['one of ' + ', '.join(parameter.allowed)] if parameter.allowed else []
    if parameter.when == CONFIGURE:
        words.append('changes only while the node is unconfigured')
    return '; '.join(words)


def _range(parameter: Parameter) -> str:
    if parameter.allowed:
        return ' ' + ', '.join(parameter.allowed)
    if parameter.low is not None and parameter.high is not None:
        return f' {parameter.low:g} to {parameter.high:.10g}'
    return ''


def _yaml(value: Value) -> str:
    if isinstance(value, bool):
        return 'true' if value else 'false'
    return "''" if value == '' else str(value)
