# SPDX-License-Identifier: Apache-2.0
"""Execute chunks by their stamps: merge while the old one runs, sample at any time."""

from __future__ import annotations

from dataclasses import dataclass

from quantvla_ros.action import ActionChunk
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.types import Sample


@dataclass(frozen=True)
class PlayerSettings:
    """blend_s: shortest blend between two chunks; max_blend_s: longest, else the chunk is refused.

    prefix_tolerance: how far a chunk made with a prefix may be from the plan to join unblended.
    """

    blend_s: float = 0.1
    max_blend_s: float = 0.5
    prefix_tolerance: float = 0.005


class ChunkPlayer:
    """merge() is for the inference thread, sample() for the control timer."""

    def __init__(self, limiter: JointLimiter, settings: PlayerSettings | None = None) -> None:
        raise NotImplementedError

    def merge(self, chunk: ActionChunk, now_ns: int, *, prefixed: bool = False) -> str | None:
        """Take over a chunk by its stamps; return why it was refused, or None.

        Without a running plan nothing is skipped: step 0 is due now. prefixed: the chunk was made
        with remaining() as its real-time-chunking prefix.
        """

    def sample(self, now_ns: int) -> Sample | None:
        """Return the plan at now_ns (header time), None when there is none."""

    def remaining(self, start_ns: int) -> ActionChunk | None:
        """Return the plan from start_ns on, one row per step, as prefix for the next chunk.

        Pass the stamp of the observation: row i is then due with row i of the next chunk.
        """

    def clear(self) -> None:
        """Forget every plan: after a stop, before a start."""
