# SPDX-License-Identifier: Apache-2.0
"""The values that pass between player, freshness, guard and the node. Immutable, numpy only.

Owns no behaviour: what may be in them is decided where they are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np


class State(str, Enum):
    """What the guard is doing; the text is what status topics show."""

    INACTIVE = 'inactive'  # never started
    RUNNING = 'running'  # following samples
    STOPPING = 'stopping'  # decelerating to rest
    HOLDING = 'holding'  # at rest, still publishing the rest pose
    SILENT = 'silent'  # at rest, publishing nothing


@dataclass(frozen=True)
class Fault:
    """Something wrong with an input: `kind` is a short name, `sentence` has the figures."""

    input: str
    kind: str
    sentence: str


@dataclass(frozen=True)
class StopCause:
    """Why the arm stopped. stamp_ns is header time, when it was recorded."""

    kind: str
    sentence: str
    stamp_ns: int


@dataclass(frozen=True)
class Sample:
    """The plan at one instant: (joints,) rad or m, and rad/s or m/s.

    steps_left: steps of the chunk not due yet. exhausted: the plan has nothing left to execute.
    """

    positions: np.ndarray
    velocities: np.ndarray
    steps_left: int
    exhausted: bool


@dataclass(frozen=True)
class Setpoint:
    """What goes on the wire in one control period; stamp_ns is header time."""

    positions: np.ndarray
    velocities: np.ndarray
    stamp_ns: int
