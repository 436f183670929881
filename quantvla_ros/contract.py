# SPDX-License-Identifier: Apache-2.0
"""One YAML file per robot-and-policy pair: live node, bag reader and simulator all obey it.

Owns what the file may say and checks it as a whole: every problem is reported at once, each as a
sentence with the field, the value seen and what is allowed. Reads no topic and moves no robot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from quantvla_ros.resources import share_path
from quantvla_ros.sections import Section

VERSION = 1
IMAGE_TYPES = ('sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage')
ENCODINGS = ('rgb8', 'bgr8', 'mono8', 'jpeg', 'png')
RESIZES = ('stretch', 'pad', 'crop')
FLIPS = ('none', 'vertical', 'horizontal', 'both')
ACTION_KINDS = ('absolute', 'delta')
CONTROLLERS = ('joint_trajectory', 'forward_command')
GRIPPERS = ('joint', 'topic', 'action', 'none')


class ContractError(ValueError):
    """A contract that the user can mend; the message lists every problem found."""


@dataclass(frozen=True)
class Camera:
    """One camera: where its frames come from and the size the policy wants them in."""

    name: str
    topic: str
    type: str
    encoding: str
    width: int
    height: int
    policy_width: int
    policy_height: int
    resize: str = 'stretch'
    flip: str = 'none'
    max_age_s: float = 0.2
    max_silence_s: float = 0.2


@dataclass(frozen=True)
class Joints:
    """The measured joints, in the order the policy reads them."""

    topic: str
    names: tuple[str, ...]
    units: tuple[str, ...]
    max_age_s: float = 0.1
    max_silence_s: float = 0.1


@dataclass(frozen=True)
class Vector:
    """A further numeric sensor (std_msgs/msg/Float64MultiArray): force, privileged state, ..."""

    name: str
    topic: str
    size: int
    max_age_s: float = 0.2
    max_silence_s: float = 0.2


@dataclass(frozen=True)
class Action:
    """What a chunk holds: commanded joints, absolute or delta, steps and how many are executed."""

    kind: str
    joints: tuple[str, ...]
    units: tuple[str, ...]
    horizon: int
    execute: int
    rate_hz: float

    @property
    def step_dt_s(self) -> float:
        """Seconds between two steps of a chunk."""
        return 1.0 / self.rate_hz


@dataclass(frozen=True)
class Controller:
    """The controller that takes the commands and the joint order it expects."""

    kind: str
    topic: str
    joints: tuple[str, ...]
    rate_hz: float = 100.0
    state_topic: str = ''
    allow_nonzero_end_velocity: bool = False


@dataclass(frozen=True)
class Gripper:
    """How the gripper is commanded. Positions are those of the joint, in m or rad.

    kind joint: one of controller.joints. topic: an own forward controller. action: GripperCommand.
    """

    kind: str = 'none'
    joint: str = ''
    open_position: float = 0.0
    closed_position: float = 0.0
    topic: str = ''
    hysteresis: float = 0.1
    max_effort: float = 20.0


@dataclass(frozen=True)
class JointLimits:
    """Limits of one joint in SI; may only tighten those of the robot description."""

    lower: float | None = None
    upper: float | None = None
    velocity: float | None = None
    acceleration: float | None = None


@dataclass(frozen=True)
class Contract:
    """The whole agreement between a robot and a policy. Make it with load_contract."""

    robot: str
    policy: str
    cameras: tuple[Camera, ...]
    joints: Joints
    action: Action
    controller: Controller
    gripper: Gripper
    instruction_topic: str
    instruction: str
    vectors: tuple[Vector, ...] = ()
    limits: Mapping[str, JointLimits] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)  # policies/agreement.py reads it

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Camera names in the order the policy reads them."""
        return tuple(camera.name for camera in self.cameras)

    def camera(self, name: str) -> Camera:
        """Return a camera by name."""
        for camera in self.cameras:
            if camera.name == name:
                return camera
        raise ContractError(f'camera {name!r} is not one of {", ".join(self.camera_names)}')

    def topics(self) -> dict[str, str]:
        """Every topic a recording needs -> its message type."""
        found = {camera.topic: camera.type for camera in self.cameras}
        found[self.joints.topic] = 'sensor_msgs/msg/JointState'
        found[self.instruction_topic] = 'std_msgs/msg/String'
        found.update({v.topic: 'std_msgs/msg/Float64MultiArray' for v in self.vectors})
        return found


def _camera(name: str, section: Section) -> Camera:
    policy = section.section('policy', required=False)
    width = section.positive('width', int)
    height = section.positive('height', int)
    kind = section.choice('type', IMAGE_TYPES, IMAGE_TYPES[0])
    compressed = kind == IMAGE_TYPES[1]
    camera = Camera(
        name=name,
        topic=section.text('topic'),
        type=kind,
        encoding=section.choice('encoding', ENCODINGS, 'jpeg' if compressed else 'rgb8'),
        width=width,
        height=height,
        policy_width=policy.positive('width', int, width),
        policy_height=policy.positive('height', int, height),
        resize=policy.choice('resize', RESIZES, 'stretch'),
        flip=section.choice('flip', FLIPS, 'none'),
        max_age_s=section.positive('max_age_s', float, 0.2),
        max_silence_s=section.positive('max_silence_s', float, 0.2),
    )
    if compressed != (camera.encoding in ('jpeg', 'png')):
        section.say('encoding', camera.encoding, f'an encoding that {kind} carries')
    policy.done()
    section.done()
    return camera


def _cameras(root: Section) -> tuple[Camera, ...]:
    section = root.section('cameras')
    cameras = tuple(_camera(str(name), section.section(name)) for name in section.data)
    if not cameras:
        section.say('', section.data, 'at least one camera')
    return cameras


def _joints(root: Section) -> Joints:
    section = root.section('joints')
    names = section.names('names')
    joints = Joints(
        topic=section.text('topic', 'joint_states'),
        names=names,
        units=section.units(len(names)),
        max_age_s=section.positive('max_age_s', float, 0.1),
        max_silence_s=section.positive('max_silence_s', float, 0.1),
    )
    section.done()
    return joints


def _vectors(root: Section) -> tuple[Vector, ...]:
    section = root.section('vectors', required=False)
    vectors = []
    for name in section.data:
        part = section.section(name)
        vectors.append(
            Vector(
                name=str(name),
                topic=part.text('topic'),
                size=part.positive('size', int),
                max_age_s=part.positive('max_age_s', float, 0.2),
                max_silence_s=part.positive('max_silence_s', float, 0.2),
            )
        )
        part.done()
    return tuple(vectors)


def _action(root: Section) -> Action:
    section = root.section('action')
    joints = section.names('joints')
    horizon = section.positive('horizon', int)
    action = Action(
        kind=section.choice('kind', ACTION_KINDS),
        joints=joints,
        units=section.units(len(joints)),
        horizon=horizon,
        execute=section.positive('execute', int, horizon),
        rate_hz=section.positive('rate_hz', float),
    )
    if action.execute > action.horizon:
        section.say('execute', action.execute, f'at most the horizon, {action.horizon}')
    section.done()
    return action


def _controller(root: Section) -> Controller:
    section = root.section('controller')
    controller = Controller(
        kind=section.choice('kind', CONTROLLERS),
        topic=section.text('topic'),
        joints=section.names('joints'),
        rate_hz=section.positive('rate_hz', float, 100.0),
        state_topic=section.text('state_topic', ''),
        allow_nonzero_end_velocity=section.get(
            'allow_nonzero_end_velocity', bool, 'true or false', False
        ),
    )
    section.done()
    return controller


def _gripper(root: Section) -> Gripper:
    section = root.section('gripper', required=False)
    kind = section.choice('kind', GRIPPERS, 'none')
    used = kind != 'none'
    gripper = Gripper(
        kind=kind,
        joint=section.text('joint', None if used else ''),
        open_position=section.number('open_position', None if used else 0.0),
        closed_position=section.number('closed_position', None if used else 0.0),
        topic=section.text('topic', None if kind in ('topic', 'action') else ''),
        hysteresis=section.positive('hysteresis', float, 0.1),
        max_effort=section.positive('max_effort', float, 20.0),
    )
    if used and gripper.open_position == gripper.closed_position:
        section.say('open_position', gripper.open_position, 'another value than closed_position')
    section.done()
    return gripper


def _limits(root: Section) -> dict[str, JointLimits]:
    section = root.section('limits', required=False)
    limits = {}
    for name in section.data:
        part = section.section(name)
        values = {
            item.name: part.number(item.name) if item.name in part.data else None
            for item in fields(JointLimits)
        }
        part.known |= set(values)
        for key in ('velocity', 'acceleration'):
            value = values[key]
            if value is not None and not value > 0:
                part.say(key, value, 'a positive number')
        lower, upper = values['lower'], values['upper']
        if lower is not None and upper is not None and lower >= upper:
            part.say('lower', lower, f'less than upper, {upper}')
        part.done()
        limits[str(name)] = JointLimits(**values)
    return limits


def _check_together(contract: Contract, problems: list[str]) -> None:
    """Check what only two sections together can get wrong."""
    commanded = set(contract.action.joints)
    gripper = contract.gripper
    expected = commanded - ({gripper.joint} if gripper.kind in ('topic', 'action') else set())
    if set(contract.controller.joints) != expected:
        problems.append(
            f'controller.joints is {list(contract.controller.joints)!r}; expected the joints of '
            f'action.joints that this controller moves, in the order of the controller: '
            f'{sorted(expected)}'
        )
    if gripper.kind != 'none' and gripper.joint not in commanded:
        problems.append(
            f'gripper.joint is {gripper.joint!r}; expected one of action.joints, '
            f'{list(contract.action.joints)}'
        )
    unmeasured = commanded - set(contract.joints.names)
    if unmeasured:
        problems.append(
            f'action.joints names {sorted(unmeasured)}, which joints.names lacks; '
            'a joint that is not measured cannot be commanded safely'
        )
    unknown = set(contract.limits) - commanded
    if unknown:
        problems.append(f'limits names {sorted(unknown)}; expected joints of action.joints')
    topics = [camera.topic for camera in contract.cameras] + [contract.joints.topic]
    if len(set(topics)) != len(topics):
        problems.append(f'topics are {topics!r}; expected a topic of its own for each input')


def parse_contract(data: Any, source: str = 'contract') -> Contract:
    """Check a parsed YAML document and return the contract.

    Raises ContractError whose message lists every problem, one sentence each.
    """
    problems: list[str] = []
    root = Section('', data, problems)
    version = root.get('contract', int, f'the version number {VERSION}')
    if version not in (None, VERSION):
        root.say('contract', version, f'{VERSION}, the version this package reads')
    instruction = root.section('instruction', required=False)
    contract = Contract(
        robot=root.text('robot'),
        policy=root.text('policy'),
        cameras=_cameras(root),
        joints=_joints(root),
        action=_action(root),
        controller=_controller(root),
        gripper=_gripper(root),
        instruction_topic=instruction.text('topic', 'instruction'),
        instruction=instruction.text('default', ''),
        vectors=_vectors(root),
        limits=_limits(root),
        model=root.get('model', dict, 'a mapping', {}),
    )
    instruction.done()
    root.done()
    if not problems:
        _check_together(contract, problems)
    if problems:
        raise ContractError(
            f'{source} has {len(problems)} problem(s):\n  ' + '\n  '.join(problems)
        )
    return contract


def load_contract(name_or_path: str | Path) -> Contract:
    """Read a contract by path, or by the name of one that the package ships.

    Raises ContractError on a bad file and FileNotFoundError with every path tried.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = share_path(f'config/contracts/{name_or_path}.yaml')
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ContractError(f'{path} is not YAML: {error}') from error
    return parse_contract(data, str(path))
