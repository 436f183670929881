# SPDX-License-Identifier: Apache-2.0
"""A robot's own bag, read as the policy would have seen it: an iterator of observations.

Accepts what `ros2 bag record` and our recorder leave: directories and single files, mcap and
sqlite3, compressed or not, with an index or without. Reads only the topics of the contract, in
one pass, in constant memory, and never writes beside the bag. What cannot be used is refused with
a sentence, a damaged file with what could be read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from quantvla_ros.action import NS_PER_S
from quantvla_ros.calibration.bags_files import BagError, BagFiles, find_files, gone
from quantvla_ros.calibration.bags_mcap import DamagedError, Raw
from quantvla_ros.calibration.bags_rosbag2 import needs_rosbag2, open_rosbag2
from quantvla_ros.calibration.bags_storage import Source, open_source
from quantvla_ros.calibration.bags_types import reader_of
from quantvla_ros.calibration.pairing import JOINTS, Pairing, camera_key
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation

__all__ = ['BagError', 'Moment', 'Reading', 'ReadOptions', 'observations']


@dataclass(frozen=True)
class ReadOptions:
    """How a bag is read.

    namespace: of the robot in the bag; None finds it, where only one robot was recorded.
    partial: use what can be read of a damaged bag instead of refusing it.
    max_back_s: stamps of one input that go back by more refuse the bag; by less, that message.
    camera_max_age_s, joints_max_age_s: how far a part may be behind the newest part of its moment,
    as the node's freshness parameters of these names; 0 takes the contract's.
    """

    namespace: str | None = None
    partial: bool = False
    max_back_s: float = 0.5
    camera_max_age_s: float = 0.0
    joints_max_age_s: float = 0.0


@dataclass
class Reading:
    """What one pass over a bag met. Filled while it runs."""

    messages: int = 0
    moments: int = 0
    first_ns: int = 0  # of receipt
    last_ns: int = 0
    damage: tuple[str, ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time between the first and the last message of the contract."""
        return (self.last_ns - self.first_ns) / NS_PER_S


@dataclass(frozen=True)
class Moment:
    """A moment at which the policy could have looked. look() decodes it, and only it.

    look is good until the next moment is asked for; it returns None for a broken picture.
    """

    number: int
    look: Callable[[], Observation | None]


def observations(
    path: str | Path, contract: Contract, options: ReadOptions | None = None
) -> Iterator[Observation]:
    """Yield every usable observation of a bag, in order. Raises BagError, a ValueError.

    The pictures of one observation share memory with its messages; copy what you keep.
    """
    for moment in moments(find_files(path), contract, options or ReadOptions(), Reading()):
        found = moment.look()
        if found is not None:
            yield found


def moments(
    bag: BagFiles, contract: Contract, options: ReadOptions, reading: Reading
) -> Iterator[Moment]:
    """Yield the usable moments of a bag and keep the account in reading. Raises BagError."""
    names = topic_names(bag, contract, options)
    pairing = Pairing(contract, options.max_back_s, ages_of(contract, options))
    if contract.instruction_topic in names:
        pairing.await_instruction()
    elif not contract.instruction:
        raise BagError(
            f'{bag.path} has no topic {contract.instruction_topic!r} and the contract no default '
            'instruction; record the instruction, or set instruction.default'
        )
    reading.rejected = pairing.rejected
    cameras = {camera.topic: camera.name for camera in contract.cameras}
    vectors = {vector.topic: vector.name for vector in contract.vectors}
    relative = {absolute: name for name, absolute in names.items()}
    decode = reader_of()
    for raw in _messages(bag, set(relative), options, reading):
        name = relative[raw.topic]
        try:
            message = decode(raw.data, raw.type)
        except ValueError:
            pairing.rejected[f'{raw.topic}: a message that cannot be decoded'] += 1
            continue
        if name in cameras:
            if pairing.take_camera(cameras[name], message, raw.received_ns):
                reading.moments += 1
                yield Moment(reading.moments - 1, pairing.look)
        elif name == contract.joints.topic:
            pairing.take_joints(message)
        elif name == contract.instruction_topic:
            pairing.take_instruction(message.data)
        else:
            pairing.take_vector(vectors[name], message, raw.received_ns)
    _check_all_came(bag, contract, pairing)


def ages_of(contract: Contract, options: ReadOptions) -> dict[str, float]:
    """Return input -> how many seconds it may be behind the newest one."""
    ages = {camera_key(camera.name): options.camera_max_age_s or camera.max_age_s
            for camera in contract.cameras}
    ages[JOINTS] = options.joints_max_age_s or contract.joints.max_age_s
    return ages


def _check_all_came(bag: BagFiles, contract: Contract, pairing: Pairing) -> None:
    missing = pairing.builder.missing()
    if missing:
        reasons = '; '.join(f'{count} {reason}' for reason, count in pairing.rejected.items())
        raise BagError(f'{bag.path} holds no usable message of {", ".join(missing)}'
                       + (f' (not used: {reasons})' if reasons else ''))


def _messages(
    bag: BagFiles, wanted: set[str], options: ReadOptions, reading: Reading
) -> Iterator[Raw]:
    """Yield the wanted messages of all files; damage ends a file, and the pass unless partial."""
    per_topic = dict.fromkeys(sorted(wanted), 0)
    for opened in _sources(bag):
        try:
            with opened as source:
                for raw in source.messages(wanted):
                    reading.messages += 1
                    per_topic[raw.topic] += 1
                    reading.first_ns = reading.first_ns or raw.received_ns
                    reading.last_ns = max(reading.last_ns, raw.received_ns)
                    yield raw
        except OSError as error:
            raise gone(bag.path, error) from error
        except DamagedError as error:
            reading.damage = (*reading.damage, str(error))
            if not options.partial:
                raise _damaged(error, reading, per_topic) from error


def _sources(bag: BagFiles) -> Iterator[AbstractContextManager[Source]]:
    """Yield what has to be opened, one after the other."""
    if needs_rosbag2(bag):
        yield open_rosbag2(bag)
        return
    for file in bag.files:
        yield open_source(file, bag.storage)


def _damaged(error: DamagedError, reading: Reading, per_topic: Mapping[str, int]) -> BagError:
    parts = ', '.join(f'{count} of {topic}' for topic, count in per_topic.items())
    return BagError(
        f'{error}. Before that {reading.messages} messages over {reading.seconds:.1f} s can be '
        f'read ({parts}); allow a partial bag to use them, or mend the file first (`mcap recover` '
        'or `ros2 bag reindex`)'
    )


def topic_names(bag: BagFiles, contract: Contract, options: ReadOptions) -> dict[str, str]:
    """Return each topic of the contract -> its name in the bag, under one namespace.

    The instruction is left out where it was not recorded; anything else is needed. Raises
    BagError when a topic is missing, has another type, or several robots were recorded.
    """
    found = _topics(bag)
    wanted = contract.topics()
    needed = [topic for topic in wanted if topic != contract.instruction_topic]
    if options.namespace is None:
        spaces = [space for space in _namespaces(found, needed)
                  if all(_absolute(space, topic) in found for topic in needed)]
        if len(spaces) > 1 and '' not in spaces:
            raise BagError(
                f'{bag.path} holds {len(spaces)} robots, under {", ".join(spaces)}; name one as '
                'namespace'
            )
        space = spaces[0] if len(spaces) == 1 else ''
    else:
        space = '/' + options.namespace.strip('/') if options.namespace.strip('/') else ''
    names = {topic: _absolute(space, topic) for topic in wanted}
    missing = [names[topic] for topic in needed if names[topic] not in found]
    if missing:
        raise BagError(
            f'{bag.path} has no topic {", ".join(missing)}, which the contract needs; it has '
            f'{", ".join(sorted(found)) or "none that can be read"}. Record it, or mend the '
            'topics in the contract'
        )
    names = {topic: name for topic, name in names.items() if name in found}
    wrong = [f'{name} is {found[name]}, expected {wanted[topic]}'
             for topic, name in names.items() if found[name] != wanted[topic]]
    if wrong:
        raise BagError(f'{bag.path}: wrong type: {"; ".join(wrong)}; mend type in the contract')
    return names


def _topics(bag: BagFiles) -> dict[str, str]:
    """Return topic -> type over all files of a bag, stopping where damage hides the rest."""
    found: dict[str, str] = {}
    for opened in _sources(bag):
        try:
            with opened as source:
                found.update(source.topics())
        except OSError as error:
            raise gone(bag.path, error) from error
        except DamagedError:
            continue  # the pass over the messages tells it, with what could be read
    return found


def _namespaces(found: Mapping[str, str], needed: list[str]) -> list[str]:
    """Return the prefixes under which the first topic of the contract is in the bag."""
    ending = '/' + needed[0].lstrip('/')
    return sorted(topic.removesuffix(ending) for topic in found if topic.endswith(ending))


def _absolute(space: str, topic: str) -> str:
    return topic if topic.startswith('/') else f'{space}/{topic}'
