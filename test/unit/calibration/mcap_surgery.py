# SPDX-License-Identifier: Apache-2.0
"""Whole .mcap files into the ones that fast, killed and damaged recorders leave."""

import io
import struct

MAGIC = b'\x89MCAP0\r\n'
SCHEMA, CHANNEL, MESSAGE, CHUNK, MESSAGE_INDEX, CHUNK_INDEX, STATISTICS = 3, 4, 5, 6, 7, 8, 11
DATA_END = b'\x0f' + struct.pack('<QI', 4, 0)


def records(data):
    """Yield (kind, body, offset) of the top level, up to the end magic."""
    place = len(MAGIC)
    while place < len(data) - len(MAGIC):
        kind, size = struct.unpack_from('<BQ', data, place)
        yield kind, data[place + 9 : place + 9 + size], place
        place += 9 + size


def record(kind, body):
    return struct.pack('<BQ', kind, len(body)) + body


def footer(summary_start=0):
    return record(2, struct.pack('<QQI', summary_start, 0, 0)) + MAGIC


def chunk_records(body):
    """Return the plain records of an uncompressed chunk."""
    (size,) = struct.unpack_from('<I', body, 28)
    assert size == 0, 'compressed'
    return body[40:]


def without_chunks(data, summary=True):
    """As storage preset fastwrite writes: no chunks, no index, at most a few facts at the end."""
    out, facts = io.BytesIO(), []
    out.write(MAGIC)
    for kind, body, _ in records(data):
        if kind == 1:
            out.write(record(1, body))
        elif kind == CHUNK:
            out.write(chunk_records(body))
        elif kind == STATISTICS:
            body = body[:22] + struct.pack('<I', 0) + body[26:]  # no chunks
            facts.append(record(kind, body))
    tail = [(k, b) for k, b, _ in records(data)]
    end = next(i for i, (kind, _) in enumerate(tail) if kind == 15)
    facts = [record(k, b) for k, b in tail[end:] if k in (SCHEMA, CHANNEL)] + facts
    out.write(DATA_END)
    start = out.tell() if summary else 0
    if summary:
        out.write(b''.join(facts))
    out.write(footer(start))
    return out.getvalue()


def without_message_index(data):
    """Chunks and their index, but no index of messages."""
    head, facts, start = b'', [], 0
    for kind, body, place in records(data):
        if kind == 15:
            head, start = data[: place + 13], place + 13
        elif start and kind == CHUNK_INDEX:
            (size,) = struct.unpack_from('<I', body, 32)
            rest = body[36 + size + 8 :]
            facts.append(record(kind, body[:32] + struct.pack('<IQ', 0, 0) + rest))
        elif start and kind in (SCHEMA, CHANNEL, STATISTICS):
            facts.append(record(kind, body))
    return head + b''.join(facts) + footer(start)


def without_end(data):
    """What a killed recorder leaves: neither index nor end."""
    end = next(place for kind, _, place in records(data) if kind == 15)
    return data[:end]
