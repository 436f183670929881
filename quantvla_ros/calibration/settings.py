# SPDX-License-Identifier: Apache-2.0
"""What a calibration is asked to do, checked as a whole. Knows no frame and no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REFITS = ('rounding', 'smoothing', 'activations')
KINDS = ('alpha', 'beta')
LEARNED = (*REFITS, *KINDS)  # in this order


@dataclass(frozen=True)
class CalibrationSettings:
    """What is calibrated, and how.

    learn: what is tried, of LEARNED. recipe: for refits; '' takes the artifact's own. seed: of
    the noise. neutral, clip: band of alpha and beta in the log domain. confidence: of one run as
    a whole; its held-out questions share what is left. search_frames: fitted frames that choose
    among factors; refit_frames: those that refits look at, once for each block. threads: 0 for
    torch's own choice.
    """

    model: Path
    precision: str
    learn: tuple[str, ...] = ('activations', 'alpha', 'beta')
    recipe: str = ''
    seed: int = 0
    neutral: float = 0.03
    clip: float = 0.4
    confidence: float = 0.95
    search_frames: int = 32
    refit_frames: int = 32
    threads: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.learn if name not in LEARNED]
        if unknown:
            raise ValueError(f'learn names {", ".join(map(repr, unknown))}; known are '
                             f'{", ".join(LEARNED)}')
        for name, low, high in (('neutral', 0.0, 1.0), ('clip', 0.0, 2.0),
                                ('confidence', 0.5, 1.0)):
            value = getattr(self, name)
            if not low <= value < high:
                raise ValueError(f'{name} is {value!r}; expected {low:g} to below {high:g}')
