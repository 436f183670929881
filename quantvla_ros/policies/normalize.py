# SPDX-License-Identifier: Apache-2.0
"""Statistics of a dataset: numbers of the robot in, numbers of the model out, and back.

Four published ways of writing them down (lerobot, openpi, GR00T, OpenVLA) become one value,
Affine. The formats differ in how they guard a number without spread; each keeps its own guard.
Knows no joint and no unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from quantvla_ros.policies.checkpoints import CheckpointError

MODES = ('quantiles', 'mean_std', 'min_max', 'identity')
LEROBOT_MODES = {
    'QUANTILES': 'quantiles',
    'MEAN_STD': 'mean_std',
    'MIN_MAX': 'min_max',
    'IDENTITY': 'identity',
}
NEEDED = {'quantiles': ('q01', 'q99'), 'mean_std': ('mean', 'std'), 'min_max': ('min', 'max')}


@dataclass(frozen=True)
class Affine:
    """How one feature is normalised: arrays (size,) float64.

    model = clip((robot - shift) / scale); robot = model * back + offset. Where a format maps a
    number without spread onto itself or onto a constant, the two ways differ.
    """

    shift: np.ndarray
    scale: np.ndarray
    back: np.ndarray
    offset: np.ndarray
    clip: np.ndarray

    @property
    def size(self) -> int:
        """How many numbers the feature has."""
        return len(self.shift)

    def to_model(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the robot (..., size) -> numbers of the model, float32."""
        normal = (np.asarray(values, np.float64) - self.shift) / self.scale
        return np.clip(normal, -self.clip, self.clip).astype(np.float32)

    def to_robot(self, values: np.ndarray) -> np.ndarray:
        """Numbers of the model (..., size) -> numbers of the robot, float64."""
        return np.asarray(values, np.float64) * self.back + self.offset


def _plain(shift: np.ndarray, scale: np.ndarray, back: np.ndarray) -> Affine:
    return Affine(shift, scale, back, shift, np.full(len(shift), np.inf))


def _span(low: np.ndarray, span: np.ndarray) -> Affine:
    """(x - low) / span * 2 - 1, written as one shift and one scale."""
    return _plain(low + span / 2, span / 2, span / 2)


def affine(mode: str, stats: Mapping[str, Any], source: str, guard: str) -> Affine:
    """Make the map of one feature.

    guard: whose rule for a scale of zero. lerobot puts 1e-8 in its place (and beside a standard
    deviation); openpi adds 1e-6 always. Raises CheckpointError that names what is missing.
    """
    if mode == 'identity':
        size = len(np.asarray(next(iter(stats.values()))))
        return _plain(np.zeros(size), np.ones(size), np.ones(size))
    absent = [name for name in NEEDED[mode] if stats.get(name) is None]
    if absent:
        raise CheckpointError(f'{source} lacks {", ".join(absent)}, which {mode} needs')
    first, second = (np.asarray(stats[n], np.float64).reshape(-1) for n in NEEDED[mode])
    if mode == 'mean_std':
        if guard == 'openpi':
            return _plain(first, second + 1e-6, second + 1e-6)
        return _plain(first, second + 1e-8, second)
    span = second - first
    if guard == 'openpi':
        return _span(first, span + 1e-6)
    return _span(first, np.where(span == 0, 1e-8, span))


def groot_affine(mode: str, stats: Mapping[str, Any], source: str) -> Affine:
    """Make the map of one part of GR00T: numbers without spread have rules of their own.

    min_max sends them to 0, quantiles and mean_std leave them as they are; quantiles also clip.
    """
    if mode == 'identity':
        return affine(mode, stats, source, 'groot')
    absent = [name for name in NEEDED[mode] if stats.get(name) is None]
    if absent:
        raise CheckpointError(f'{source} lacks {", ".join(absent)}, which {mode} needs')
    first, second = (np.asarray(stats[n], np.float64).reshape(-1) for n in NEEDED[mode])
    flat = second == 0 if mode == 'mean_std' else first == second
    map_ = _plain(first, second, second) if mode == 'mean_std' else _span(first, second - first)
    kept = np.inf if mode == 'min_max' else 1.0
    return Affine(
        np.where(flat & (mode != 'min_max'), 0.0, map_.shift),
        np.where(flat, kept, map_.scale),
        map_.back,
        map_.offset,
        np.full(len(first), 1.0 if mode == 'quantiles' else np.inf),
    )


def join(maps: Sequence[Affine]) -> Affine:
    """Put the maps of several parts behind one another."""
    columns = [[getattr(m, f.name) for m in maps] for f in fields(Affine)]
    return Affine(*(np.concatenate(column) for column in columns))


def lerobot_statistics(
    folder: Path, config: Mapping[str, Any]
) -> tuple[Affine | None, Affine | None]:
    """State and action of a lerobot folder, found through the names its processor files give."""
    modes = {
        kind: LEROBOT_MODES[mode] for kind, mode in config.get('normalization_mapping', {}).items()
    }
    before = _step_state(folder / 'policy_preprocessor.json', 'normalizer_processor')
    after = _step_state(folder / 'policy_postprocessor.json', 'unnormalizer_processor')
    return (
        _feature(before, 'observation.state', modes.get('STATE', 'identity'), folder),
        _feature(after, 'action', modes.get('ACTION', 'identity'), folder),
    )


def _step_state(pipeline: Path, step: str) -> dict[str, np.ndarray]:
    """Tensors of one processor step; the pipeline's file says in which file they are."""
    if not pipeline.is_file():
        raise CheckpointError(
            f'{pipeline.parent} lacks {pipeline.name}: a checkpoint older than lerobot 0.4 holds '
            'its statistics inside the weights; migrate it with lerobot first'
        )
    for part in json.loads(pipeline.read_text()).get('steps', []):
        if part.get('registry_name') == step and part.get('state_file'):
            path = pipeline.parent / part['state_file']
            if not path.is_file():
                raise CheckpointError(f'{pipeline.name} names {path.name}, which is not there')
            return load_file(str(path))
    return {}


def _feature(
    tensors: Mapping[str, np.ndarray], feature: str, mode: str, folder: Path
) -> Affine | None:
    stats = {
        key.rpartition('.')[2]: value
        for key, value in tensors.items()
        if key.rpartition('.')[0] == feature
    }
    if not stats:
        return None
    return affine(mode, stats, f'{folder.name}: {feature}', 'lerobot')


def openpi_statistics(folder: Path, asset: str, mode: str) -> tuple[Affine, Affine]:
    """State and action of an openpi folder: assets/<asset>/norm_stats.json."""
    found = {path.parent.name: path for path in sorted(folder.rglob('norm_stats.json'))}
    if not found:
        raise CheckpointError(f'{folder} has no norm_stats.json; copy assets/ of the checkpoint')
    if asset not in found and len(found) > 1:
        raise CheckpointError(
            f'{folder} has statistics of {", ".join(found)}; say which in model.statistics '
            f'of the contract (it says {asset!r})'
        )
    path = found.get(asset) or next(iter(found.values()))
    stats = json.loads(path.read_text())['norm_stats']
    return (
        affine(mode, stats['state'], f'{path}: state', 'openpi'),
        affine(mode, stats['actions'], f'{path}: actions', 'openpi'),
    )
