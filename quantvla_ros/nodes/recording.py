# SPDX-License-Identifier: Apache-2.0
"""Write one rosbag2 mcap directory from raw messages: a bounded queue and one writer thread.

Owns what is recorded, when recording must stop and how the bag is closed. Never blocks the one
who offers a message, never leaves half-written metadata, and says why it stopped. No rclpy here.
"""

from __future__ import annotations

import collections
import errno
import io
import os
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantvla_ros.contract import Contract
from quantvla_ros.nodes.parameters import CONFIGURE, START, Parameter

MB = 1_000_000
RESERVE_BYTES = 16 * MB  # freed when the disk is full, so that the last chunk and the index fit
FOOTER = b'\x0f\x04' + bytes(11) + b'\x02\x14' + bytes(27) + b'\x89MCAP0\r\n'  # no summary
CHECK_S = 0.5  # how often the buffer is flushed and the free space is looked at
FULL = (errno.ENOSPC, errno.EDQUOT)

RECORD_NODE: tuple[Parameter, ...] = (
    Parameter('contract', 'libero_panda', '', START,
              'Contract whose topics are recorded: the name of a shipped one, or a path.'),
    Parameter('autostart', False, '', START,
              'Configure and activate without a lifecycle manager.'),
    Parameter('record_on_activate', True, '', CONFIGURE,
              'Record at activate; false waits for ~/record.'),
    Parameter('bag', '', '', CONFIGURE,
              'Folder of the new bag; empty makes bags/quantvla_DATE_TIME. A further recording '
              'adds _2, _3, ... to a given name.'),
    Parameter('queue_mb', 256, 'MB', CONFIGURE,
              'Messages that may wait for the disk; past it new ones are dropped and counted.',
              1, 65536),
    Parameter('min_free_mb', 500, 'MB', CONFIGURE,
              'Recording stops, and does not start, when less disk than this is free.',
              0, 1_000_000),
)


class RecordingError(ValueError):
    """A recording that could not start, or ended early; the message says what to do."""


def recorded_topics(contract: Contract) -> dict[str, str]:
    """Return every topic of a recording -> its type: inputs, commands, plan and status."""
    command = ('trajectory_msgs/msg/JointTrajectory'
               if contract.controller.kind == 'joint_trajectory'
               else 'std_msgs/msg/Float64MultiArray')
    found = {**contract.topics(), contract.controller.topic: command}
    if contract.gripper.kind == 'topic':
        found[contract.gripper.topic] = 'std_msgs/msg/Float64MultiArray'
    return {
        **found,
        'policy_node/chunk': 'trajectory_msgs/msg/JointTrajectory',
        'policy_node/status': 'std_msgs/msg/String',
        'robot_description': 'std_msgs/msg/String',
        '/diagnostics': 'diagnostic_msgs/msg/DiagnosticArray',
    }


def new_bag(wanted: str) -> Path:
    """Return a folder that does not exist yet: the wanted one, or numbered after it."""
    base = Path(wanted or time.strftime('bags/quantvla_%Y%m%d_%H%M%S')).absolute()
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f'{base.name}_{number}')
    return path


@dataclass(frozen=True)
class Topic:
    """One recorded topic and how its publishers offer it, which a replay must repeat."""

    type: str
    reliable: bool = True
    latched: bool = False


@dataclass(frozen=True)
class Limits:
    """What a recording may use: bytes that wait in memory, bytes that stay free on the disk."""

    queue_bytes: int = 256 * MB
    min_free_bytes: int = 500 * MB


@dataclass
class Report:
    """What has been recorded. The writer thread writes, everyone reads."""

    bag: str
    messages: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    cause: str = ''  # why it ended early; empty while all is well
    closed: bool = False
    indexed: bool = False


class ReservedFile(io.FileIO):
    """A file that frees its reserve when the disk is full and then goes on.

    A chunk is therefore either whole or absent, and the index still fits behind it.
    """

    def __init__(self, path: Path, reserve: Path) -> None:
        super().__init__(path, 'r+')
        self.reserve = reserve
        self.full = ''

    def write(self, data: Any) -> int:
        """Write like any file; the first 'disk full' costs the reserve and is remembered."""
        try:
            return self._put(data)
        except OSError as error:
            if error.errno not in FULL or self.full:
                raise
            self.full = f'{self.name}: {error.strerror}'
            self.reserve.unlink(missing_ok=True)
            return self._put(data)

    def _put(self, data: Any) -> int:
        return super().write(data)


class Recording:
    """One bag while it is written. Make it to start, offer messages, stop it to close."""

    def __init__(self, bag: Path, topics: Mapping[str, Topic], limits: Limits) -> None:
        """Create the bag and start its writer. Raises RecordingError with the way out."""
        self.report = Report(str(bag))
        self._limits = limits
        self._queue: collections.deque[tuple[str, int, bytes]] = collections.deque()
        self._waiting = 0  # bytes in the queue
        self._stopping = False
        self._broken = False
        self._changed = threading.Condition()
        self._open(bag, topics)
        self._thread = threading.Thread(target=self._run, name='bag writer', daemon=True)
        self._thread.start()

    def _open(self, bag: Path, topics: Mapping[str, Topic]) -> None:
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore

        store = get_typestore(Stores.ROS2_JAZZY)
        made = False
        try:
            bag.parent.mkdir(parents=True, exist_ok=True)
            self._check_space(bag.parent)
            self._writer: Any = Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP)
            self._writer.open()
            made = True
            self._connections = {
                name: self._writer.add_connection(
                    name, topic.type, typestore=store, offered_qos_profiles=[_offered(topic)])
                for name, topic in topics.items()
            }
            self._file = self._reserve(bag)
        except OSError as error:
            if made:
                self._writer.abort()
                shutil.rmtree(bag, ignore_errors=True)
            raise RecordingError(
                f'cannot write a bag at {bag}: {error.strerror}; give the parameter bag a folder '
                'that this user may write and that has room'
            ) from error

    def _reserve(self, bag: Path) -> ReservedFile:
        """Set space aside and put the reserved file under the writer."""
        reserve = bag / 'reserve.tmp'
        with reserve.open('wb') as ballast:
            os.posix_fallocate(ballast.fileno(), 0, RESERVE_BYTES)
        storage = self._writer.storage
        storage.bio.close()
        file = ReservedFile(storage.path, reserve)
        storage.bio = io.BufferedWriter(file)
        self._whole = storage.bio.seek(0, io.SEEK_END)  # every byte before it is a whole record
        return file

    def _check_space(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free
        if free < self._limits.min_free_bytes:
            raise RecordingError(
                f'{folder} has {free // MB} MB free, less than min_free_mb, '
                f'{self._limits.min_free_bytes // MB}; free some disk or record elsewhere'
            )

    @property
    def running(self) -> bool:
        """Whether messages are still taken."""
        return not (self._stopping or self.report.cause or self.report.closed)

    def offer(self, topic: str, stamp_ns: int, data: bytes) -> bool:
        """Queue one serialized message; returns False, and counts, when it is dropped."""
        with self._changed:
            if not self.running or self._waiting + len(data) > self._limits.queue_bytes:
                self.report.dropped[topic] = self.report.dropped.get(topic, 0) + 1
                return False
            self._queue.append((topic, stamp_ns, data))
            self._waiting += len(data)
            self._changed.notify()
        return True

    def stop(self, timeout_s: float = 30.0) -> Report:
        """Write what waits, close the bag and return what was recorded."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self.report.cause = f'the disk did not take the rest within {timeout_s:g} s'
        return self.report

    def _run(self) -> None:
        """Writer thread: the only one that touches the bag."""
        try:
            self._write_all()
        except (OSError, RecordingError) as error:
            self.report.cause = str(error)
        except Exception as error:  # border of a thread: the cause must be seen
            self.report.cause = f'writer failed: {error!r}'
        finally:
            self._close()

    def _write_all(self) -> None:
        checked = time.monotonic()
        while True:
            with self._changed:
                while not self._queue and not self._stopping:
                    self._changed.wait(CHECK_S)
                    if time.monotonic() - checked >= CHECK_S:
                        break
                item = self._queue.popleft() if self._queue else None
                if item is not None:
                    self._waiting -= len(item[2])
                elif self._stopping:
                    return
            if item is not None:
                self._write(*item)
            if time.monotonic() - checked >= CHECK_S:
                self._writer.storage.bio.flush()  # what a killed recorder leaves is half a second
                self._check_space(Path(self.report.bag))
                checked = time.monotonic()
            if self._file.full:
                raise RecordingError(f'disk full: {self._file.full}')

    def _write(self, topic: str, stamp_ns: int, data: bytes) -> None:
        try:
            self._writer.write(self._connections[topic], stamp_ns, data)
        except OSError:
            self._broken = True  # a chunk is half written: only what is before it can be kept
            raise
        self._whole = self._writer.storage.bio.tell()
        self.report.messages[topic] = self.report.messages.get(topic, 0) + 1
        self.report.bytes += len(data)

    def _close(self) -> None:
        """Close with index and metadata; where even that fails, keep the whole chunks."""
        try:
            self._file.reserve.unlink(missing_ok=True)
            if not self._broken:
                self._writer.close()
                self.report.indexed = True
        except Exception as error:  # closing must not hide the first cause
            self.report.cause = self.report.cause or f'closing failed: {error}'
        if not self.report.indexed:
            self._cut()
        if self._file.full and not self.report.cause:
            self.report.cause = f'disk full: {self._file.full}'
        self.report.closed = True

    def _cut(self) -> None:
        """Cut after the last whole chunk and end the file, so that readers can scan it."""
        with suppress(Exception):
            self._writer.abort()
        with suppress(OSError):
            os.truncate(self._file.name, self._whole)
            with open(self._file.name, 'ab') as file:
                file.write(FOOTER)
        for name in ('metadata.yaml', 'metadata.yaml.tmp'):
            Path(self.report.bag, name).unlink(missing_ok=True)


def _offered(topic: Topic) -> Any:
    from rosbags.interfaces import (
        Qos,
        QosDurability,
        QosHistory,
        QosLiveliness,
        QosReliability,
        QosTime,
    )

    forever = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST, 1,
        QosReliability.RELIABLE if topic.reliable else QosReliability.BEST_EFFORT,
        QosDurability.TRANSIENT_LOCAL if topic.latched else QosDurability.VOLATILE,
        forever, forever, QosLiveliness.AUTOMATIC, forever, False,
    )
