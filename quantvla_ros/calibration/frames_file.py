# SPDX-License-Identifier: Apache-2.0
"""A plain file of observations for calibration: one .npz, no code in it, the same bytes each time.

    instructions (n,) str    joints (n, joints) float64    joint_names (joints,) str
    stamps (n,) int64        image/<camera> (n, height, width, 3) uint8

Refuses, with a sentence, a file that lacks one of these or whose lengths differ.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantvla_ros.observation import Observation

IMAGE = 'image/'
PLAIN = ('instructions', 'joints', 'joint_names', 'stamps')


@dataclass(frozen=True)
class Frames:
    """Observations, a hash of everything in them, and the episode that each was seen in."""

    observations: tuple[Observation, ...]
    sha256: str
    episodes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.observations)

    def halves(self) -> tuple[tuple[Observation, ...], tuple[Observation, ...]]:
        """Every second episode for calibration, the others to judge it by.

        Frames of one episode look alike, so a split inside it would judge by what was seen. A
        single episode is split all the same, every second frame.
        """
        kinds = self.episodes
        if len({episode % 2 for episode in kinds}) == 1:
            kinds = tuple(range(len(self)))
        pairs = list(zip(kinds, self.observations, strict=True))
        even, odd = ([o for e, o in pairs if e % 2 == half] for half in (0, 1))
        return tuple(even), tuple(odd)


def read_all(paths: Sequence[Path], limit: int = 0) -> Frames:
    """Read several files as one, each with its share of the limit; the order counts."""
    share = -(-limit // len(paths))
    parts = [read_frames(path, share) for path in paths]
    if len(parts) == 1:
        return parts[0]
    episodes: list[int] = []
    for part in parts:
        first = max(episodes, default=-1) + 1
        first += first % 2  # so that an episode calibrates or judges whatever stands before it
        episodes += [first + episode for episode in part.episodes]
    together = hashlib.sha256(''.join(part.sha256 for part in parts).encode()).hexdigest()
    observations = [o for part in parts for o in part.observations]
    return Frames(tuple(observations), together, tuple(episodes))


def write_frames(path: Path, observations: Sequence[Observation]) -> None:
    """Write observations of one robot; an interruption leaves no half-written file.

    Raises ValueError when there are none or they differ in cameras or joints.
    """
    if not observations:
        raise ValueError('there are no frames to write')
    first = observations[0]
    for one in observations:
        if one.joint_names != first.joint_names or set(one.images) != set(first.images):
            raise ValueError('the frames are of different robots: cameras or joints differ')
    arrays = {
        'instructions': np.array([o.instruction for o in observations]),
        'joints': np.stack([o.joint_positions for o in observations]).astype(np.float64),
        'joint_names': np.array(first.joint_names),
        'stamps': np.array([o.stamp_ns for o in observations], np.int64),
    }
    for camera in sorted(first.images):
        arrays[IMAGE + camera] = np.stack([o.images[camera] for o in observations])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f'.{path.name}.{os.getpid()}.npz')
    try:
        np.savez_compressed(scratch, **arrays)  # type: ignore[arg-type]
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def read_frames(path: Path, limit: int = 0) -> Frames:
    """Read a frames file; limit: at most so many, evenly spread, 0 for all.

    Raises FileNotFoundError or ValueError with a sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing; record frames with `quantvla frames`')
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path} is not a frames file: {error}') from error
    cameras = [name for name in arrays if name.startswith(IMAGE)]
    missing = [name for name in PLAIN if name not in arrays]
    if missing or not cameras:
        raise ValueError(f'{path} lacks {", ".join(missing) or "images"}; record it again')
    count = len(arrays['stamps'])
    wrong = [n for n in ('instructions', 'joints', *cameras) if len(arrays[n]) != count]
    if wrong or not count:
        raise ValueError(f'{path}: {", ".join(wrong) or "stamps"} should have {count or 1} rows')
    if not np.isfinite(arrays['joints']).all():
        raise ValueError(f'{path}: a joint position is not finite')
    chosen = np.arange(count)
    if limit and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    digest = hashlib.sha256()
    for name in sorted(arrays):
        part = arrays[name] if name == 'joint_names' else arrays[name][chosen]
        digest.update(f'{name} {part.dtype} {part.shape}'.encode())
        digest.update(np.ascontiguousarray(part).tobytes())
    again = np.diff(arrays['stamps'], prepend=arrays['stamps'][0] - 1) <= 0
    episodes = np.cumsum(again)
    return Frames(
        tuple(_observation(arrays, cameras, int(i)) for i in chosen),
        digest.hexdigest(),
        tuple(episodes[chosen].tolist()),
    )


def _observation(arrays: dict[str, np.ndarray], cameras: list[str], i: int) -> Observation:
    stamp = int(arrays['stamps'][i])
    images = {name.removeprefix(IMAGE): arrays[name][i] for name in cameras}
    return Observation(
        images=images,
        image_stamps_ns=dict.fromkeys(images, stamp),
        joint_names=tuple(map(str, arrays['joint_names'])),
        joint_positions=arrays['joints'][i],
        joint_stamp_ns=stamp,
        instruction=str(arrays['instructions'][i]),
    )
