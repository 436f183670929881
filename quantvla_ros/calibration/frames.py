# SPDX-License-Identifier: Apache-2.0
"""Frames to calibrate on and frames to judge by, out of a bag or a frames file.

Two passes over a bag: the first remembers a few numbers of each moment and chooses, the second
decodes and keeps the chosen ones. Memory is therefore the chosen frames, whatever the length of
the bag. Refuses, with a sentence, whatever would make a calibration worthless; computes no scale.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.calibration.bags import Moment, Reading, ReadOptions, moments
from quantvla_ros.calibration.bags_files import BagError, BagFiles, find_files
from quantvla_ros.calibration.frames_choice import (
    Candidate,
    candidate_of,
    distinct,
    draw_evenly,
    part_by_time,
)
from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation

MOST_SPANS = 4
HELD_SPAN_S = 2.0  # a held-out span is at least as long, where the bag allows it
ALIKE = 0.1  # less than this share of the frames asked for is called all alike


@dataclass(frozen=True)
class FrameSettings:
    """How many frames, and which.

    count: to fit on. held_out: to judge by. seed: of the draw within the strata.
    min_motion: rad or m that a joint, min_change: grey values that a part of a picture must have
    changed since the frame before. gap_s: between fitted and held-out spans. candidates: moments
    that are looked at most; a longer bag is thinned evenly.
    """

    count: int = 128
    held_out: int = 32
    seed: int = 0
    min_motion: float = 0.01
    min_change: float = 4.0
    gap_s: float = 0.5
    candidates: int = 4096
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        if self.count < 1 or self.held_out < 1:
            raise ValueError(
                f'count is {self.count} and held_out {self.held_out}; at least one frame must '
                'calibrate and one must judge'
            )
        if self.candidates < 2 * (self.count + self.held_out):
            raise ValueError(
                f'candidates is {self.candidates}; expected at least twice count and held_out'
            )


@dataclass(frozen=True)
class FrameSet:
    """The chosen frames, in the order of time within each part.

    digest: sha256 over what the policy reads of them: pictures, joints, vectors, instructions.
    rejected: reason -> messages or moments. facts: for the record, ready for JSON.
    """

    fit: tuple[Observation, ...]
    held_out: tuple[Observation, ...]
    source: str
    digest: str
    rejected: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def frames_of(
    path: str | Path, contract: Contract, settings: FrameSettings | None = None
) -> FrameSet:
    """Choose frames of a rosbag2 directory, an .mcap, a .db3, or an .npz of `quantvla frames`.

    Raises ValueError with a sentence for whatever cannot be used.
    """
    settings = settings or FrameSettings()
    path = Path(path)
    if path.suffix == '.npz':
        return _from_file(path, contract, settings)
    return _from_bag(find_files(path), contract, settings)


def frames_digest(parts: Iterable[Sequence[Observation]]) -> str:
    """Return a sha256 over what the policy reads of some lists of observations."""
    found = hashlib.sha256()
    for part in parts:
        found.update(f'{len(part)} frames'.encode())
        for one in part:
            arrays = {**one.images, 'joints': one.joint_positions, **one.vectors}
            found.update(repr((one.instruction, one.joint_names)).encode())
            for name in sorted(arrays):
                found.update(f'{name} {arrays[name].dtype} {arrays[name].shape}'.encode())
                found.update(np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


class Thinning:
    """At most so many candidates, evenly spread: when full, every second one is forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stride = 1
        self.kept: list[Candidate] = []

    def wants(self, number: int) -> bool:
        """Tell whether this moment should be looked at."""
        return number % self._stride == 0

    def put(self, one: Candidate) -> None:
        """Keep a candidate."""
        self.kept.append(one)
        if len(self.kept) > self._most:
            self._stride *= 2
            self.kept = [old for old in self.kept if self.wants(old.number)]


def _from_bag(bag: BagFiles, contract: Contract, settings: FrameSettings) -> FrameSet:
    before, reading = bag.fingerprint(), Reading()
    thinning = Thinning(settings.candidates)
    for moment in moments(bag, contract, settings.read, reading):
        if thinning.wants(moment.number):
            seen = moment.look()
            if seen is not None:
                thinning.put(candidate_of(moment.number, seen.stamp_ns / NS_PER_S, seen))
    rejected = Counter(reading.rejected)
    parts = _choose(str(bag.path), thinning.kept, rejected, settings)
    chosen = {one.number: one for part in parts for one in part}
    kept = dict(_look_again(moments(bag, contract, settings.read, Reading()), chosen))
    if bag.fingerprint() != before or len(kept) != len(chosen):
        raise BagError(f'{bag.path} changed while it was read; is it still being recorded?')
    fit, held = (tuple(kept[one.number] for one in part) for part in parts)
    facts = {
        'bytes': sum(size for _, size, _ in before), 'files': [name for name, _, _ in before],
        'storage': bag.storage, 'closed': bag.closed, 'damage': list(reading.damage),
        'messages': reading.messages, 'seconds': round(reading.seconds, 3),
        'first_received_ns': reading.first_ns, 'moments': reading.moments,
        **_coverage(fit, held),
    }
    return FrameSet(fit, held, str(bag.path), frames_digest((fit, held)), rejected, facts)


def _look_again(
    found: Iterator[Moment], chosen: Mapping[int, Candidate]
) -> Iterator[tuple[int, Observation]]:
    """Decode the chosen moments, each into memory of its own."""
    left = len(chosen)
    for moment in found:
        if moment.number in chosen:
            seen = moment.look()
            if seen is not None and seen.stamp_ns / NS_PER_S == chosen[moment.number].time_s:
                images = {name: image.copy() for name, image in seen.images.items()}
                yield moment.number, replace(seen, images=images)
            left -= 1
            if not left:
                return


def _from_file(path: Path, contract: Contract, settings: FrameSettings) -> FrameSet:
    try:
        seen = read_frames(path).observations
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    _check_robot(path, seen[0], contract)
    # Stamps begin anew with each episode of such a file, so that its order is its time.
    candidates = [candidate_of(number, float(number), one) for number, one in enumerate(seen)]
    rejected: Counter[str] = Counter()
    parts = _choose(str(path), candidates, rejected, settings)
    fit, held = (tuple(seen[one.number] for one in part) for part in parts)
    facts = {'bytes': path.stat().st_size, 'storage': 'npz', 'moments': len(seen),
             **_coverage(fit, held)}
    return FrameSet(fit, held, str(path), frames_digest((fit, held)), rejected, facts)


def _check_robot(path: Path, one: Observation, contract: Contract) -> None:
    sizes = {name: image.shape[:2] for name, image in one.images.items()}
    due = {c.name: (c.policy_height, c.policy_width) for c in contract.cameras}
    if sizes != due or one.joint_names != contract.joints.names:
        raise ValueError(
            f'{path} is of another robot: cameras {sizes} and joints {", ".join(one.joint_names)}'
            f'; the contract says {due} and {", ".join(contract.joints.names)}'
        )


def _choose(
    source: str, candidates: list[Candidate], rejected: Counter[str], settings: FrameSettings
) -> tuple[list[Candidate], list[Candidate]]:
    """Return the chosen fit and held-out candidates. Raises ValueError with the figures."""
    need = settings.count + settings.held_out
    different = distinct(candidates, settings.min_motion, settings.min_change)
    alike = len(candidates) - len(different)
    if alike:
        rejected['like the frame before'] = alike
    if len(candidates) >= need and len(different) < max(2, ALIKE * need):
        raise ValueError(
            f'{source}: the frames are all alike: of {len(candidates)} only {len(different)} '
            f'differ, for neither did a joint move by {settings.min_motion:g} nor a picture '
            'change. Record while the arm works'
        )
    if len(different) < need:
        raise ValueError(_too_few(source, len(candidates), len(different), rejected, settings))
    share = settings.held_out / need
    seconds = different[-1].time_s - different[0].time_s
    spans = int(np.clip(seconds * share / HELD_SPAN_S, 1, MOST_SPANS))
    fit, held = part_by_time(different, share, settings.gap_s, spans)
    if len(fit) < settings.count or len(held) < settings.held_out:
        raise ValueError(
            f'{source}: parted by time, {len(fit)} frames are left to fit and {len(held)} to '
            f'judge; {settings.count} and {settings.held_out} were asked for. Ask for fewer, or '
            'record longer'
        )
    return (draw_evenly(fit, settings.count, settings.seed),
            draw_evenly(held, settings.held_out, settings.seed + 1))


def _too_few(
    source: str, found: int, different: int, rejected: Counter[str], settings: FrameSettings
) -> str:
    reasons = '; '.join(f'{count} {reason}' for reason, count in rejected.most_common(6))
    return (
        f'{source}: {found} usable frames, {different} of them different; {settings.count} to '
        f'fit and {settings.held_out} to judge were asked for. Not used: {reasons or "nothing"}. '
        'Ask for fewer frames, or record longer while the arm works'
    )


def _coverage(fit: Sequence[Observation], held: Sequence[Observation]) -> dict[str, Any]:
    """Return what the chosen frames cover: instructions, and the range of every joint."""
    joints = np.stack([one.joint_positions for one in fit])
    return {
        'fit': len(fit), 'held_out': len(held),
        'instructions': {'fit': _instructions(fit), 'held_out': _instructions(held)},
        'joint_ranges': {
            name: [round(float(low), 6), round(float(high), 6)]
            for name, low, high in zip(fit[0].joint_names, joints.min(0), joints.max(0),
                                       strict=True)
        },
    }


def _instructions(part: Sequence[Observation]) -> dict[str, int]:
    return dict(sorted(Counter(one.instruction for one in part).items()))
