# SPDX-License-Identifier: Apache-2.0
"""Random weights that depend on their name alone, so that a comparison can be stored in little.

A stored comparison ("fixture") holds names, shapes, small files and the chunk that the public
implementation computed; the weights are drawn again from their names. Needs no public package.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw one tensor: gains around one, other vectors around zero, matrices by their fan-in."""
    key = (seed << 32) + zlib.crc32(name.encode())
    drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal(shape)
    if len(shape) == 1:
        drawn = 0.3 * drawn + (1.0 if name.endswith('weight') else 0.0)
    else:
        drawn = drawn * max(shape[-1], 1) ** -0.5
    return torch.from_numpy(np.asarray(drawn, dtype=np.float32))


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter of a module the values of its name."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(random_tensor(name, tuple(value.shape), seed))


def record(folder: Path, names: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Any]:
    """Describe a folder: texts as they are, tensors by the name they were drawn from.

    names: parameters of the module that was saved. A tensor that no name explains is stored.
    """
    described: dict[str, Any] = {'seed': seed, 'texts': {}, 'drawn': {}, 'stored': {}}
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        place = str(path.relative_to(folder))
        if path.suffix not in ('.safetensors', '.pt'):
            described['texts'][place] = _compact(path)
            continue
        pickled = path.suffix == '.pt'
        tensors = torch.load(path, weights_only=True) if pickled else load_file(str(path))
        drawn = {key: _origin(key, value, names, seed) for key, value in tensors.items()}
        described['drawn'][place] = {
            key: list(tensors[key].shape) if name == key else [name, *tensors[key].shape]
            for key, name in drawn.items()
            if name
        }
        described['stored'][place] = {
            key: tensors[key].tolist() for key, name in drawn.items() if not name
        }
    return described


def _compact(path: Path) -> str:
    """Text of a file, without the blanks of JSON."""
    text = path.read_text()
    return json.dumps(json.loads(text), separators=(',', ':')) if path.suffix == '.json' else text


def _origin(
    key: str, value: torch.Tensor, names: Mapping[str, tuple[int, ...]], seed: int
) -> str:
    shape = tuple(value.shape)
    for name in (key, *(n for n, s in names.items() if s == shape)):
        if name in names and torch.equal(random_tensor(name, shape, seed), value):
            return name
    return ''


def rebuild(described: Mapping[str, Any], folder: Path) -> None:
    """Write a described folder again, file by file."""
    for place, text in described['texts'].items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for place in described['drawn']:
        tensors = {}
        for key, entry in described['drawn'][place].items():
            name = entry[0] if entry and isinstance(entry[0], str) else key
            shape = entry[1:] if name != key else entry
            tensors[key] = random_tensor(name, tuple(shape), described['seed'])
        for key, values in described['stored'][place].items():
            tensors[key] = torch.tensor(values)
        folder.mkdir(parents=True, exist_ok=True)
        if place.endswith('.pt'):
            torch.save(tensors, folder / place)
        else:
            save_file(tensors, str(folder / place))


def read_fixture(path: Path) -> dict[str, Any]:
    """Read a stored comparison."""
    return json.loads(path.read_text())
