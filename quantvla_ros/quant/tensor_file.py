# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, read and written a tensor at a time, so that it may exceed the memory.

Tensors are read with plain reads and not through a mapping: pages of a mapping count as memory
of the process for as long as the file is open. Refuses a file that is not whole. Knows no layer.

    u64 length of the header | header (JSON, padded with blanks) | tensors, without holes
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
    'U8': torch.uint8, 'BOOL': torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000


class TensorFileError(ValueError):
    """A file that is not whole; the message says what is wrong with it."""


class Entry(NamedTuple):
    """Where one tensor lies: offset from the start of the file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def size_of(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


class TensorFile:
    """An open file: `entries` by name, `read` one tensor, `rows` of a matrix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open('rb')
        try:
            self.entries = _entries(self._file, path.stat().st_size)
        except (TensorFileError, ValueError, KeyError, TypeError) as error:
            self._file.close()
            raise TensorFileError(f'{path.name}: {error}') from error

    def read(self, name: str) -> Tensor:
        """Return one tensor in memory of its own."""
        entry = self.entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._into(data, entry.offset)
        return data.view(entry.dtype).reshape(entry.shape)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix, in the order asked for; the rest stays on disk."""
        entry = self.entries[name]
        width = entry.nbytes // max(entry.shape[0], 1)
        data = torch.empty(len(rows), width, dtype=torch.uint8)
        for place, row in enumerate(rows):
            if not 0 <= row < entry.shape[0]:
                raise IndexError(f'row {row} of {entry.shape[0]} in {name}')
            self._into(data[place], entry.offset + row * width)
        return data.view(entry.dtype).reshape(len(rows), *entry.shape[1:])

    def _into(self, data: Tensor, offset: int) -> None:
        left = data.numpy().data
        while left:
            count = os.preadv(self._file.fileno(), [left[: 1 << 30]], offset)
            if not count:
                raise TensorFileError(f'{self.path} became shorter while it was read')
            left, offset = left[count:], offset + count

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def _entries(file: Any, size: int) -> dict[str, Entry]:
    """Read the header; every byte behind it must belong to exactly one tensor."""
    head = file.read(8)
    length = int.from_bytes(head, 'little')
    if len(head) < 8 or length > min(LONGEST_HEADER, size - 8):
        raise TensorFileError('its header is cut off')
    document = json.loads(file.read(length))
    start, entries = 8 + length, {}
    for name, about in document.items():
        if name == '__metadata__':
            continue
        if about['dtype'] not in DTYPES:
            raise TensorFileError(f'{name} has dtype {about["dtype"]}, which is not read here')
        dtype, shape = DTYPES[about['dtype']], tuple(map(int, about['shape']))
        first, end = about['data_offsets']
        if end - first != size_of(dtype, shape):
            raise TensorFileError(f'{name} takes {end - first} bytes for shape {list(shape)}')
        entries[name] = Entry(dtype, shape, start + first, end - first)
    expected = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != expected:
            raise TensorFileError('its tensors overlap or leave holes')
        expected += entry.nbytes
    if expected != size:
        raise TensorFileError(f'it has {size} bytes, its header tells of {expected}')
    return entries


Described = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(
    path: Path,
    described: Described,
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file from one tensor at a time; `read` is asked for each name once, in order.

    The same tensors give the same bytes. Wide types come first, so that all lie aligned.
    """
    order = sorted(described, key=lambda name: (-described[name][0].itemsize, name))
    header: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        dtype, shape = described[name]
        end = offset + size_of(dtype, shape)
        header[name] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name in order:
            dtype, shape = described[name]
            tensor = read(name)
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f'{name} is {tensor.dtype} {tuple(tensor.shape)}; '
                                 f'{dtype} {shape} was announced')
            file.write(raw(tensor))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Spool:
    """A scratch file of tensors whose number is not known yet; read back in any order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open('w+b')
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor."""
        data = raw(tensor)
        self._entries[name] = Entry(tensor.dtype, tuple(tensor.shape), self._file.tell(),
                                    len(data))
        self._file.write(data)

    @property
    def described(self) -> Described:
        """Type and shape of every tensor."""
        return {name: (e.dtype, e.shape) for name, e in self._entries.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        entry = self._entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._file.seek(entry.offset)
        self._file.readinto(data.numpy().data)
        return data.view(entry.dtype).reshape(entry.shape)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()
