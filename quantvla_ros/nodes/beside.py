# SPDX-License-Identifier: Apache-2.0
"""Loads policies beside the one that serves, tries them, and frees what is left over.

Owns a thread for it: neither the control thread nor the inference thread ever loads or frees.
Commands nothing and swaps nothing: a policy that stood its trial is handed to `offer`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from quantvla_ros.control.difference import Difference, difference
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.nodes.collector import COLLECTOR
from quantvla_ros.nodes.handover import Kept, answer
from quantvla_ros.nodes.inference import InferenceThread, Job
from quantvla_ros.policies.base import Policy, PolicyFailedError

REFERENCE_S = 60.0  # how long the trial waits for the running policy's answer


class Cancelled(Exception):  # noqa: N818 - it is a request, not an error
    """Another wish came."""


class Unfit(ValueError):  # noqa: N818 - a verdict, with its kind
    """A policy that did not stand its trial."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class Trial:
    """How a candidate is judged: its answer to a kept observation against the running one's.

    bound: (joints,) rad or m. slow_s: a candidate slower than this at its best is refused.
    """

    def __init__(
        self, limiter: JointLimiter, bound: np.ndarray, warmup: int, slow_s: float
    ) -> None:
        self._limiter, self._bound = limiter, bound
        self._warmup, self._slow_s = warmup, slow_s
        self.found: Difference | None = None
        self.latency_s = 0.0

    def judge(self, policy: Policy, kept: Kept) -> None:
        """Let a policy answer; raises Unfit with a sentence."""
        took: list[float] = []
        for _ in range(self._warmup):
            begun = time.monotonic()
            chunk = answer(policy, kept)
            took.append(time.monotonic() - begun)
        policy.reset()
        self.latency_s = min(took)
        if not np.isfinite(chunk.positions).all():
            raise Unfit('non_finite', 'it answers with values that are not finite')
        if kept.chunk is not None:
            self.found = difference(kept.chunk, chunk, self._limiter)
            problem = self.found.problem(self._bound)
            if problem:
                raise Unfit('difference', problem)
        if self.latency_s > self._slow_s:
            raise Unfit(
                'latency', f'it takes {self.latency_s:.3f} s for a chunk that is executed for '
                f'{self._slow_s:.3f} s'
            )


class Beside:
    """One load at a time, on a thread of its own.

    report: see Swap.report. reference: returns a job of the inference thread, or a Kept at once.
    """

    def __init__(
        self, report: Callable[..., None], reference: Callable[[], Kept | Job],
        on_trouble: Callable[[str], None],
    ) -> None:
        # Not nice at all: it holds the interpreter for moments, and a thread that loses its core
        # meanwhile keeps the control thread waiting, whatever the priority of that one.
        self.thread = InferenceThread('inference loader', niceness=0)
        self._report, self._reference, self._on_trouble = report, reference, on_trouble
        self._turn = 0  # counts loads and cancels; a load of an older turn is given up
        self.trial: Trial | None = None  # of the last load

    def load(
        self, make: Callable[[], Policy], trial: Trial, offer: Callable[[list[Any]], None]
    ) -> None:
        """Make a policy, try it, and hand it to offer in a box; reports what comes of it."""
        self._turn += 1
        turn = self._turn
        self.thread.submit(lambda: self._load(turn, make, trial, offer))

    def cancel(self) -> None:
        """Give up the load that runs, between two of its steps."""
        self._turn += 1

    def free(self, box: list[Any]) -> None:
        """Drop what is in the box, the last reference to it, in the loader's thread."""
        self.thread.submit(box.clear)

    def close(self, timeout_s: float) -> bool:
        """Give up and end the thread; False when it is in the midst of a step."""
        self.cancel()
        return self.thread.close(timeout_s)

    def _load(
        self, turn: int, make: Callable[[], Policy], trial: Trial,
        offer: Callable[[list[Any]], None],
    ) -> None:
        try:
            with COLLECTOR.paused():
                self._go_on(turn)
                policy = make()
                self._go_on(turn)
                self._report('verifying')
                trial.judge(policy, self._kept())
                self._go_on(turn)
        except Cancelled:
            self._report('failed', 'cancelled', 'another precision was asked for')
        except Unfit as error:
            self._report('failed', error.kind, str(error))
        except (ValueError, FileNotFoundError) as error:
            self._report('failed', 'refused', str(error))
        except MemoryError:
            self._report('failed', 'memory', 'the memory ran out while it was loaded')
        except PolicyFailedError as error:
            self._report('failed', 'raised', str(error))
        except Exception as error:  # a border: a bug of a policy must not end the thread
            self._on_trouble(f'loading met a bug:\n{traceback.format_exc()}')
            self._report('failed', 'raised', f'it raised {type(error).__name__}: {error}')
        else:
            self.trial = trial
            box = [policy]
            del policy
            offer(box)

    def _kept(self) -> Kept:
        """Return the kept chunk, or wait until the running policy has answered."""
        found = self._reference()
        if isinstance(found, Kept):
            return found
        if not found.done.wait(REFERENCE_S):
            raise Unfit('reference', 'the running one did not answer the same observation')
        return found.value()

    def _go_on(self, turn: int) -> None:
        if turn != self._turn:
            raise Cancelled
