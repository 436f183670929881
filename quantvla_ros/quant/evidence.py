# SPDX-License-Identifier: Apache-2.0
"""How far a precision's actions lie from float on held-out frames, as values and as JSON.

Measures nothing: calibration/evidence.py does, quant/gate.py judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ErrorFigures:
    """How far the executed part of some chunks lies from float at the same noise.

    mean_rad, p95_rad: of |joint difference| over frames, steps and joints. worst_rad: mean of the
    worst frame. cosine, cosine_worst: of the joint differences that a chunk commands, mean and
    smallest over frames. gripper: share of steps whose gripper command differs.
    """

    mean_rad: float
    p95_rad: float
    worst_rad: float
    cosine: float = 1.0
    cosine_worst: float = 1.0
    gripper: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """Held-out errors of one precision: `before` as stored, `after` with its calibration.

    floor: what another noise seed makes of the float policy on the same frames.
    """

    frames: int
    floor: ErrorFigures
    before: ErrorFigures
    after: ErrorFigures

    def document(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self)


def read_evidence(document: Mapping[str, Any]) -> Evidence:
    """Read what Evidence.document wrote. Raises ValueError naming what is wrong."""
    expected = {item.name for item in fields(Evidence)}
    if set(document) != expected:
        raise ValueError(f'evidence has {sorted(document)}; expected {sorted(expected)}')
    parts = {name: _figures(name, document[name]) for name in ('floor', 'before', 'after')}
    frames = document['frames']
    if not isinstance(frames, int) or isinstance(frames, bool) or frames < 1:
        raise ValueError(f'evidence.frames is {frames!r}; expected a positive whole number')
    return Evidence(frames, **parts)


def _figures(name: str, values: Any) -> ErrorFigures:
    expected = {item.name for item in fields(ErrorFigures)}
    if not isinstance(values, Mapping) or set(values) != expected:
        raise ValueError(f'evidence.{name} does not hold {", ".join(sorted(expected))}')
    wrong = [key for key, value in values.items()
             if not isinstance(value, (int, float)) or not math.isfinite(value)]
    if wrong:
        raise ValueError(f'evidence.{name}.{wrong[0]} is {values[wrong[0]]!r}; expected a number')
    return ErrorFigures(**{key: float(value) for key, value in values.items()})


def measured_evidence(measured: Mapping[str, float]) -> Evidence | None:
    """Return what an artifact says of itself (Provenance.measured); None where it says nothing."""
    if 'action_error_mrad' not in measured or 'other_seed_mrad' not in measured:
        return None

    def figures(name: str) -> ErrorFigures:
        mean = measured[f'{name}_mrad']
        worst = measured.get(f'{name}_worst_mrad', mean)
        return ErrorFigures(1e-3 * mean, 1e-3 * measured.get(f'{name}_p95_mrad', mean),
                            1e-3 * worst)

    error = figures('action_error')
    return Evidence(int(measured.get('judged_frames', 1)), figures('other_seed'), error, error)
