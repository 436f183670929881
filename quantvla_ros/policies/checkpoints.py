# SPDX-License-Identifier: Apache-2.0
"""Weights from disk into a model, all of them or none.

A model is built without storage (torch's meta device) and every one of its tensors is then
assigned from the file; a key that is missing, unexpected or wrongly shaped refuses the whole
folder, by name. Nothing can stay at random values. Reads safetensors, one file or shards with an
index, and pickled .pt files with weights_only. Downloads nothing and runs no code from a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

SHOWN = 8  # keys of each kind that an error lists


class CheckpointError(ValueError):
    """A folder that cannot be served; the message says which keys or files are at fault."""


class Source(Protocol):
    """Named tensors somewhere: shapes are cheap, tensors are read one at a time."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every stored tensor, by its key."""

    def read(self, key: str) -> Tensor:
        """Return one tensor."""


class SafetensorsSource:
    """One safetensors file, or all shards that an index names."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                opened = safe_open(str(path), framework='pt')
                for key in opened.keys():  # noqa: SIM118  (not a mapping)
                    self._files[key] = opened
                    shapes[key] = tuple(opened.get_slice(key).get_shape())
            except Exception as error:
                raise CheckpointError(
                    f'{path} is not a whole safetensors file ({error}); copy it again'
                ) from error
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._files[key].get_tensor(key)


class DictSource:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            key: tuple(value.shape) for key, value in self._tensors.items()
        }

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        return self._tensors[key]


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
    return DictSource({key.removeprefix('module.'): value for key, value in tensors.items()})


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


def load(
    model: nn.Module,
    source: Source,
    key_map: KeyMap,
    dead: Dead,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = 'cpu',
    only: str = '',
    skip: frozenset[str] = frozenset(),
) -> None:
    """Assign every tensor of a model (or of the part whose names start with `only`).

    skip: modules that something else will take the place of; their tensors are not read.

    The keys of the whole model are checked even when a part is read, so that a streamed load
    refuses as early as a whole one. Raises CheckpointError; the model then holds no weights.
    """
    found = plan(source, shapes_of(model), key_map, dead)
    tensors = {}
    for name, (key, place) in found.items():
        if name.startswith(only) and name.rpartition('.')[0] not in skip:
            tensors[name] = place.turn(source.read(key)).to(device, dtype).contiguous()
    model.load_state_dict(tensors, strict=not only and not skip, assign=True)
    left = [
        name
        for name, value in model.state_dict().items()
        if value.is_meta and name.startswith(only) and name.rpartition('.')[0] not in skip
    ]
    if left:
        raise CheckpointError(f'{len(left)} tensors have no value: {", ".join(left[:SHOWN])}')
    model.requires_grad_(False)
    model.eval()
