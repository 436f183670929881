# SPDX-License-Identifier: Apache-2.0
"""Which policy makes the next chunk, and which one is kept for the way back.

Everything here runs in the inference thread, as jobs between two chunks, so that nothing is ever
exchanged under a running inference; `running` alone is read by others. Decides nothing: swap.py
says what is wished, the inference says how the chunks were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantvla_ros.action import ActionChunk
from quantvla_ros.nodes.drift import Drift, DriftSettings, ranges_of
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import Policy

Report = Callable[..., None]


@dataclass(frozen=True)
class Kept:
    """The last chunk that was taken over, and all that it was made from."""

    observation: Observation
    seed: int
    prefix: ActionChunk | None
    chunk: ActionChunk | None  # None: nothing ran that could be compared with


class Handover:
    """The policy that serves, and the one before it until the new one has proved itself.

    report: takes what happened (see Swap.report). free: takes a policy that nobody needs.
    slow_s: a chunk that takes longer than this is no proof.
    """

    def __init__(
        self, policy: Policy, report: Report = lambda *_: None,
        free: Callable[[list[Any]], None] = list.clear, slow_s: float = float('inf'),
        drift: DriftSettings = DriftSettings(),  # noqa: B008 - a frozen value
    ) -> None:
        self._drift = drift
        self._serve(policy)
        self.kept: Kept | None = None
        self._report, self._free, self._slow_s = report, free, slow_s
        self._old: Policy | None = None
        self._left = 0  # good chunks still to come until the old one may go

    @property
    def proving(self) -> bool:
        """Whether there is a way back."""
        return self._old is not None

    def _serve(self, policy: Policy | None) -> None:
        """Let a policy make the next chunk, watched against its own ranges."""
        self.running: Policy | None = policy
        self.drift = Drift(self._drift, ranges_of(policy))

    def take_over(self, box: list[Any], good_chunks: int, wish: Any = None) -> None:
        """Let the policy in the box make the next chunk; the box is emptied."""
        self._old = self.running
        self._serve(box.pop())
        self._left = good_chunks
        self._report('serving', wish=wish)

    def vacate(self) -> None:
        """Let go of the running policy: memory does not allow two."""
        box = [self.running]
        self._serve(None)
        self._free(box)

    def accept(self) -> None:
        """Let go of the old policy without further proof."""
        if self.proving:
            self._drop()

    def good(self, latency_s: float) -> None:
        """Note a chunk that was taken over."""
        if not self.proving:
            return
        if latency_s > self._slow_s:
            self.back('latency', f'a chunk took {latency_s:.3f} s, longer than the '
                      f'{self._slow_s:.3f} s that one is executed for')
            return
        self._left -= 1
        if self._left <= 0:
            self._drop()

    def back(self, kind: str, sentence: str) -> bool:
        """Return to the old policy at once; False when there is none."""
        if not self.proving:
            return False
        box, old = [self.running], self._old
        self._serve(old)
        self._old = None
        self._free(box)
        self._report('rolled_back', kind, sentence)
        return True

    def _drop(self) -> None:
        box, self._old = [self._old], None
        self._free(box)
        self._report('proved')


def answer(policy: Policy, kept: Kept) -> ActionChunk:
    """Let a policy answer the observation of a kept chunk: same seed, same prefix."""
    return policy.denoise(policy.prepare(kept.observation), kept.seed, kept.prefix)


