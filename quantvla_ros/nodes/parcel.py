# SPDX-License-Identifier: Apache-2.0
"""Observations and chunks as bytes, for a socket between two processes of this package.

A parcel is JSON and the raw bytes of arrays, so that every number arrives to the last bit and
nothing that is read can run. Pictures go out from where they lie: putting them together first
took most of the time. Knows no policy.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.observation import Observation

Arrays = Mapping[str, np.ndarray]
Parcel = list[bytes | memoryview]
LENGTH = 4  # bytes that tell how long the JSON is
SIZE = 8  # bytes that tell how long a parcel is


def pack(head: Mapping[str, Any], arrays: Arrays | None = None) -> Parcel:
    """Return a parcel of a JSON-ready mapping and named arrays, whose memory it shares."""
    whole = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = [(name, array.dtype.str, array.shape) for name, array in whole.items()]
    text = json.dumps([head, listed]).encode()
    return [len(text).to_bytes(LENGTH, 'little'), text,
            *(array.reshape(-1).view(np.uint8).data for array in whole.values())]


def send(channel: socket.socket, parcel: Parcel) -> None:
    """Send all of a parcel. Raises OSError where nobody listens any more."""
    parts: Parcel = [sum(map(len, parcel)).to_bytes(SIZE, 'little'), *parcel]
    while parts:
        sent = channel.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = memoryview(parts[0])[sent:]


def receive(channel: socket.socket) -> bytearray:
    """Wait for the bytes of a parcel. Raises EOFError where the other side has gone."""
    return _exactly(channel, int.from_bytes(_exactly(channel, SIZE), 'little'))


def _exactly(channel: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    left = memoryview(data)
    while left:
        got = channel.recv_into(left)
        if not got:
            raise EOFError('the other side has gone')
        left = left[got:]
    return data


def unpack(data: bytes | bytearray) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what was packed; the arrays share memory with the bytes and are read-only."""
    start = LENGTH + int.from_bytes(data[:LENGTH], 'little')
    head, listed = json.loads(data[LENGTH:start])
    arrays = {}
    for name, dtype, shape in listed:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        arrays[name].flags.writeable = False
        start += arrays[name].nbytes
    return head, arrays


def pack_observation(observation: Observation, **head: Any) -> Parcel:
    """Return a parcel of an observation, with what else is to be told."""
    arrays = {f'image {name}': image for name, image in observation.images.items()}
    arrays.update({f'vector {name}': values for name, values in observation.vectors.items()})
    arrays['joints'] = observation.joint_positions
    return pack({
        **head, 'images': dict(observation.image_stamps_ns),
        'vectors': dict(observation.vector_stamps_ns), 'joints': observation.joint_names,
        'stamp_ns': observation.joint_stamp_ns, 'instruction': observation.instruction,
    }, arrays)


def observation_of(head: Mapping[str, Any], arrays: Arrays) -> Observation:
    """Return the observation of an unpacked parcel."""
    return Observation(
        images={name: arrays[f'image {name}'] for name in head['images']},
        image_stamps_ns=head['images'],
        joint_names=tuple(head['joints']),
        joint_positions=arrays['joints'],
        joint_stamp_ns=head['stamp_ns'],
        instruction=head['instruction'],
        vectors={name: arrays[f'vector {name}'] for name in head['vectors']},
        vector_stamps_ns=head['vectors'],
    )


def pack_chunk(chunk: ActionChunk | None, **head: Any) -> Parcel:
    """Return a parcel of a chunk, or of none, with what else is to be told."""
    if chunk is None:
        return pack(head)
    about = {'joints': chunk.joint_names, 'stamp_ns': chunk.stamp_ns,
             'step_dt_s': chunk.step_dt_s}
    return pack({**head, **about}, {'positions': chunk.positions})


def chunk_of(head: Mapping[str, Any], arrays: Arrays) -> ActionChunk | None:
    """Return the chunk of an unpacked parcel, None where it holds none."""
    if 'positions' not in arrays:
        return None
    return ActionChunk(
        tuple(head['joints']), arrays['positions'], head['stamp_ns'], head['step_dt_s'])
