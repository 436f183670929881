# SPDX-License-Identifier: Apache-2.0
"""Where rosbags is missing, or knows no such storage, the robot's own rosbag2_py reads the bag.

rosbag2_py is in no package index, so that its documented interface stands in for it here: the
reader, its options and its filter, over the same files.
"""

import importlib
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import yaml
from bag_maker import CONTRACT, record
from rosbags.rosbag2 import CompressionMode, Reader

from quantvla_ros.calibration import bags_rosbag2, bags_types
from quantvla_ros.calibration.bags import observations
from quantvla_ros.calibration.frames import FrameSettings, frames_digest, frames_of


@dataclass
class StorageOptions:
    uri: str
    storage_id: str = ''


@dataclass
class ConverterOptions:
    input_serialization_format: str = ''
    output_serialization_format: str = ''


@dataclass
class StorageFilter:
    topics: list = field(default_factory=list)


class SequentialReader:
    opened = 0
    breaks_at = None

    def open(self, storage, converter):
        if converter != ConverterOptions('cdr', 'cdr'):
            raise RuntimeError('no converter')
        SequentialReader.opened += 1
        self._reader = Reader(storage.uri)
        self._reader.open()
        self._left = None
        self._topics = []
        self._count = 0

    def get_all_topics_and_types(self):
        return [SimpleNamespace(name=c.topic, type=c.msgtype) for c in self._reader.connections]

    def set_filter(self, storage_filter):
        self._topics = storage_filter.topics

    def has_next(self):
        if self._left is None:
            chosen = [c for c in self._reader.connections if c.topic in self._topics]
            self._left = iter(list(self._reader.messages(chosen)))
        self._next = next(self._left, None)
        return self._next is not None

    def read_next(self):
        self._count += 1
        if self._count == self.breaks_at:
            raise RuntimeError('disk image is malformed')
        connection, stamp, data = self._next
        return connection.topic, bytes(data), stamp


class SequentialCompressionReader(SequentialReader):
    used = 0

    def open(self, storage, converter):
        SequentialCompressionReader.used += 1
        super().open(storage, converter)


@pytest.fixture
def rosbag2(monkeypatch):
    module = SimpleNamespace(
        StorageOptions=StorageOptions, ConverterOptions=ConverterOptions,
        StorageFilter=StorageFilter, SequentialReader=SequentialReader,
        SequentialCompressionReader=SequentialCompressionReader)
    monkeypatch.setitem(sys.modules, 'rosbag2_py', module)
    monkeypatch.setattr(SequentialReader, 'breaks_at', None)
    return module


@pytest.fixture
def without_rosbags(monkeypatch):
    """As on a robot that has ROS 2 and nothing else; the stand-in keeps its own Reader."""
    found = importlib.import_module

    def missing(name, package=None):
        if name.startswith('rosbags'):
            raise ImportError(name)
        return found(name, package)

    for module in (bags_rosbag2, bags_types):
        monkeypatch.setattr(module.importlib, 'import_module', missing)
    bags_types.reader_of.cache_clear()
    yield
    bags_types.reader_of.cache_clear()


def digest_of(path):
    return frames_digest([list(observations(path, CONTRACT))])


def test_rosbag2_py_and_rclpy_read_the_same(rosbag2, request, tmp_path):
    pytest.importorskip('rclpy', reason='rclpy is not on this machine')
    bag = record(tmp_path / 'bag')
    packed = record(tmp_path / 'packed', mode=CompressionMode.MESSAGE)
    due, opened = digest_of(bag), SequentialReader.opened
    request.getfixturevalue('without_rosbags')
    assert digest_of(bag) == due
    assert SequentialReader.opened > opened
    used = SequentialCompressionReader.used
    assert digest_of(packed) == due
    assert SequentialCompressionReader.used > used


def test_storage_that_only_the_robot_knows_is_left_to_rosbag2_py(rosbag2, tmp_path):
    bag = record(tmp_path / 'bag')
    due = digest_of(bag)
    claim(bag, 'my_storage')
    with pytest.raises(ValueError, match=r'cannot be opened by rosbag2_py.*my_storage'):
        digest_of(bag)  # the stand-in is no better than rosbags here, and says so
    claim(bag, 'mcap')
    assert digest_of(bag) == due


def claim(bag, storage):
    data = yaml.safe_load((bag / 'metadata.yaml').read_text())
    data['rosbag2_bagfile_information']['storage_identifier'] = storage
    (bag / 'metadata.yaml').write_text(yaml.safe_dump(data))


def test_without_both_the_sentence_says_what_to_install(tmp_path, without_rosbags, monkeypatch):
    bag = tmp_path / 'bag.mcap'
    bag.write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'rosbag2_py', None)
    with pytest.raises(ValueError, match='needs rosbag2_py.*pip install rosbags'):
        frames_of(bag, CONTRACT)


def test_damage_that_rosbag2_py_meets_is_told(rosbag2, request, tmp_path, monkeypatch):
    pytest.importorskip('rclpy', reason='rclpy is not on this machine')
    bag = record(tmp_path / 'bag')
    request.getfixturevalue('without_rosbags')
    monkeypatch.setattr(SequentialReader, 'breaks_at', 301)
    with pytest.raises(ValueError, match=r'malformed\. Before that 300 messages'):
        frames_of(bag, CONTRACT, FrameSettings(20, 5))
