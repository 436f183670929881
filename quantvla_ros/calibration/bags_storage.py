# SPDX-License-Identifier: Apache-2.0
"""One file of a bag, read-only: which topics it has, and their serialized messages.

Files with an index are read through rosbags, in the order of receipt; those without are scanned
whole in the order of writing. Damage raises DamagedError once all before it has been yielded.
Holds one message or one chunk in memory.
"""

from __future__ import annotations

import importlib
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from quantvla_ros.calibration.bags_files import PACKED
from quantvla_ros.calibration.bags_mcap import DamagedError, Raw, scan, zstd

ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'  # no serialized message begins with it: those begin with 0


class Source(Protocol):
    """One opened file."""

    def topics(self) -> dict[str, str]:
        """Return topic -> type, of those that were found."""

    def messages(self, wanted: Collection[str]) -> Iterator[Raw]:
        """Yield the messages of some topics. Raises DamagedError and OSError."""


@contextmanager
def open_source(file: Path, storage: str) -> Iterator[Source]:
    """Open one file of a bag, mcap or sqlite3, by the best reader for it."""
    if storage == 'mcap' and file.name.endswith(PACKED):
        yield McapScan(file)
        return
    with _unpacked(file) as plain:
        reader = _rosbags_reader(plain)
        if reader is None:
            yield McapScan(plain) if storage == 'mcap' else SqliteScan(plain)
            return
        try:
            yield Indexed(reader, file.name)
        finally:
            reader.close()


@contextmanager
def _unpacked(file: Path) -> Iterator[Path]:
    """Give a packed database as a plain file for a while; what is not packed as it is."""
    if not file.name.endswith(PACKED):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix='quantvla_bag_') as folder:
        plain = Path(folder, file.name.removesuffix(PACKED))
        with file.open('rb') as packed, plain.open('wb') as out:
            try:
                shutil.copyfileobj(zstd().open(packed, 'rb'), out)
            except (zstd().ZstdError, EOFError) as error:
                raise DamagedError(f'{file.name} cannot be unpacked: {error}') from error
        yield plain


def _rosbags_reader(file: Path) -> Any:
    """Return an opened rosbags reader, or None where its way of reading would lose messages.

    It refuses a file without an end and passes over every chunk that has no message index.
    """
    reader = importlib.import_module('rosbags.rosbag2').Reader(file)
    try:
        reader.open()
    except OSError:
        raise
    except Exception:  # of a foreign library on a damaged file: the scan will say where
        return None
    if file.suffix == '.mcap':
        chunks = reader.storage.chunks
        if not chunks or not all(any(chunk.channel_count.values()) for chunk in chunks):
            reader.close()
            return None
    return reader


class Indexed:
    """A whole file with an index."""

    def __init__(self, reader: Any, name: str) -> None:
        self._reader = reader
        self._name = name

    def topics(self) -> dict[str, str]:
        """Return topic -> type."""
        return {connection.topic: connection.msgtype for connection in self._reader.connections}

    def messages(self, wanted: Collection[str]) -> Iterator[Raw]:
        """Yield the messages of some topics by time of receipt."""
        chosen = [c for c in self._reader.connections if c.topic in wanted]
        if not chosen:
            return
        due, count = sum(connection.msgcount for connection in chosen), 0
        try:
            for connection, received_ns, data in self._reader.messages(chosen):
                count += 1
                yield Raw(connection.topic, connection.msgtype, received_ns, plain(data))
        except OSError:
            raise
        except Exception as error:  # of a foreign library: whatever it is, the file is damaged
            raise DamagedError(f'{self._name} is damaged: {error}') from error
        if count < due:  # blocks of zeros, as a power cut leaves them, read as if nothing were
            lost = f'{due - count} of {due} messages are lost'
            raise DamagedError(f'{self._name} is damaged: {lost}')


class McapScan:
    """An .mcap file without a message index, perhaps packed, perhaps damaged."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def topics(self) -> dict[str, str]:
        """Return topic -> type of the messages before any damage."""
        found: dict[str, str] = {}
        try:
            for raw in self._scan(None):
                found[raw.topic] = raw.type
        except DamagedError:
            pass  # whoever reads the messages is told
        return found

    def messages(self, wanted: Collection[str]) -> Iterator[Raw]:
        """Yield the messages of some topics in the order of writing."""
        for raw in self._scan(wanted):
            yield raw._replace(data=plain(raw.data))

    def _scan(self, wanted: Collection[str] | None) -> Iterator[Raw]:
        with self._file.open('rb') as file:
            if not self._file.name.endswith(PACKED):
                yield from scan(file, self._file.name, wanted)
                return
            stream: BinaryIO = zstd().open(file, 'rb')
            try:
                yield from scan(stream, self._file.name, wanted)
            except (zstd().ZstdError, EOFError) as error:
                raise DamagedError(f'{self._file.name} cannot be unpacked: {error}') from error


class SqliteScan:
    """A damaged .db3: what can still be read, row by row."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def topics(self) -> dict[str, str]:
        """Return topic -> type, nothing where even these are lost."""
        try:
            with closing(self._connect()) as connection:
                return dict(connection.execute('SELECT name, type FROM topics').fetchall())
        except sqlite3.Error:
            return {}

    def messages(self, wanted: Collection[str]) -> Iterator[Raw]:
        """Yield what can be read in the order of writing, then raise DamagedError."""
        try:
            with closing(self._connect()) as connection:
                rows = connection.execute('SELECT id, name, type FROM topics').fetchall()
                names = {key: (name, kind) for key, name, kind in rows}
                query = 'SELECT topic_id, timestamp, data FROM messages ORDER BY id'
                for key, received_ns, data in connection.execute(query):
                    name, kind = names.get(key, ('', ''))
                    if name in wanted:
                        yield Raw(name, kind, received_ns, plain(data))
        except sqlite3.Error as error:
            raise DamagedError(f'{self._file.name} is damaged: {error}') from error
        raise DamagedError(f'{self._file.name} is damaged: its index cannot be read')

    def _connect(self) -> sqlite3.Connection:
        uri = f'{self._file.absolute().as_uri()}?mode=ro&immutable=1'
        return sqlite3.connect(uri, uri=True)


def plain(data: bytes) -> bytes:
    """Unpack a message that was compressed by itself. Raises DamagedError."""
    if data[:4] != ZSTD_MAGIC:
        return data
    try:
        return zstd().decompress(data)
    except Exception as error:  # of a foreign library: the message is damaged
        raise DamagedError(f'a compressed message cannot be unpacked: {error}') from error
