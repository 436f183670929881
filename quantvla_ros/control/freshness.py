# SPDX-License-Identifier: Apache-2.0
"""Age, silence and sanity of every input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantvla_ros.control.clock import Clock
from quantvla_ros.control.types import Fault


@dataclass(frozen=True)
class InputBounds:
    """Bounds of one input; max_frozen_s 0 means that its content may stay the same."""

    max_age_s: float = 0.2
    max_silence_s: float = 0.2
    max_frozen_s: float = 0.0


def frame_digest(image: np.ndarray) -> int:
    """Return a number that changes with any pixel, well under 0.1 ms for 640x480."""
    raise NotImplementedError


class Freshness:
    """arrived() is for the subscription thread, check() for the control timer."""

    def __init__(
        self, inputs: Mapping[str, InputBounds], clock: Clock, *, clock_jump_s: float = 0.1
    ) -> None:
        raise NotImplementedError

    def arrived(self, name: str, stamp_ns: int, digest: int | None = None) -> None:
        """Note a message that was decoded without complaint."""

    def broken(self, name: str, kind: str, sentence: str) -> None:
        """Note a message that could not be used: wrong size, wrong encoding, renamed joints."""

    def check(self, *, moving: bool = True) -> list[Fault]:
        """Return what is wrong now. moving: only then does unchanged content count as frozen."""

    def ages_s(self) -> dict[str, float]:
        """Age of each input by header stamp, for diagnostics; inf before the first."""
