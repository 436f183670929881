# SPDX-License-Identifier: Apache-2.0
"""Demonstrations on disk: int16 states that travel well, and the frames rendered from them.

One npz holds some episodes of one task, without pickles; its frames lie beside it as one npy once
they are rendered. A file appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantvla_ros.training.demonstrations import Demonstration

QUANTUM = 1.25e-4  # rad or m of one unit of the stored int16: up to 4.09 either way
LARGEST = 32767


def to_int16(values: np.ndarray) -> np.ndarray:
    """Round SI values to the stored unit; what is farther away than 4 m is clipped."""
    return np.round(np.asarray(values) / QUANTUM).clip(-LARGEST, LARGEST).astype(np.int16)


def from_int16(values: np.ndarray) -> np.ndarray:
    """Return SI values."""
    return values.astype(np.float64) * QUANTUM


def write_episodes(path: Path, task: str, episodes: Sequence[Demonstration]) -> None:
    """Write some episodes of one task. Fixtures are kept as they are, everything else as int16."""
    names = sorted(episodes[0].fixtures)
    fixtures = np.array([
        [np.concatenate(episode.fixtures[name]) for name in names] for episode in episodes
    ]).reshape(len(episodes), len(names), 7)
    header = {'task': task, 'fixtures': names, 'kinds': [episode.kind for episode in episodes]}
    temporary = path.with_name(path.name + '.part')
    with temporary.open('wb') as file:
        np.savez_compressed(
            file,
            header=np.frombuffer(json.dumps(header).encode(), np.uint8),
            fixtures=fixtures,
            frames=np.array([len(episode.qpos) for episode in episodes]),
            steps=np.array([len(episode.states) for episode in episodes]),
            qpos=to_int16(np.concatenate([episode.qpos for episode in episodes])),
            states=to_int16(np.concatenate([episode.states for episode in episodes])),
            commands=to_int16(np.concatenate([episode.commands for episode in episodes])),
        )
    os.replace(temporary, path)


def read_episodes(path: Path) -> list[Demonstration]:
    """Read the episodes of a file back, in SI."""
    with np.load(path, allow_pickle=False) as data:
        header = json.loads(bytes(data['header']))
        parts = {name: data[name] for name in ('fixtures', 'frames', 'steps', 'qpos', 'states',
                                               'commands')}
    at_frame = np.concatenate([[0], np.cumsum(parts['frames'])])
    at_step = np.concatenate([[0], np.cumsum(parts['steps'])])
    return [
        Demonstration(
            header['task'],
            kind,
            {name: (row[:3], row[3:]) for name, row in zip(header['fixtures'],
                                                            parts['fixtures'][i], strict=True)},
            from_int16(parts['qpos'][at_frame[i] : at_frame[i + 1]]),
            from_int16(parts['states'][at_step[i] : at_step[i + 1]]),
            from_int16(parts['commands'][at_step[i] : at_step[i + 1]]),
        )
        for i, kind in enumerate(header['kinds'])
    ]


def frames_path(path: Path) -> Path:
    """Where the rendered frames of a file of episodes lie."""
    return path.with_suffix('.frames.npy')


def episode_files(folder: Path) -> list[Path]:
    """List the files of episodes, sorted."""
    return sorted(folder.glob('*.npz'))
