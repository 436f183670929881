# SPDX-License-Identifier: Apache-2.0
"""Weights from disk into a model, all of them or none.

A model is built without storage (torch's meta device) and every one of its tensors is then
assigned from the file; a key that is missing, unexpected or wrongly shaped refuses the whole
folder, by name. Nothing can stay at random values. Reads safetensors, one file or shards with an
index, one tensor at a time, and pickled .pt files with weights_only. Downloads nothing and runs
no code from a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quantvla_ros.quant.artifact import sha256_of
from quantvla_ros.quant.stream import PagedLinear
from quantvla_ros.quant.tensor_file import TensorFile, TensorFileError

SHOWN = 8  # keys of each kind that an error lists


class CheckpointError(ValueError):
    """A folder that cannot be served; the message says which keys or files are at fault."""


class Source(Protocol):
    """Named tensors somewhere: shapes are cheap, tensors are read one at a time."""

    files: tuple[Path, ...]  # that hold them

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor, by its key."""

    def read(self, key: str) -> Tensor:
        """Return one tensor."""

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix."""


class SafetensorsSource:
    """One safetensors file, or all shards that an index names."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self._at: dict[str, TensorFile] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            try:
                opened = TensorFile(path)
            except (OSError, TensorFileError) as error:
                raise CheckpointError(
                    f'{path} is not a whole safetensors file ({error}); copy it again'
                ) from error
            for key, entry in opened.entries.items():
                self._at[key] = opened
                shapes[key] = entry.shape
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, key: str) -> Tensor:
        """Return one tensor, in memory of its own."""
        return self._at[key].read(key)

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix; the others stay on disk."""
        return self._at[key].rows(key, rows)


class DictSource:
    """Tensors that are already in memory, and the files they came from."""

    def __init__(self, tensors: Mapping[str, Tensor], files: Iterable[Path] = ()) -> None:
        self._tensors, self.files = dict(tensors), tuple(files)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            key: tuple(value.shape) for key, value in self._tensors.items()
        }

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[key]

    def rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix."""
        return self._tensors[key][list(rows)]


def hash_of(files: Sequence[Path]) -> str:
    """Hash of a checkpoint: the file's own sha256, or that of the list of all shards' hashes."""
    hashes = {path.name: sha256_of(path) for path in files}
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = ''.join(f'{hashes[name]}  {name}\n' for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def pickle_source(path: Path) -> DictSource:
    """Read a .pt file without running anything in it."""
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f'{path} holds more than tensors ({str(error).splitlines()[0]}); '
            'save it again as a plain state dict'
        ) from error
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f'{path} is not a plain state dict of tensors')
    named = {key.removeprefix('module.'): value for key, value in tensors.items()}
    return DictSource(named, [path])


def open_weights(folder: Path) -> SafetensorsSource:
    """Open model.safetensors, or the shards that model.safetensors.index.json names."""
    single, index = folder / 'model.safetensors', folder / 'model.safetensors.index.json'
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f'{folder} lacks {", ".join(absent)}, which {index.name} names')
        return SafetensorsSource(folder / name for name in names)
    if single.is_file():
        return SafetensorsSource([single])
    raise CheckpointError(
        f'{folder} holds neither {single.name} nor {index.name}; it is not a complete checkpoint'
    )


def same(tensor: Tensor) -> Tensor:
    """Take a stored tensor as it is."""
    return tensor


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes in the model, and how it is turned on the way."""

    name: str
    turn: Callable[[Tensor], Tensor] = same
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None


# From the keys of one format to places in a model; None: this format does not know the key.
KeyMap = Callable[[str], 'Place | None']
Dead = Callable[[str], bool]


def plan(
    source: Source, wanted: Mapping[str, tuple[int, ...]], key_map: KeyMap, dead: Dead
) -> dict[str, tuple[str, Place]]:
    """Match stored keys with the model's tensors: name -> (stored key, place).

    dead(key): known tensors that no policy uses. Raises CheckpointError that lists what is
    missing, unexpected and wrongly shaped.
    """
    found: dict[str, tuple[str, Place]] = {}
    unexpected, misshapen = [], []
    for key, stored in source.shapes.items():
        place = None if dead(key) else key_map(key)
        if place is None or place.name not in wanted:
            if not dead(key):
                unexpected.append(key)
            continue
        shape = place.shape(stored) if place.shape else stored
        if shape != wanted[place.name]:
            misshapen.append(f'{key} is {list(shape)}, expected {list(wanted[place.name])}')
        found[place.name] = (key, place)
    missing = [name for name in wanted if name not in found]
    problems = [
        f'{len(keys)} {kind}: ' + '; '.join(keys[:SHOWN]) + (' ...' if len(keys) > SHOWN else '')
        for kind, keys in (
            ('missing', missing), ('unexpected', unexpected), ('wrongly shaped', misshapen)
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            'the weights do not fit this architecture and were not loaded. ' + ' | '.join(problems)
        )
    return found


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must bring."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class Stored:
    """The tensors of one model in a checkpoint: checked together, read one at a time.

    All keys are checked when it is made. Raises CheckpointError; nothing has been read then.
    """

    def __init__(
        self, model: Any, source: Source, key_map: KeyMap, dead: Dead
    ) -> None:
        self.model, self.source = model, source
        self._found = plan(source, shapes_of(model), key_map, dead)

    def read(self, name: str) -> Tensor:
        """Return one tensor of the model, in the type it is stored in."""
        key, place = self._found[name]
        return place.turn(self.source.read(key))

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Return some rows of a matrix that is stored as the model wants it."""
        key, place = self._found[name]
        assert place.turn is same
        return self.source.rows(key, rows)

    def fill(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = 'cpu',
        only: str | tuple[str, ...] = '',
    ) -> None:
        """Assign every tensor that the model still has (or those whose names start with `only`).

        Not read is what was dropped from the model, what other modules took the place of, and
        what stays on disk.
        """
        paged = {name for name, module in self.model.named_modules()
                 if isinstance(module, PagedLinear)}
        chosen = [name for name, value in self.model.state_dict().items()
                  if value.is_meta and name.startswith(only)
                  and name.rpartition('.')[0] not in paged]
        unknown = [name for name in chosen if name not in self._found]
        if unknown:
            raise CheckpointError(
                f'{len(unknown)} tensors have no value: {", ".join(unknown[:SHOWN])}')
        tensors = {name: self.read(name).to(device, dtype).contiguous() for name in chosen}
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.requires_grad_(False)
        self.model.eval()
