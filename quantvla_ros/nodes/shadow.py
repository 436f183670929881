# SPDX-License-Identifier: Apache-2.0
"""A second precision that answers the same observations and commands nothing.

It runs in the inference thread, in the time that is left until the next chunk is due, and is
skipped when that is too short: it can never compete with what commands. Owns its figures; loading
is Beside's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from quantvla_ros.control.difference import Difference, difference
from quantvla_ros.control.latency import LatencyTracker
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.nodes.beside import Beside, Trial
from quantvla_ros.nodes.handover import Kept, answer
from quantvla_ros.nodes.inference import Inference, InferenceThread, Job
from quantvla_ros.policies.base import Policy

RESERVE = 1.5  # times its usual latency that must be left
Told = Callable[[Difference, int], None]


class Shadow:
    """One shadow at work; `compare` belongs to the inference thread."""

    def __init__(
        self, name: str, policy: Policy, limiter: JointLimiter, latency_s: float,
        told: Told, clock: Callable[[], float],
    ) -> None:
        self.name, self._policy, self._limiter = name, policy, limiter
        self._told, self._clock = told, clock
        self.latency = LatencyTracker(warm_up=0)
        self._expected_s = latency_s
        self.counts: Counter[str] = Counter()
        self.error = ''
        self._sum = np.zeros(len(limiter.joint_names))
        self._worst = np.zeros(len(limiter.joint_names))

    def wants(self, left_s: float) -> bool:
        """Tell whether there is time for a comparison; counts what is skipped."""
        expected_s = max(self._expected_s, self.latency.figures().p95_s)
        fits = not self.error and left_s > RESERVE * expected_s
        self.counts['skipped'] += not fits
        return fits

    def compare(self, kept: Kept) -> None:
        """Answer the observation of a kept chunk and tell how far apart both are."""
        if self.error or kept.chunk is None:
            return
        begun = self._clock()
        try:
            chunk = answer(self._policy, kept)
            found = difference(kept.chunk, chunk, self._limiter)
        except Exception as error:  # a border: a shadow must not end the thread, nor the motion
            self.error = f'it raised {type(error).__name__}: {error}'
            return
        self.latency.add(self._clock() - begun)
        if not np.isfinite(found.steps).all():
            self.error = 'it answered with values that are not finite'
            return
        self.counts['compared'] += 1
        self.counts['gripper_steps'] += found.jumps
        self._sum += np.abs(found.steps).mean(axis=0)
        self._worst = np.maximum(self._worst, found.worst)
        self._told(found, kept.chunk.stamp_ns)

    def figures(self) -> dict[str, Any]:
        """Return what ~/status tells: by joint in rad or m, mean over all and worst."""
        count = max(1, self.counts['compared'])
        names = self._limiter.joint_names
        return {
            'compared': self.counts['compared'], 'skipped': self.counts['skipped'],
            'gripper_steps': self.counts['gripper_steps'],
            'p95_ms': round(1e3 * self.latency.figures().p95_s, 1),
            'mean': dict(zip(names, (self._sum / count).round(6).tolist(), strict=True)),
            'worst': dict(zip(names, self._worst.round(6).tolist(), strict=True)),
        }


class Shadowing:
    """Which precision shadows the running one; for the executor, which never waits here."""

    def __init__(
        self, thread: InferenceThread, inference: Inference, limiter: JointLimiter,
        reference: Callable[[], Kept | Job], clock: Callable[[], float],
    ) -> None:
        self._thread, self._inference, self._limiter = thread, inference, limiter
        self._clock = clock
        self.told: Told = lambda found, stamp_ns: None
        self.on_trouble: Callable[[str], None] = lambda text: None
        self._reports: deque[tuple[str, ...]] = deque()
        self.beside = Beside(
            lambda *words, **_: self._reports.append(words), reference,
            lambda text: self.on_trouble(text))
        self.wish = self.running = self.trouble = ''
        self._turn = 0

    def request(self, name: str, make: Callable[[], Policy]) -> None:
        """Shadow with another precision, or with none where the name is empty."""
        if name == self.wish:
            return
        self.wish, self.running, self.trouble = name, '', ''
        self._turn += 1
        turn = self._turn
        self.beside.cancel()
        self._thread.submit(self._drop)
        if not name:
            return
        no_bound = np.full(len(self._limiter.joint_names), np.inf)
        trial = Trial(self._limiter, no_bound, warmup=2, slow_s=float('inf'))

        def offer(box: list[Any]) -> None:
            self._thread.submit(lambda: self._begin(turn, name, box, trial.latency_s))

        self.beside.load(make, trial, offer)

    def step(self) -> None:
        """Take in what the threads have told."""
        while self._reports:
            event, *rest = self._reports.popleft()
            if event == 'failed' and rest[0] != 'cancelled':
                self.wish, self.trouble = '', f'{self.wish}: {rest[1]}'
            elif event == 'shadowing' and rest[0] == self.wish:
                self.running = self.wish
        shadow = self._inference.shadow
        if shadow is not None and shadow.error and self.running:
            self.trouble = f'{shadow.name}: {shadow.error}'
            self.wish = self.running = ''
            self._thread.submit(self._drop)

    def status(self) -> dict[str, Any]:
        """Return what ~/status tells of the shadow."""
        shadow = self._inference.shadow
        figures = shadow.figures() if shadow is not None and self.running else {}
        return {'precision': self.running, 'requested': self.wish, 'trouble': self.trouble,
                **figures}

    def close(self) -> bool:
        """Give up what is being loaded; False when the loader is in the midst of a step."""
        return self.beside.close(timeout_s=2.0)

    # in the inference thread ---------------------------------------------------------------

    def _begin(self, turn: int, name: str, box: list[Any], latency_s: float) -> None:
        if turn != self._turn:
            self.beside.free(box)
            return
        self._inference.shadow = Shadow(
            name, box.pop(), self._limiter, latency_s, lambda *found: self.told(*found),
            self._clock)
        self._reports.append(('shadowing', name))

    def _drop(self) -> None:
        box: list[Any] = [self._inference.shadow]
        self._inference.shadow = None
        self.beside.free(box)
