# SPDX-License-Identifier: Apache-2.0
"""Action error on held-out frames, and whether a change lowered it with confidence.

Errors are those of the steps that are executed, joints in rad, the gripper as a share of steps
that differ. Confidence is a paired bootstrap over frames. Runs no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantvla_ros.calibration.passes import Played
from quantvla_ros.quant.evidence import ErrorFigures

RESAMPLES = 4000


def frame_errors(found: Played, reference: Played, execute: int) -> np.ndarray:
    """Mean |joint difference| of each frame over the executed steps, rad; (frames,)."""
    return np.abs(_off(found.chunks, reference.chunks, execute)).mean((1, 2))


def _off(found: np.ndarray, reference: np.ndarray, execute: int) -> np.ndarray:
    return found[..., :execute, :-1] - reference[..., :execute, :-1]


def figures(
    found: Played, reference: Played, measured: np.ndarray, execute: int
) -> ErrorFigures:
    """Compare chunks. measured: (frames, joints) where the arm stood, for the cosine."""
    off = np.abs(_off(found.chunks, reference.chunks, execute))
    cosines = _cosines(found.chunks, reference.chunks, measured, execute)
    flips = found.chunks[:, :execute, -1] != reference.chunks[:, :execute, -1]
    return ErrorFigures(
        mean_rad=float(off.mean()),
        p95_rad=float(np.quantile(off, 0.95)),
        worst_rad=float(off.mean((1, 2)).max()),
        cosine=float(cosines.mean()),
        cosine_worst=float(cosines.min()),
        gripper=float(flips.mean()),
    )


def _cosines(
    found: np.ndarray, reference: np.ndarray, measured: np.ndarray, execute: int
) -> np.ndarray:
    """Cosine between the moves that two chunks command, by frame."""
    a, b = (
        (x[:, :execute, :-1] - measured[:, None, :]).reshape(len(x), -1)
        for x in (found, reference)
    )
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(size > 0, (a * b).sum(1) / np.maximum(size, 1e-12), 1.0)


def details(found: Played, reference: Played, execute: int) -> dict[str, Any]:
    """Error by joint, by step of the chunk and by denoising step, and of every frame; rad."""
    off = np.abs(_off(found.chunks, reference.chunks, execute))
    heading = np.abs(_off(found.headings, reference.headings, execute))
    return {
        'joints_rad': _rounded(off.mean((0, 1))),
        'chunk_steps_rad': _rounded(off.mean((0, 2))),
        'denoising_steps_rad': _rounded(heading.mean((1, 2, 3))),
        'frames_rad': _rounded(off.mean((1, 2))),
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 9) for value in values]


@dataclass(frozen=True)
class Verdict:
    """Whether errors fell. gain_rad: mean; low_rad: lower end of the one-sided interval."""

    helps: bool
    gain_rad: float
    low_rad: float
    confidence: float


def judge(before: np.ndarray, after: np.ndarray, confidence: float, seed: int = 0) -> Verdict:
    """Paired bootstrap of the mean gain over frames; it helps when the lower end is above 0.

    before, after: (frames,) errors of the same frames. confidence: of the one-sided interval;
    who asks several questions of the same frames divides what is left among them.
    """
    gain = before - after
    if len(gain) < 2:
        return Verdict(False, float(gain.mean()) if len(gain) else 0.0, 0.0, confidence)
    drawn = np.random.default_rng(seed).integers(0, len(gain), (RESAMPLES, len(gain)))
    low = float(np.quantile(gain[drawn].mean(1), 1 - confidence))
    return Verdict(low > 0, float(gain.mean()), low, confidence)
