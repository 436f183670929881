# SPDX-License-Identifier: Apache-2.0
"""Which of many moments are worth calibrating on: numpy only, decided by a seed.

A candidate is what is kept of every moment: its time, its joints and tiny grey pictures. Near
copies are dropped, the rest is parted by time into fit and held-out spans with a gap between, and
from each part frames are drawn evenly over time and over the way that the joints went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantvla_ros.observation import Observation

CELLS = 8  # a picture is compared as 8 by 8 mean grey values, in which sensor noise drowns


@dataclass(frozen=True)
class Candidate:
    """What is remembered of a moment. greys: (cameras * 64,) float32, 0 to 255."""

    number: int
    time_s: float
    joints: np.ndarray
    greys: np.ndarray
    instruction: str


def candidate_of(number: int, time_s: float, observation: Observation) -> Candidate:
    """Return the few numbers that stand for an observation."""
    greys = [_grey_cells(observation.images[name]) for name in sorted(observation.images)]
    return Candidate(number, time_s, np.array(observation.joint_positions),
                     np.concatenate(greys), observation.instruction)


def _grey_cells(image: np.ndarray) -> np.ndarray:
    """Return (64,) mean values of the cells of an (height, width, 3) picture."""
    height, width = image.shape[:2]
    rows, columns = np.arange(CELLS) * height // CELLS, np.arange(CELLS) * width // CELLS
    flat = image.reshape(height, 3 * width)
    sums = np.add.reduceat(np.add.reduceat(flat, 3 * columns, axis=1, dtype=np.uint32), rows)
    counts = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)
    return (sums / (3 * counts)).astype(np.float32).ravel()


def distinct(
    candidates: Sequence[Candidate], min_motion: float, min_change: float
) -> list[Candidate]:
    """Drop each candidate that repeats the one kept before it.

    It repeats when no joint moved by min_motion (rad or m), no cell of a picture changed by
    min_change grey values and the instruction is the same.
    """
    kept: list[Candidate] = []
    for one in candidates:
        last = kept[-1] if kept else None
        if (
            last is None
            or one.instruction != last.instruction
            or np.abs(one.joints - last.joints).max() >= min_motion
            or np.abs(one.greys - last.greys).max() >= min_change
        ):
            kept.append(one)
    return kept


def part_by_time(
    candidates: Sequence[Candidate], share: float, gap_s: float, spans: int
) -> tuple[list[Candidate], list[Candidate]]:
    """Part candidates into fit and held-out ones: the last share of each of some spans of time.

    Those within gap_s of a border are in neither part, so that no held-out frame is the
    neighbour of one that was fitted.
    """
    start, end = candidates[0].time_s, candidates[-1].time_s
    length = max(end - start, 1e-9) / spans
    fit, held = [], []
    for one in candidates:
        span = min(int((one.time_s - start) / length), spans - 1)
        into = one.time_s - start - span * length
        border = (1.0 - share) * length
        if into < border - gap_s / 2 and (span == 0 or into >= gap_s / 2):
            fit.append(one)
        elif into >= border + gap_s / 2 and (span == spans - 1 or into < length - gap_s / 2):
            held.append(one)
    return fit, held


def draw_evenly(candidates: Sequence[Candidate], count: int, seed: int) -> list[Candidate]:
    """Return count candidates, one from each of count strata of time and joint travel.

    A candidate's place is half the share of time and half the share of the way of all joints
    (each by its own range) that have passed. A stratum without a candidate takes the nearest one
    that is left. Raises ValueError when there are fewer than count.
    """
    if len(candidates) < count:
        raise ValueError(f'{count} frames were asked for, {len(candidates)} are there')
    places = _places(candidates)
    rng = np.random.default_rng(seed)
    strata = np.minimum((places * count).astype(int), count - 1)
    chosen = np.zeros(len(candidates), bool)
    empty = []
    for stratum in range(count):
        members = np.flatnonzero(strata == stratum)
        if members.size:
            chosen[rng.choice(members)] = True
        else:
            empty.append(stratum)
    for stratum in empty:
        left = np.flatnonzero(~chosen)
        chosen[left[np.abs(places[left] - (stratum + 0.5) / count).argmin()]] = True
    return [candidates[int(i)] for i in np.flatnonzero(chosen)]


def _places(candidates: Sequence[Candidate]) -> np.ndarray:
    """Return (candidates,) in 0 to 1, rising."""
    times = np.array([one.time_s for one in candidates])
    joints = np.stack([one.joints for one in candidates])
    ranges = np.ptp(joints, axis=0)
    steps = np.abs(np.diff(joints, axis=0)) / np.where(ranges > 0, ranges, 1.0)
    travel = np.concatenate([[0.0], np.cumsum(steps.sum(1))])
    return 0.5 * _share(times - times[0]) + 0.5 * _share(travel)


def _share(amounts: np.ndarray) -> np.ndarray:
    return amounts / amounts[-1] if amounts[-1] > 0 else np.linspace(0.0, 1.0, len(amounts))
