# SPDX-License-Identifier: Apache-2.0
"""Demonstrations as tensors that stay on the training device: frames as uint8, labels on demand.

A label is the chunk of the expert's commands from a frame on, joint targets relative to the
measured joints. Every process holds its own share of the episodes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.policies.libero_checkpoint import Statistics
from quantvla_ros.policies.vocabulary import Vocabulary
from quantvla_ros.training.demonstrations import FRAME_EVERY
from quantvla_ros.training.store import QUANTUM, episode_files, frames_path

HELD_OUT = 50  # every so many files, one is for validation
JOINTS = 7
READERS = 8
MIN_ACTION_STD = 0.01
MIN_STATE_STD = 1e-3


@dataclass
class Demonstrations:
    """Frames and what belongs to each; on one device.

    images: (frames, views, size, size, 3) uint8. first, last: (frames,) the frame's control step
    and its episode's last one, rows of states (steps, 9) and commands (steps, 8). words:
    (frames, length). weight: (frames,) how often it is drawn. held_out: (frames,) bool.
    """

    images: Tensor
    first: Tensor
    last: Tensor
    words: Tensor
    weight: Tensor
    held_out: Tensor
    states: Tensor
    commands: Tensor
    episodes: int

    def labels(self, frames: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Return states (B, 9) and chunks (B, chunk, 8) of some frames, SI."""
        first = self.first[frames]
        state = self.states[first]
        steps = torch.arange(chunk, device=first.device)
        rows = torch.minimum(first[:, None] + steps, self.last[frames][:, None])
        action = self.commands[rows].clone()
        action[..., :JOINTS] -= state[:, None, :JOINTS]
        return state, action


@dataclass(frozen=True)
class _File:
    path: Path
    task: str
    held_out: bool
    kinds: list[str]
    frames: np.ndarray
    steps: np.ndarray
    states: np.ndarray
    commands: np.ndarray


def _read(path: Path, held_out: bool) -> _File:
    with np.load(path, allow_pickle=False) as data:
        header = json.loads(bytes(data['header']))
        return _File(
            path, header['task'], held_out, header['kinds'], data['frames'], data['steps'],
            data['states'].astype(np.float32) * np.float32(QUANTUM),
            data['commands'].astype(np.float32) * np.float32(QUANTUM))


def rendered_files(folders: Sequence[Path]) -> list[Path]:
    """List the files of episodes whose frames are there."""
    return [
        path for folder in folders for path in episode_files(folder)
        if frames_path(path).exists()
    ]


def load_demonstrations(
    folders: Sequence[Path],
    instructions: dict[str, str],
    vocabulary: Vocabulary,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    later_weight: float = 1.0,
    kinds: Collection[str] = (),
) -> Demonstrations:
    """Put this process's share of the rendered episodes on the device.

    later_weight: how often a frame of the second and later folders is drawn against one of the
    first. kinds: of the episodes that are drawn, all when empty; the rest serve for
    validation alone. Raises ValueError when there is
    nothing to load.
    """
    paths = rendered_files(folders)[rank::ranks]
    if not paths:
        raise ValueError(f'no rendered demonstrations in {", ".join(map(str, folders))}')
    files = [_read(path, index % HELD_OUT == 0) for index, path in enumerate(paths)]
    total = sum(int(file.frames.sum()) for file in files)
    shape = np.load(frames_path(files[0].path), mmap_mode='r').shape[1:]
    images = torch.empty((total, *shape), dtype=torch.uint8, device=device)
    starts = np.concatenate([[0], np.cumsum([int(file.frames.sum()) for file in files])])

    def put(index: int) -> None:
        frames = np.load(frames_path(files[index].path))
        images[int(starts[index]) : int(starts[index + 1])] = torch.from_numpy(frames).to(device)

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(put, range(len(files))))
    first, last, words, weight, held_out = [], [], [], [], []
    step = 0
    for file in files:
        number = vocabulary.encode(instructions[file.task])
        heavy = later_weight if file.path.parent != folders[0] else 1.0
        for frames, steps, kind in zip(file.frames, file.steps, file.kinds, strict=True):
            first.append(step + FRAME_EVERY * np.arange(frames))
            last.append(np.full(frames, step + steps - 1))
            words.append(np.tile(number, (frames, 1)))
            weight.append(np.full(frames, heavy if not kinds or kind in kinds else 0.0))
            held_out.append(np.full(frames, file.held_out))
            step += int(steps)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device)

    return Demonstrations(
        images, tensor(first), tensor(last), tensor(words), tensor(weight).float(),
        tensor(held_out), tensor([file.states for file in files]),
        tensor([file.commands for file in files]),
        sum(len(file.frames) for file in files))


def statistics_of(data: Demonstrations, chunk: int, most: int = 400_000) -> Statistics:
    """Mean and spread of states and chunks; the gripper keeps its -1 and +1."""
    frames = torch.arange(len(data.first), device=data.first.device)
    if len(frames) > most:
        frames = frames[:: len(frames) // most + 1]
    state, action = data.labels(frames, chunk)
    mean, std = action.mean(0), action.std(0).clamp_min(MIN_ACTION_STD)
    mean[:, JOINTS], std[:, JOINTS] = 0.0, 1.0
    return Statistics(
        state_mean=state.mean(0).double().cpu().numpy(),
        state_std=state.std(0).clamp_min(MIN_STATE_STD).double().cpu().numpy(),
        action_mean=mean.double().cpu().numpy(),
        action_std=std.double().cpu().numpy(),
    )
