# SPDX-License-Identifier: Apache-2.0
"""A bag read by the robot's own rosbag2_py, where rosbags is not there or knows no such storage.

rosbag2_py comes with a ROS 2 installation and with no package index; it is looked for, never
required.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from quantvla_ros.calibration.bags_files import STORAGES, BagError, BagFiles
from quantvla_ros.calibration.bags_mcap import DamagedError, Raw
from quantvla_ros.calibration.bags_storage import Source


def needs_rosbag2(bag: BagFiles) -> bool:
    """Whether only rosbag2_py can read this bag."""
    if bag.storage not in STORAGES.values():
        return True
    try:
        importlib.import_module('rosbags.rosbag2')
    except ImportError:
        return True
    return False


@contextmanager
def open_rosbag2(bag: BagFiles) -> Iterator[Source]:
    """Open a whole bag. Raises BagError where rosbag2_py is missing or refuses."""
    try:
        rosbag2 = importlib.import_module('rosbag2_py')
    except ImportError as error:
        raise BagError(
            f'{bag.path} is stored by {bag.storage!r}, which needs rosbag2_py of a ROS 2 '
            'installation; for mcap and sqlite3 `pip install rosbags` is enough'
        ) from error
    kind = rosbag2.SequentialCompressionReader if bag.compression else rosbag2.SequentialReader
    reader = kind()
    try:
        reader.open(rosbag2.StorageOptions(uri=str(bag.path), storage_id=bag.storage),
                    rosbag2.ConverterOptions('cdr', 'cdr'))
    except Exception as error:  # of a foreign library; it has one type for everything
        raise BagError(f'{bag.path} cannot be opened by rosbag2_py: {error}') from error
    yield Rosbag2(rosbag2, reader, str(bag.path))


class Rosbag2:
    """A bag opened by rosbag2_py."""

    def __init__(self, rosbag2: Any, reader: Any, name: str) -> None:
        self._rosbag2 = rosbag2
        self._reader = reader
        self._name = name

    def topics(self) -> dict[str, str]:
        """Return topic -> type."""
        return {topic.name: topic.type for topic in self._reader.get_all_topics_and_types()}

    def messages(self, wanted: Collection[str]) -> Iterator[Raw]:
        """Yield the messages of some topics by time of receipt."""
        types = self.topics()
        try:
            self._reader.set_filter(self._rosbag2.StorageFilter(topics=sorted(wanted)))
            while self._reader.has_next():
                topic, data, received_ns = self._reader.read_next()
                yield Raw(topic, types[topic], received_ns, data)
        except OSError:
            raise
        except Exception as error:  # of a foreign library: whatever it is, the bag is damaged
            raise DamagedError(f'{self._name} is damaged: {error}') from error
