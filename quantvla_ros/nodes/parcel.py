# SPDX-License-Identifier: Apache-2.0
"""Observations and chunks as bytes, for a pipe between two processes of this package.

A parcel is JSON and the raw bytes of arrays, so that every number arrives to the last bit and
nothing that is read can run. Knows no policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.observation import Observation

Arrays = Mapping[str, np.ndarray]
LENGTH = 4  # bytes that tell how long the JSON is


def pack(head: Mapping[str, Any], arrays: Arrays | None = None) -> bytes:
    """Return a parcel of a JSON-ready mapping and named arrays."""
    whole = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = [(name, array.dtype.str, array.shape) for name, array in whole.items()]
    text = json.dumps([head, listed]).encode()
    parts = [len(text).to_bytes(LENGTH, 'little'), text]
    return b''.join([*parts, *(array.tobytes() for array in whole.values())])


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what was packed; the arrays share memory with the bytes and are read-only."""
    start = LENGTH + int.from_bytes(data[:LENGTH], 'little')
    head, listed = json.loads(data[LENGTH:start])
    arrays = {}
    for name, dtype, shape in listed:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += arrays[name].nbytes
    return head, arrays


def pack_observation(observation: Observation, **head: Any) -> bytes:
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


def pack_chunk(chunk: ActionChunk | None, **head: Any) -> bytes:
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
