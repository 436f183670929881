# SPDX-License-Identifier: Apache-2.0
"""Test policies for `quantvla bench ros`: constant time, a busy core, or constant work.

They hold the arm but for a few micrometres that number the chunk, so that a command on the wire
tells which chunk it came from. Settings come in `model`: 'sleep SECONDS LOG', 'busy SECONDS LOG',
or 'work SECONDS LOG', which takes as long as its work does where it was measured alone, and longer
where others take its core.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings

MARK = 1e-6  # rad that a chunk's number is multiplied with
MARKS = 1000
FRESH_NS = 100_000_000  # a later command comes from a pause, or from the round before
WORK = bytes(1 << 20)


class ConstantTime:
    """Sleeps, or multiplies matrices on one core, for a stated time; logs when it ended."""

    def __init__(self, contract: Contract, settings: PolicySettings) -> None:
        self.contract = contract
        kind, seconds, log = (settings.model or 'sleep 0.02 ').split(' ', 2)
        if kind not in ('sleep', 'busy', 'work'):
            raise ValueError(
                f"model is {settings.model!r}; expected 'sleep', 'busy' or 'work', seconds")
        self._busy, self._seconds = kind == 'busy', float(seconds)
        self._log = Path(log) if log else None
        self._matrix = np.random.default_rng(0).standard_normal((192, 192)).astype(np.float32)
        self._hashes = self._measured() if kind == 'work' else 0
        self._number = 0
        self._pose: np.ndarray | None = None

    def _measured(self) -> int:
        """How many hashes the stated time is good for: by the median of a few."""
        times_ns = []
        for _ in range(31):
            start_ns = time.monotonic_ns()
            self._work()
            times_ns.append(time.monotonic_ns() - start_ns)
        return max(1, round(self._seconds * 1e9 / sorted(times_ns)[15]))

    def _work(self) -> None:
        """A millisecond or so of one core, without the interpreter's lock and without BLAS."""
        hashlib.sha256(WORK).digest()

    def prepare(self, observation: Observation) -> tuple[int, float, Observation]:
        """Note the time, and how old the newest picture is."""
        age_ms = (time.time_ns() - max(observation.image_stamps_ns.values())) / 1e6
        return time.monotonic_ns(), age_ms, observation

    def denoise(
        self,
        context: tuple[int, float, Observation],
        seed: int,
        prefix: ActionChunk | None = None,
    ) -> ActionChunk:
        """Take the time, then hold the first pose seen, plus the mark of this chunk."""
        del seed, prefix
        start_ns, age_ms, observation = context
        end_ns = start_ns + round(self._seconds * 1e9)
        while self._busy and time.monotonic_ns() < end_ns:
            self._matrix @ self._matrix
        for _ in range(self._hashes):
            self._work()
        if not self._hashes:
            time.sleep(max(0.0, (end_ns - time.monotonic_ns()) / 1e9))
        action = self.contract.action
        order = [observation.joint_names.index(name) for name in action.joints]
        if self._pose is None:
            self._pose = observation.joint_positions[order].copy()
        self._number = (self._number + 1) % MARKS
        target = self._pose.copy()
        target[0] += MARK * self._number
        positions = np.tile(target, (action.horizon, 1))
        if self._log is not None:
            note = {'mark': self._number, 'held_rad': float(self._pose[0]), 'start_ns': start_ns,
                    'end_ns': time.monotonic_ns(), 'picture_age_ms': age_ms}
            with self._log.open('a') as file:
                file.write(json.dumps(note) + '\n')
        return ActionChunk(action.joints, positions, observation.stamp_ns, action.step_dt_s)

    def reset(self) -> None:
        """Start from the pose of the next observation."""
        self._pose = None


def first_commands(
    notes: Sequence[dict[str, Any]], commands: Sequence[tuple[int, float]]
) -> list[tuple[dict[str, Any], int]]:
    """Pair the note of each chunk with the time of the first command that was made of it.

    commands: when, and the target of the first joint.
    """
    by_mark = {note['mark']: note for note in notes}
    found: dict[int, tuple[dict[str, Any], int]] = {}
    for when, value in commands:
        mark = round((value - notes[-1]['held_rad']) / MARK)
        if mark in by_mark and 0 <= when - by_mark[mark]['end_ns'] < FRESH_NS:
            found.setdefault(mark, (by_mark[mark], when))
    return list(found.values())
