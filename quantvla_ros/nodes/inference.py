# SPDX-License-Identifier: Apache-2.0
"""The one inference thread, and when it computes the next chunk. Knows rclpy as little as torch.

The thread loads the policy, warms it up and serves it: nothing else ever calls a policy. It is a
daemon that can be left behind when foreign code hangs. A chunk is computed while the one before
executes; who has news asks with a call that never waits. An inference that will soon be due begins
with the pictures that just came, and one that is due waits for those that are about to come.
"""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.control.clock import Clock
from quantvla_ros.control.guard import Guard
from quantvla_ros.control.latency import LatencyTracker
from quantvla_ros.control.player import ChunkPlayer
from quantvla_ros.decode import DecodeError
from quantvla_ros.nodes.handover import Handover, Kept
from quantvla_ros.nodes.origin import Origin
from quantvla_ros.policies.base import DeviceError, PolicyFailedError
from quantvla_ros.priority import set_thread_nice

if TYPE_CHECKING:
    from quantvla_ros.nodes.shadow import Shadow

NICENESS = 5


class Job:
    """Work handed to a thread: its result or its error, when done is set."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.submitted_ns = time.monotonic_ns()
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do the work, keep what came of it, and let go of what it was done with."""
        work, self._work = self._work, lambda: None
        try:
            self.result = work()
        except BaseException as error:  # a border: handed to whoever waits
            self.error = error
        del work
        self.done.set()

    def value(self) -> Any:
        """Return the result of a finished job, or raise its error."""
        if self.error is not None:
            raise self.error
        return self.result


class InferenceThread:
    """Runs jobs one after the other on a thread of its own."""

    def __init__(self, name: str = 'inference', niceness: int = NICENESS) -> None:
        self._niceness = niceness
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any]) -> Job:
        """Queue work; never waits."""
        job = Job(work)
        self._jobs.put(job)
        return job

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when it is stuck and left behind."""
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        set_thread_nice(self._niceness)  # threads that hear inputs go first when cores are busy
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job.run()
            del job  # while it waits for the next one, it must not keep a policy in memory


@dataclass(frozen=True)
class InferenceSettings:
    """When chunks are made. execute: steps of a chunk that run before the next takes over."""

    execute: int
    step_dt_s: float
    timeout_s: float = 2.0
    margin_s: float = 0.05
    seed: int = 0
    prefix: bool = False


class Inference:
    """Makes chunks from the newest observation and hands them to guard and player.

    poke and overdue are for the control thread, poke, new_episode and cancel for the executor;
    _infer runs in the inference thread.
    """

    def __init__(
        self,
        thread: InferenceThread,
        handover: Handover,
        builder: ObservationBuilder,
        player: ChunkPlayer,
        guard: Guard,
        clock: Clock,
        settings: InferenceSettings,
    ) -> None:
        self._thread, self.handover, self._builder = thread, handover, builder
        self._player, self._guard, self._clock = player, guard, clock
        self.settings = settings
        self.latency = LatencyTracker(warm_up=0, budget_s=settings.execute * settings.step_dt_s)
        self.on_chunk: Callable[[ActionChunk, Origin], None] = lambda chunk, origin: None
        self.on_trouble: Callable[[str], None] = lambda text: None
        self.speed_scale: Callable[[], float] = lambda: 1.0
        self.shadow: Shadow | None = None  # written and read in the inference thread
        self.chunks = 0
        self.refused = 0
        self.spread_s = 0.0
        self._lead_s = self._took_s = 0.0
        self._episode = 0  # a chunk of an episode that is over is thrown away
        self._fresh_start = True
        self._began_ns = 0  # header time at which the last inference began
        self._next_ns = 0  # header time at which the next inference is due
        self._shown_ns = 0  # when the newest pictures were taken, when they came (header time),
        self._came_ns = 0
        self._period_ns = 0  # and how long after the ones before
        self._pending: Job | None = None
        self._poking = threading.Lock()

    def new_episode(self) -> None:
        """Forget the chunk that is being computed and start again at once."""
        self._episode += 1
        self._fresh_start = True
        self._next_ns = 0

    def cancel(self) -> None:
        """Throw away what is being computed."""
        self._episode += 1

    def idle(self) -> bool:
        """Tell whether no inference runs."""
        return self._pending is None or self._pending.done.is_set()

    def poke(self, now_ns: int) -> None:
        """Start an inference when one is due; never waits, not even for another who does this."""
        if self._poking.acquire(blocking=False):
            try:
                self._poke(now_ns)
            finally:
                self._poking.release()

    def _poke(self, now_ns: int) -> None:
        shown_ns, due_ns = self._builder.shown_ns(), self._next_ns
        came = shown_ns != self._shown_ns
        if came:
            self._period_ns = max(0, shown_ns - self._shown_ns)
            self._shown_ns, self._came_ns = shown_ns, now_ns
        # as often early as late, so that about as many inferences are made as without pictures
        slack_ns = min(self._period_ns, round(self.settings.margin_s * NS_PER_S)) // 2
        if came:
            due_ns -= slack_ns
        elif 0 < self._came_ns + self._period_ns - due_ns < slack_ns:
            due_ns += slack_ns
        if self.idle() and now_ns >= due_ns:
            episode = self._episode
            self._pending = self._thread.submit(lambda: self._infer(episode))

    def running_s(self, steady_ns: int) -> float:
        """Return how long the present inference has run, 0 when none runs."""
        pending = self._pending
        if pending is None or pending.done.is_set():
            return 0.0
        return (steady_ns - pending.submitted_ns) / NS_PER_S

    def overdue(self, steady_ns: int) -> str | None:
        """Return a sentence when the running inference takes too long."""
        passed_s = self.running_s(steady_ns)
        if passed_s <= self.settings.timeout_s:
            return None
        return (
            f'the inference has run for {passed_s:.2f} s; inference.timeout_s allows '
            f'{self.settings.timeout_s:g} s'
        )

    def _infer(self, episode: int) -> None:
        try:
            made = self._compute(episode)
        except DecodeError as error:
            if episode == self._episode:
                self._guard.stop(error.kind, str(error))
            return
        except ValueError as error:
            self._failed(episode, 'policy_refused', f'the policy refused: {error}')
            return
        except DeviceError as error:
            self.on_trouble(str(error))
            self._failed(episode, 'device_failed', str(error))
            return
        except PolicyFailedError as error:
            self._failed(episode, 'policy_raised', f'the policy failed: {error}')
            return
        except Exception as error:  # a border: a bug of a policy must not end the thread
            self.on_trouble(f'the policy raised:\n{traceback.format_exc()}')
            self._failed(
                episode, 'policy_raised', f'the policy raised {type(error).__name__}: {error}'
            )
            return
        if episode == self._episode:
            self._take(made)

    def _failed(self, episode: int, kind: str, sentence: str) -> None:
        """Return to the policy before, whose chunk is due at the next tick, or stop the arm."""
        if not self.handover.back(kind, sentence) and episode == self._episode:
            self._guard.stop(kind, sentence)

    def _compute(self, episode: int) -> Kept:
        policy = self.handover.running
        if policy is None:
            raise ValueError('no policy is loaded; one is on its way, or set precision again')
        if self._fresh_start:
            self._fresh_start = False
            policy.reset()
        started_ns, self._began_ns = time.monotonic_ns(), self._clock.now_ns()
        observation = self._builder.build()
        self.spread_s = observation.spread_ns() / NS_PER_S
        prefix, seed = None, self.settings.seed + self.chunks
        with self.handover.drift.looking(policy):
            context = policy.prepare(observation)
            if self.settings.prefix:
                prefix = self._player.remaining(observation.stamp_ns)
            chunk = policy.denoise(context, seed, prefix)
        self._took_s = (time.monotonic_ns() - started_ns) / NS_PER_S
        if episode == self._episode:
            self.latency.add(self._took_s)
        return Kept(observation, seed, prefix, chunk)

    def _take(self, made: Kept) -> None:
        """Admit and merge a chunk; a refused one is tried again at once from newer data.

        While a new policy proves itself, a refused chunk is its end and no reason to stop.
        """
        now_ns, chunk = self._clock.now_ns(), made.chunk
        assert chunk is not None, 'just computed'
        if self._player.sample(now_ns) is None:
            # The arm stood still since the observation, so the first chunk holds from now on,
            # however long a cold start took; judged by its old stamp it would seem a leap.
            chunk = replace(chunk, stamp_ns=now_ns)
        refusal = self._guard.judge(chunk) if self.handover.proving else None
        if refusal is not None and self.handover.back(*refusal):
            return
        reason = self._guard.admit(chunk)
        if reason is None:
            reason = self._player.merge(chunk, now_ns, prefixed=self.settings.prefix)
            if reason is not None and self.handover.back('not_merged', reason):
                return
            if reason is not None:
                self._guard.refused('not_merged', reason)
        if reason is not None:
            self.refused += 1
            self.on_trouble(f'chunk refused: {reason}')
            return
        self.chunks += 1
        self._lead_s = self.latency.figures().p95_s + self.settings.margin_s
        speed = max(0.05, self.speed_scale())
        executed_s = self.settings.execute * self.settings.step_dt_s / speed
        # not from the stamp, that of the pictures: where they are late, nothing else would be done
        counts_ns = max(chunk.stamp_ns, self._began_ns)
        self._next_ns = counts_ns + round((executed_s - self._lead_s) * NS_PER_S)
        self.handover.kept = made
        self.handover.good(self._took_s)
        origin = Origin.of(made.observation, made.seed, prefixed=made.prefix is not None)
        self.on_chunk(chunk, origin.of_chunk(chunk))
        shadow, left_s = self.shadow, (self._next_ns - self._clock.now_ns()) / NS_PER_S
        if shadow is not None and shadow.wants(left_s):
            self._thread.submit(lambda: shadow.compare(made))
