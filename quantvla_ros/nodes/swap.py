# SPDX-License-Identifier: Apache-2.0
"""Which precision runs, which one is wished, and what happens next: a pure state machine.

Owns the truth that the parameters and ~/status tell. Loads nothing, knows no thread and no ROS:
reports come in through `report` from any thread, `step` is called by the executor and returns what
to do. A storm of wishes settles on the last one; a wish that failed is put back with its cause.

    active -> loading -> verifying -> proving -> active      beside: the old one runs on meanwhile
    active -> holding -> loading -> verifying -> active      hold: the arm rests, the old one goes
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Stage(str, Enum):
    """What happens now; the text is what ~/status shows."""

    ACTIVE = 'active'  # nothing is under way
    HOLDING = 'holding'  # the arm comes to rest, to free the memory of the running one
    LOADING = 'loading'
    VERIFYING = 'verifying'  # it answers a kept observation
    PROVING = 'proving'  # it commands; the old one is kept until it has made good chunks
    EMPTY = 'empty'  # nothing could be loaded after a hold


class Action(Enum):
    """What the caller must do."""

    LOAD = 'load'  # start to load `target`
    CANCEL = 'cancel'  # give up the load that runs
    ACCEPT = 'accept'  # free the old one without further proof: the arm stands still
    HOLD = 'hold'  # bring the arm to rest, then report 'resting'
    RESUME = 'resume'  # go on after a hold


@dataclass(frozen=True)
class Wish:
    """What a user asks for."""

    precision: str
    calibration: str = ''

    def __str__(self) -> str:
        return f'{self.precision} with {self.calibration}' if self.calibration else self.precision


NOTHING = Wish('')  # runs after a hold until the next one is loaded


@dataclass(frozen=True)
class Report:
    """What a thread found out: verifying, serving, proved, failed, rolled_back, resting, ..."""

    event: str
    kind: str = ''
    sentence: str = ''
    wish: Wish | None = None  # what serves in truth, where a wish leaves that open


@dataclass(frozen=True)
class Outcome:
    """What became of a wish: 'active', 'proving', 'refused', 'rolled_back' or 'superseded'."""

    result: str
    wish: Wish
    kind: str = ''
    sentence: str = ''
    seconds: float = 0.0  # from the start of loading to the end


class Swap:
    """The one record of what runs. All but report() belong to one thread, the executor's."""

    def __init__(self, running: Wish, clock: Callable[[], float] = time.monotonic) -> None:
        self.running = running
        self.wish = running
        self.target: Wish | None = None
        self.stage = Stage.ACTIVE
        self.outcome: Outcome | None = None
        self.counts: Counter[str] = Counter()
        self.latency_s = 0.0  # of the last swap: from the start of loading to its first chunk
        self._last = running  # what ran before the swap that is under way
        self._clock, self._begun = clock, 0.0
        self._held = self._cancelled = False
        self._reports: deque[Report] = deque()

    def report(
        self, event: str, kind: str = '', sentence: str = '', wish: Wish | None = None
    ) -> None:
        """Tell what happened; from any thread, never waits."""
        self._reports.append(Report(event, kind, sentence, wish))

    def request(self, wish: Wish) -> bool:
        """Note the newest wish; False when it is what runs or comes already."""
        changed = wish != self.wish
        self.wish = wish
        self.counts['requested'] += changed
        return changed

    @property
    def settled(self) -> bool:
        """Nothing is under way and nothing else is wished."""
        return self.stage in (Stage.ACTIVE, Stage.EMPTY) and not self._reports and (
            self.wish == self.running
        )

    @property
    def held(self) -> bool:
        """The arm may not start: no policy is loaded, or the one that is must go."""
        return self._held or self.running == NOTHING

    def step(self, *, moving: bool, hold: bool) -> Action | None:
        """Take in the reports and return what to do now, or None.

        moving: chunks are being made. hold: free the running one before loading the next.
        """
        while self._reports:
            action = self._take(self._reports.popleft())
            if action is not None:
                return action
        if self.stage in (Stage.ACTIVE, Stage.EMPTY) and self.wish != self.running:
            return self._start(hold)
        under_way = self.stage in (Stage.LOADING, Stage.VERIFYING) and not self._cancelled
        if under_way and self.wish != self.target != self._last:  # a way back is not given up
            self._cancelled = True
            return Action.CANCEL
        if self.stage is Stage.PROVING and self.wish != self.running and not moving:
            return Action.ACCEPT
        return None

    def _start(self, hold: bool) -> Action:
        self.target, self._begun, self._cancelled = self.wish, self._clock(), False
        self._last = self.running
        self._held = hold and self.running != NOTHING
        self.stage = Stage.HOLDING if self._held else Stage.LOADING
        return Action.HOLD if self._held else Action.LOAD

    def _take(self, report: Report) -> Action | None:
        handlers: dict[str, Callable[[Report], Action | None]] = {
            'resting': self._on_resting, 'verifying': self._on_verifying,
            'serving': self._on_serving, 'proved': self._on_proved,
            'rolled_back': self._on_rolled_back, 'failed': self._on_failed,
        }
        return handlers[report.event](report)

    def _on_resting(self, report: Report) -> Action:
        """The arm rests and the old policy is gone."""
        self.running, self.target, self.stage = NOTHING, self.wish, Stage.LOADING
        return Action.LOAD

    def _on_verifying(self, report: Report) -> None:
        self.stage = Stage.VERIFYING

    def _on_serving(self, report: Report) -> Action | None:
        """The target makes the next chunk."""
        assert self.target is not None, 'only a target is loaded'
        held, back = self._held, self.target == self._last
        self.running = self.target if report.wish is None else report.wish
        if self.wish == self.target:
            self.wish = self.running  # 'newest' has a name now
        self.latency_s = self._clock() - self._begun
        if not held and self._last != NOTHING:
            self.stage = Stage.PROVING
            self._end('proving')
            return None
        if not (held and back):  # else the outcome of what failed stays
            self._end('active')
        self._held, self.target, self.stage = False, None, Stage.ACTIVE
        return Action.RESUME if held else None

    def _on_proved(self, report: Report) -> None:
        self.stage, self.target = Stage.ACTIVE, None
        self._end('active')

    def _on_rolled_back(self, report: Report) -> None:
        self._end('rolled_back', report)
        self.running = self._last
        self._give_up()
        self.stage, self.target = Stage.ACTIVE, None

    def _on_failed(self, report: Report) -> Action | None:
        """The target cannot serve. After a hold the old one is loaded again."""
        superseded = self._cancelled and report.kind == 'cancelled'
        self._end('superseded' if superseded else 'refused', report)
        hopeless = self.target == self._last or self._last == NOTHING
        if not superseded:
            self._give_up()
        self.target, self._cancelled = None, False
        if self.running != NOTHING:
            self.stage = Stage.ACTIVE
            return None
        if hopeless and not superseded:
            self._held, self.stage = False, Stage.EMPTY
            self.wish = NOTHING if self.wish == self._last else self.wish
            return None
        self.target, self.stage = self.wish if superseded else self._last, Stage.LOADING
        return Action.LOAD

    def _give_up(self) -> None:
        """Put the wish back, unless another one came meanwhile."""
        if self.wish == self.target:
            self.wish = self._last if self.running == NOTHING else self.running

    def _end(self, result: str, report: Report | None = None) -> None:
        wish = self.target or self.running
        kind, sentence = (report.kind, report.sentence) if report else ('', '')
        self.outcome = Outcome(result, wish, kind, sentence, self._clock() - self._begun)
        self.counts[result] += 1

    def status(self) -> dict[str, Any]:
        """Return what ~/status tells of swaps."""
        outcome = self.outcome
        return {
            'stage': self.stage.value,
            'requested': str(self.wish),
            'target': str(self.target) if self.target is not None else '',
            'last': None if outcome is None else {
                'result': outcome.result, 'wish': str(outcome.wish), 'kind': outcome.kind,
                'sentence': outcome.sentence, 'seconds': round(outcome.seconds, 3),
            },
            'latency_s': round(self.latency_s, 3),
            'counts': dict(self.counts),
        }
