# SPDX-License-Identifier: Apache-2.0
"""The single gate to the wire: refuse nonsense, clip overshoot, stop with one recorded cause.

Owns the states, the e-stop latch, the cause of every stop and what is published in each control
period. Makes no plan and reads no topic. It is no safety function in the sense of a standard: it
is the last software before the controller, and the robot keeps its own stops.

    limiter = JointLimiter.from_description(joints, urdf_text, contract.limits)
    player, guard = ChunkPlayer(limiter), Guard(joints, limiter, GuardSettings(), clock)
    player.clear()
    guard.start(measured)                                      # from a service
    reason = guard.admit(chunk) or player.merge(chunk, now)    # from the inference thread
    setpoint = guard.tick(player.sample(now), measured, freshness.check())  # control timer
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.control.admission import GuardSettings, pose_problem, refuse_chunk
from quantvla_ros.control.clock import Clock
from quantvla_ros.control.limits import JointLimiter, Motion
from quantvla_ros.control.player import SLOWEST
from quantvla_ros.control.types import Fault, Sample, Setpoint, State, StopCause

__all__ = ['Guard', 'GuardSettings']

# The limiter keeps commands within `lead` of a measured pose that stands still; only an arm that
# moves away from its command, or a sensor that lies, gets farther than this share of it.
TRACKING_SHARE = 1.25


class Guard:
    """Follows samples within the limits until told to stop, by anybody, for one recorded cause.

    Threads: tick() belongs to the control timer, which alone owns the motion; admit() and
    refused() to the inference thread; start(), stop(), estop() and reset() to any. They meet in
    state, cause and latch, which _state_lock guards; nothing is called while it is held.
    """

    def __init__(
        self,
        joint_names: Sequence[str],
        limiter: JointLimiter,
        settings: GuardSettings,
        clock: Clock,
    ) -> None:
        if tuple(joint_names) != limiter.joint_names:
            raise ValueError(
                f'guard for {list(joint_names)} but limits for {list(limiter.joint_names)}'
            )
        self._limiter, self._settings, self._clock = limiter, settings, clock
        self._tolerance = limiter.by_kind(
            settings.start_tolerance_rad, settings.start_tolerance_m
        )
        self._state_lock = threading.Lock()  # guards the six below
        self._state = State.INACTIVE
        self._beginning = False  # started, and the first command is not out yet
        self._cause: StopCause | None = None
        self._latch: StopCause | None = None
        self._latched_ns = 0  # steady
        self._stops = 0
        # of the control timer alone
        self._motion = Motion.at_rest(np.zeros(len(limiter.joint_names)))
        self._last_ns = self._run_ns = self._rest_ns = 0  # steady: last command, start, rest
        self._clip_ns: int | None = None  # steady, since when something has been clipped
        self._followed = False  # a sample was followed since the start
        self._clipped = np.zeros(len(limiter.joint_names), dtype=np.int64)
        self._ticks: Counter[str] = Counter()
        # immutable, swapped whole: the timer writes commanded, inference the refusal
        self._commanded: np.ndarray | None = None
        self._refusal: tuple[str, str] | None = None
        # of the inference thread alone
        self._refused: Counter[str] = Counter()
        self._in_a_row = 0

    # -- from any thread --------------------------------------------------------------------

    def start(self, measured: np.ndarray | None, faults: Sequence[Fault] = ()) -> None:
        """Begin or resume; the first setpoint is the pose measured at the next tick.

        measured: (joints,). faults: those of Freshness.check(). Call ChunkPlayer.clear() before.
        Raises ValueError with a sentence: e-stop latched, still moving, a faulty input, a pose
        that is not finite or outside its limits.
        """
        problem = pose_problem(measured, self._limiter, self._tolerance)
        if faults:
            problem = '; '.join(fault.sentence for fault in faults)
        with self._state_lock:
            latch, state = self._latch, self._state
            if latch is not None:
                problem = f'e-stop is latched ({latch.sentence}); reset it first'
            elif state in (State.RUNNING, State.STOPPING):
                problem = f'the arm is {state.value}; start again when it is at rest'
            if not problem:
                self._state, self._beginning, self._cause = State.RUNNING, True, None
                self._refusal = None
                self._commanded = None if measured is None else self._limiter.inside(measured)
        if problem:
            raise ValueError(f'cannot start: {problem}')

    def stop(self, kind: str, sentence: str) -> bool:
        """Decelerate to rest; False when nothing runs or a cause is already recorded."""
        cause = StopCause(kind, sentence, self._clock.now_ns())
        with self._state_lock:
            return self._record(cause)

    def estop(self, sentence: str) -> None:
        """Latch the e-stop and decelerate to rest; the first sentence stays."""
        latch = StopCause('estop', sentence, self._clock.now_ns())
        steady_ns = self._clock.steady_ns()
        with self._state_lock:
            self._latched_ns = steady_ns
            self._latch = self._latch or latch
            self._record(latch)

    def _record(self, cause: StopCause) -> bool:
        """Write the cause of a stop, under the lock; only the first writer of a run does."""
        if self._state is not State.RUNNING:
            return False
        self._state, self._cause = State.STOPPING, cause
        self._stops += 1
        return True

    def reset(self) -> None:
        """Release the e-stop. Moves nothing: only start() does.

        Raises ValueError with a sentence while the cooldown lasts or the arm still moves.
        """
        steady_ns = self._clock.steady_ns()
        with self._state_lock:
            left_s = self._settings.estop_cooldown_s - (steady_ns - self._latched_ns) / NS_PER_S
            moving = self._state in (State.RUNNING, State.STOPPING)
            latched = self._latch is not None
            if latched and left_s <= 0 and not moving:
                self._latch = None
        if latched and left_s > 0:
            raise ValueError(f'e-stop was pressed just now; reset again in {left_s:.2f} s')
        if latched and moving:
            raise ValueError('the arm is still decelerating; reset again when it is at rest')

    @property
    def state(self) -> State:
        """What the guard is doing."""
        return self._state

    @property
    def cause(self) -> StopCause | None:
        """Why the arm stopped; None before the first stop and while it runs."""
        return self._cause

    @property
    def latch(self) -> StopCause | None:
        """The e-stop that is latched, or None."""
        return self._latch

    @property
    def at_rest(self) -> bool:
        """Nothing moves: inactive, holding or silent. After a deactivate, tick until this."""
        return self._state not in (State.RUNNING, State.STOPPING)

    @property
    def moving(self) -> bool:
        """The last command moved a joint, for Freshness.check()."""
        return bool(np.abs(self._motion.velocities).max() > 1e-4)

    @property
    def commanded_ns(self) -> int:
        """Steady time of the last command, by which it was limited; for the control timer."""
        return self._last_ns

    @property
    def counts(self) -> dict[str, Any]:
        """Figures since construction: published, skipped, stops, ...; clipped and refused apart.

        clipped: joint -> commands in which it was clipped. refused: kind -> chunks.
        """
        clipped = {
            name: int(count)
            for name, count in zip(self._limiter.joint_names, self._clipped, strict=True)
        }
        return {
            **{key: self._ticks[key] for key in ('published', 'skipped', 'starts')},
            'stops': self._stops,
            'clipped': clipped,
            'refused': dict(self._refused),
        }

    # -- from the inference thread ----------------------------------------------------------

    def judge(self, chunk: ActionChunk) -> tuple[str, str] | None:
        """Return (kind, sentence) when a chunk is nonsense, None when not; counts nothing."""
        return refuse_chunk(
            chunk, self._limiter, self._settings, self._clock.now_ns(), self._commanded
        )

    def admit(self, chunk: ActionChunk) -> str | None:
        """Return why a chunk is nonsense, None when it may be merged; too many in a row stop."""
        refusal = self.judge(chunk)
        if refusal is None:
            self._refusal, self._in_a_row = None, 0
            return None
        self.refused(*refusal)
        self._in_a_row += 1
        if self._in_a_row >= self._settings.max_refusals:
            kind, sentence = refusal
            if self.stop(kind, f'{self._in_a_row} chunks refused in a row; the last: {sentence}'):
                self._in_a_row = 0
        return refusal[1]

    def refused(self, kind: str, sentence: str) -> None:
        """Note a refusal made elsewhere (a late chunk): it explains a plan that then runs out."""
        self._refused[kind] += 1
        self._refusal = (kind, sentence)

    # -- from the control timer -------------------------------------------------------------

    def tick(
        self, sample: Sample | None, measured: np.ndarray | None, faults: Sequence[Fault] = ()
    ) -> Setpoint | None:
        """Return what to publish in this control period, or None to publish nothing.

        measured: (joints,) newest positions. faults: of Freshness.check(); any stops the arm.
        """
        steady_ns = self._clock.steady_ns()
        if faults:
            self.stop(faults[0].kind, faults[0].sentence)
        with self._state_lock:
            state, beginning, self._beginning = self._state, self._beginning, False
        if beginning:
            return self._begin(state, measured, steady_ns)
        if state in (State.INACTIVE, State.SILENT):
            return None
        step_s = (steady_ns - self._last_ns) / NS_PER_S
        if step_s < self._settings.min_tick_s:
            self._ticks['skipped'] += 1
            return None
        if state is State.RUNNING:
            problem = self._problem(sample, measured, steady_ns, step_s)
            if problem is None:
                return self._follow(sample, measured, steady_ns, step_s)
            self.stop(*problem)
        return self._stand_down(state, steady_ns, step_s)

    def _begin(
        self, state: State, measured: np.ndarray | None, steady_ns: int
    ) -> Setpoint | None:
        problem = pose_problem(measured, self._limiter, self._tolerance)
        if problem:
            self.stop('measured', problem)
        if problem or measured is None or state is not State.RUNNING:
            self._become(State.SILENT)  # stopped before anything was published
            return None
        self._motion = Motion.at_rest(self._limiter.inside(measured))
        self._run_ns, self._clip_ns, self._followed = steady_ns, None, False
        self._ticks['starts'] += 1
        return self._publish(steady_ns)

    def _problem(
        self, sample: Sample | None, measured: np.ndarray | None, steady_ns: int, step_s: float
    ) -> tuple[str, str] | None:
        """Return (kind, sentence) of what forbids to follow the sample in this period."""
        settings = self._settings
        if step_s > settings.max_tick_gap_s:
            return 'late_tick', (
                f'control tick came after {step_s:.3f} s; at most {settings.max_tick_gap_s:g} s'
            )
        if measured is None or measured.shape != self._motion.positions.shape:
            return 'measured', 'the measured positions are missing or of another width'
        away = np.abs(self._motion.positions - measured) / self._limiter.lead
        if not away.max() <= TRACKING_SHARE:  # so that NaN stops as well
            joint = int(away.argmax())
            return 'tracking', (
                f'joint {self._limiter.joint_names[joint]!r} is at {measured[joint]:.3f} but was '
                f'sent to {self._motion.positions[joint]:.3f}; is it blocked?'
            )
        if sample is None or sample.exhausted:
            return self._out_of_steps(steady_ns)
        if not (np.isfinite(sample.positions).all() and np.isfinite(sample.velocities).all()):
            return 'non_finite', 'the plan holds a value that is not a number'
        if self._clip_ns is not None:
            clipped_s = (steady_ns - self._clip_ns) / NS_PER_S
            if clipped_s > settings.long_clip_s:
                return 'clipping', (
                    f'commands were clipped for {clipped_s:.2f} s, at most '
                    f'{settings.long_clip_s:g} s; the policy asks for more than the limits allow'
                )
        return None

    def _out_of_steps(self, steady_ns: int) -> tuple[str, str] | None:
        if not self._followed:
            waited_s = (steady_ns - self._run_ns) / NS_PER_S
            if waited_s <= self._settings.first_chunk_s:
                return None
            kind, text = 'no_chunk', f'no chunk came within {waited_s:.2f} s of the start'
        else:
            kind, text = 'exhausted', 'the plan ran out before the next chunk came'
        refusal = self._refusal
        return (refusal[0], f'{text}; last refused: {refusal[1]}') if refusal else (kind, text)

    def _follow(
        self, sample: Sample | None, measured: np.ndarray | None, steady_ns: int, step_s: float
    ) -> Setpoint:
        settings, motion = self._settings, self._motion
        since_s = (steady_ns - self._run_ns) / NS_PER_S
        ramping = since_s < settings.start_ramp_s
        share = 1.0
        if ramping:
            share = settings.start_speed
            share += (1.0 - share) * since_s / settings.start_ramp_s
        waiting = sample is None or sample.exhausted
        self._followed = self._followed or not waiting
        self._motion, clipped = self._limiter.step(
            motion,
            motion.positions if sample is None or waiting else sample.positions,
            np.zeros_like(motion.positions) if sample is None or waiting else sample.velocities,
            step_s,
            measured=measured,
            velocity_share=share,
        )
        self._note_clipping(clipped, steady_ns, expected=ramping)
        return self._publish(steady_ns)

    def _note_clipping(self, clipped: np.ndarray, steady_ns: int, *, expected: bool) -> None:
        """Count, and time how long it lasts unless a ramp or a tiny speed scale explains it."""
        if not clipped.any():
            self._clip_ns = None
            return
        self._clipped += clipped
        if expected or self._limiter.speed_scale < SLOWEST:
            self._clip_ns = None
        elif self._clip_ns is None:
            self._clip_ns = steady_ns

    def _stand_down(self, state: State, steady_ns: int, step_s: float) -> Setpoint | None:
        """Decelerate along the last motion, hold the rest pose, then fall silent."""
        if state is State.HOLDING:
            if (steady_ns - self._rest_ns) / NS_PER_S > self._settings.hold_s:
                self._become(State.SILENT)
                return None
            return self._publish(steady_ns)
        self._motion = self._limiter.brake(self._motion, step_s)
        if not self._motion.velocities.any():
            self._rest_ns = steady_ns
            self._become(State.HOLDING)
        return self._publish(steady_ns)

    def _become(self, state: State) -> None:
        """Go from stopping to rest; start() may have come in between and then wins."""
        with self._state_lock:
            if not self._beginning:
                self._state = state

    def _publish(self, steady_ns: int) -> Setpoint:
        motion = self._motion
        self._last_ns = steady_ns
        self._commanded = motion.positions
        self._ticks['published'] += 1
        return Setpoint(motion.positions, motion.velocities, self._clock.now_ns())
