# SPDX-License-Identifier: Apache-2.0
"""The single gate to the wire: refuse nonsense, clip overshoot, stop with one recorded cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.control.clock import Clock
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.types import Fault, Sample, Setpoint, State, StopCause


@dataclass(frozen=True)
class GuardSettings:
    """How the guard behaves. Raises ValueError with a sentence for each impossible value.

    max_tick_gap_s: a control tick later than this stops the arm.
    first_chunk_s: how long to hold the start pose while waiting for the first chunk.
    hold_s: how long the rest pose is published after a stop, before silence.
    start_ramp_s, start_speed: the speed limit grows from this share of it to all of it.
    long_clip_s: clipping for longer than this stops the arm.
    estop_cooldown_s: how long after an e-stop reset is refused.
    max_refusals: so many refused chunks in a row stop the arm.
    huge_step_rad, huge_step_m: a step of a chunk farther than this is refused.
    start_tolerance_rad, start_tolerance_m: how far outside its limits a joint may be at start.
    min_tick_s: a tick sooner after the last command than this publishes nothing.
    """

    max_tick_gap_s: float = 0.1
    first_chunk_s: float = 5.0
    hold_s: float = 1.0
    start_ramp_s: float = 1.0
    start_speed: float = 0.1
    long_clip_s: float = 1.0
    estop_cooldown_s: float = 0.5
    max_refusals: int = 3
    huge_step_rad: float = 0.5
    huge_step_m: float = 0.1
    start_tolerance_rad: float = 0.02
    start_tolerance_m: float = 0.005
    min_tick_s: float = 0.0005


class Guard:
    """tick() is for the control timer; admit() for the inference thread; the rest for any."""

    def __init__(
        self,
        joint_names: Sequence[str],
        limiter: JointLimiter,
        settings: GuardSettings,
        clock: Clock,
    ) -> None:
        raise NotImplementedError

    def start(self, measured: np.ndarray, faults: Sequence[Fault] = ()) -> None:
        """Begin or resume from the measured pose (joints,); its first setpoint equals it.

        Raises ValueError with a sentence: e-stop latched, still moving, faults, pose outside its
        limits or not finite. Call ChunkPlayer.clear() before.
        """

    def admit(self, chunk: ActionChunk) -> str | None:
        """Return why a chunk is refused, or None; call before ChunkPlayer.merge."""

    def tick(
        self, sample: Sample | None, measured: np.ndarray | None, faults: Sequence[Fault] = ()
    ) -> Setpoint | None:
        """Return what to publish in this control period, or None for silence."""

    def stop(self, kind: str, sentence: str) -> bool:
        """Ask for a stop; False when one is already recorded, or nothing runs."""

    def estop(self, sentence: str) -> None:
        """Latch the e-stop and stop."""

    def reset(self) -> None:
        """Release the latch; moves nothing. Raises ValueError with a sentence when too early."""

    @property
    def state(self) -> State:
        """What the guard is doing."""

    @property
    def cause(self) -> StopCause | None:
        """Why the arm stopped; None while it runs."""

    @property
    def latch(self) -> StopCause | None:
        """The e-stop that is latched, or None."""

    @property
    def at_rest(self) -> bool:
        """Nothing moves: inactive, holding or silent. After deactivate, tick until this."""

    @property
    def counts(self) -> dict[str, Any]:
        """Figures for diagnostics: published, refused by kind, clipped by joint, stops, ..."""
