# SPDX-License-Identifier: Apache-2.0
"""Read the records of an .mcap file from front to back, as far as they go.

For what a reader of indexes cannot read: files without a message index, compressed streams, and
files that a killed recorder or a broken disk left. Yields every whole message before the damage,
then raises DamagedError with the place; holds one chunk in memory and trusts no length it read.
"""

from __future__ import annotations

import importlib
import io
import struct
import sys
from binascii import crc32
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

MAGIC = b'\x89MCAP0\r\n'
HEADER, FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, DATA_END = 1, 2, 3, 4, 5, 6, 15
LARGEST = 2**31  # a longer record is a damaged length, not a picture


class DamagedError(Exception):
    """Where and how a file stops being readable."""


class Raw(NamedTuple):
    """One serialized message as it was recorded."""

    topic: str
    type: str
    received_ns: int
    data: bytes


def scan(
    stream: BinaryIO, name: str, wanted: Collection[str] | None = None
) -> Iterator[Raw]:
    """Yield the messages of a stream in the order they were written. Raises DamagedError.

    wanted: topics; None yields the first message of each topic, without its data.
    """
    if stream.read(len(MAGIC)) != MAGIC:
        raise DamagedError(f'{name} does not begin like an mcap file')
    known = Known(wanted)
    for kind, body in _records(stream, name, len(MAGIC)):
        if kind in (FOOTER, DATA_END):
            return  # what follows repeats what came
        try:
            if kind == CHUNK:
                inner = io.BytesIO(_unpack_chunk(body))
                for inner_kind, part in _records(inner, 'a chunk', 0):
                    yield from known.take(inner_kind, part)
            else:
                yield from known.take(kind, body)
        except DamagedError as error:
            raise DamagedError(f'{name}: {error}') from error
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise DamagedError(f'{name} has a damaged record: {error!r}') from error
    raise DamagedError(f'{name} is cut off: it has no end')


def _records(stream: BinaryIO, name: str, place: int) -> Iterator[tuple[int, bytes]]:
    """Yield (kind, body) until the stream ends between two records."""
    while True:
        head = stream.read(9)
        if not head:
            return
        if len(head) < 9:
            raise DamagedError(f'{name} is cut off at byte {place}')
        kind, size = struct.unpack('<BQ', head)
        if kind == 0 or size > LARGEST:
            raise DamagedError(f'{name} is damaged at byte {place}: no record begins there')
        body = stream.read(size)
        if len(body) < size:
            raise DamagedError(f'{name} is cut off at byte {place}')
        yield kind, body
        place += 9 + size


class Known:
    """The schemas and channels that a scan has passed."""

    def __init__(self, wanted: Collection[str] | None) -> None:
        self._wanted = wanted
        self._schemas: dict[int, str] = {}
        self._channels: dict[int, tuple[str, str]] = {}  # id -> topic, type
        self._seen: set[str] = set()

    def take(self, kind: int, body: bytes) -> Iterator[Raw]:
        """Note a schema or a channel, or yield a message; other records mean nothing here."""
        if kind == SCHEMA:
            (key,) = struct.unpack_from('<H', body)
            self._schemas[key] = _text(body, 2)[0]
        elif kind == CHANNEL:
            key, schema = struct.unpack_from('<HH', body)
            self._channels[key] = (_text(body, 4)[0], self._schemas.get(schema, ''))
        elif kind == MESSAGE:
            key, _, received_ns, _ = struct.unpack_from('<HIQQ', body)
            topic, type_ = self._channels[key]
            if self._wanted is None and topic not in self._seen:
                self._seen.add(topic)
                yield Raw(topic, type_, received_ns, b'')
            elif self._wanted is not None and topic in self._wanted:
                yield Raw(topic, type_, received_ns, body[22:])


def _text(body: bytes, start: int) -> tuple[str, int]:
    """Return the string at start and where the next field begins."""
    (size,) = struct.unpack_from('<I', body, start)
    end = start + 4 + size
    if end > len(body):
        raise struct.error('a string is longer than its record')
    return body[start + 4 : end].decode(), end


def _unpack_chunk(body: bytes) -> bytes:
    """Return the records of a chunk. Raises DamagedError when its size or checksum is off."""
    size, crc = struct.unpack_from('<QI', body, 16)
    compression, start = _text(body, 28)
    (packed,) = struct.unpack_from('<Q', body, start)
    data = body[start + 8 : start + 8 + packed]
    if len(data) != packed or size > LARGEST:
        raise DamagedError('a chunk is cut off')
    if compression not in UNPACKERS:
        raise DamagedError(f'a chunk is compressed by {compression!r}; known are zstd and lz4')
    try:
        plain = UNPACKERS[compression](data, size)
    except Exception as error:  # of a foreign library: whatever it is, the chunk is damaged
        raise DamagedError(f'a chunk cannot be unpacked: {error}') from error
    if len(plain) != size or (crc and crc32(plain) != crc):
        raise DamagedError('a chunk is damaged: its checksum or its size is wrong')
    return plain


def zstd() -> Any:
    """Return the zstd module: Python's own from 3.14 on, before that the one rosbags brings."""
    name = 'compression.zstd' if sys.version_info >= (3, 14) else 'backports.zstd'
    return importlib.import_module(name)


def _unpack_zstd(data: bytes, size: int) -> bytes:
    return zstd().ZstdDecompressor().decompress(data, max_length=size + 1)


def _unpack_lz4(data: bytes, size: int) -> bytes:
    return importlib.import_module('lz4.frame').LZ4FrameDecompressor().decompress(data, size + 1)


UNPACKERS: dict[str, Callable[[bytes, int], bytes]] = {
    '': lambda data, _: data, 'zstd': _unpack_zstd, 'lz4': _unpack_lz4,
}
