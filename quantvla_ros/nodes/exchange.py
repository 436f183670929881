# SPDX-License-Identifier: Apache-2.0
"""Carries out swaps on a serving node: Swap decides, Beside loads, Handover exchanges.

The executor's calls only: nothing here waits. Owns what must hold before a wish is accepted (the
artifact is there, the gate lets it pass, there is room) and the way through a hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantvla_ros.control.guard import Guard
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.types import State
from quantvla_ros.nodes import settings
from quantvla_ros.nodes.beside import Beside, Trial
from quantvla_ros.nodes.handover import Kept
from quantvla_ros.nodes.inference import Inference, InferenceThread, Job
from quantvla_ros.nodes.making import Maker
from quantvla_ros.nodes.room import available_bytes, room_problem
from quantvla_ros.nodes.swap import Action, Stage, Swap, Wish
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import Policy, PolicySettings, Prospect

LOADED = ('precision', 'calibration')  # parameters whose change is a wish


def wish_of(values: Any) -> Wish:
    """Return what a set of parameter values asks for."""
    return Wish(values['precision'], values['calibration'])


class Admission:
    """What must hold before a precision may run. Raises ValueError with a sentence."""

    def __init__(self, maker: Maker, values: dict[str, Any]) -> None:
        self.maker, self._values = maker, values

    def look(self, wish: Wish) -> Prospect:
        """Return what is known of a wish before anything is loaded."""
        return self.maker.look(self._settings(wish))

    def doubt(self, wish: Wish) -> str:
        """Return what the gate says against a wish, '' for nothing."""
        artifact = self.look(wish).artifact
        if artifact is None:
            return ''
        return self.maker.doubt(artifact, wish.calibration, settings.gate_limits(self._values))

    def check(self, wish: Wish) -> None:
        """Refuse what the gate keeps out."""
        doubt = self.doubt(wish)
        if doubt and not self._values['gate.override']:
            raise ValueError(f'{wish} may not be activated: {doubt}; gate.override overrides this')

    def check_room(self, wish: Wish) -> None:
        """Refuse what does not fit beside the running policy."""
        reserve = self._values['swap.reserve_mb'] * 1_000_000
        problem = room_problem(str(wish), self.look(wish).nbytes, available_bytes(), reserve)
        if problem:
            raise ValueError(problem)

    def make(self, wish: Wish, *, commands: bool = True, nice: int = 0) -> Policy:
        """Check and make a policy; in a thread that may take its time.

        commands: the gate keeps no policy from answering that only shadows another.
        """
        if commands:
            self.check(wish)
        return self.maker.make(self._settings(wish), nice)

    def _settings(self, wish: Wish) -> PolicySettings:
        found = settings.policy_settings(self._values)
        return replace(found, precision=wish.precision, calibration=wish.calibration)


class Exchange:
    """The swaps of one serving node."""

    def __init__(
        self, thread: InferenceThread, admission: Admission, values: dict[str, Any],
        running: Wish, limiter: JointLimiter, guard: Guard,
    ) -> None:
        self._thread, self._admission, self._values = thread, admission, values
        self._limiter, self._guard = limiter, guard
        self.swap = Swap(running)
        self.doubt = admission.doubt(running)  # of the gate against what runs
        self.on_trouble: Callable[[str], None] = lambda text: None
        self.beside = Beside(self.swap.report, self.reference, lambda text: self.on_trouble(text))
        self.resume: Callable[[], None] = lambda: None  # enables again after a hold
        self._inference: Inference
        self._observe: Callable[[], Observation]
        self._resume = self._leaving = False

    def serve(self, inference: Inference, observe: Callable[[], Observation]) -> None:
        """Take the inference whose policy is exchanged; observe makes a kept observation."""
        self._inference, self._observe = inference, observe

    # what a user does ----------------------------------------------------------------------

    def check(self, wish: Wish) -> None:
        """Raise ValueError with a sentence when a wish cannot be accepted."""
        if wish == self.swap.running:
            return
        self._admission.check(wish)
        if self._values['swap.mode'] == 'beside':
            self._admission.check_room(wish)

    def check_shadow(self, precision: str) -> None:
        """Raise ValueError with a sentence when there is no room for a shadow."""
        self._admission.check_room(Wish(precision))

    def make_shadow(self, precision: str) -> Policy:
        """Make a policy that commands nothing; in the loader's thread."""
        return self._admission.make(Wish(precision), commands=False, nice=self._nice())

    def status(self) -> dict[str, Any]:
        """Return what ~/status tells of swaps."""
        found = self.swap.status()
        trial = self.beside.trial
        if trial is not None and trial.found is not None:
            worst = trial.found.worst.round(6).tolist()
            found['difference'] = dict(zip(trial.found.joint_names, worst, strict=True))
            found['trial_ms'] = round(1e3 * trial.latency_s, 1)
        return found

    def stay(self) -> None:
        """Do not go on after a hold: somebody stopped the arm meanwhile."""
        self._resume = False

    # at 20 Hz ------------------------------------------------------------------------------

    def step(self) -> None:
        """Do what the swap needs now."""
        moving = self._guard.state is State.RUNNING
        before = self.swap.running
        action = self.swap.step(moving=moving, hold=self._values['swap.mode'] == 'hold')
        if self.swap.running != before and self.swap.running.precision:
            self.doubt = self._admission.doubt(self.swap.running)
        if action is Action.LOAD:
            self._load()
        elif action is Action.CANCEL:
            self.beside.cancel()
        elif action is Action.ACCEPT:
            self._thread.submit(self._inference.handover.accept)
        elif action is Action.HOLD:
            self._hold(moving=moving)
        elif action is Action.RESUME and self._resume:
            self._resume = False
            self.resume()
        if self.swap.stage is Stage.HOLDING:
            self._leave_at_rest()

    def _load(self) -> None:
        wish, values = self.swap.target, self._values
        assert wish is not None, 'only a target is loaded'
        budget_s = self._inference.settings.execute * self._inference.settings.step_dt_s
        bound = self._limiter.by_kind(
            values['swap.max_difference_rad'], values['swap.max_difference_m'])
        good = values['swap.good_chunks']
        handover = self._inference.handover

        def offer(box: list[Any]) -> None:
            name = getattr(box[0], 'calibrated', wish.calibration)
            found = Wish(wish.precision, name)
            self._thread.submit(lambda: handover.take_over(box, good, found))

        self.beside.load(
            lambda: self._admission.make(wish, nice=self._nice()),
            Trial(self._limiter, bound, values['warmup'], budget_s), offer)

    def _nice(self) -> int:
        """Return the priority of a load: nothing waits for it but in a hold."""
        return 0 if self._values['swap.mode'] == 'hold' else int(self._values['swap.nice'])

    def _hold(self, *, moving: bool) -> None:
        self._resume, self._leaving = moving, False
        self._guard.stop('swap', f'held while the policy is swapped to {self.swap.target}')

    def _leave_at_rest(self) -> None:
        if self._leaving or not self._guard.at_rest:
            return
        self._leaving = True

        def leave() -> None:
            self._inference.handover.vacate()
            self.swap.report('resting')

        self._thread.submit(leave)

    def reference(self) -> Kept | Job:
        """Return the kept chunk, or let the running policy answer an observation now."""
        handover = self._inference.handover
        return handover.kept or self._thread.submit(lambda: self._answer())

    def _answer(self) -> Kept:
        observation = self._observe()
        policy = self._inference.handover.running
        chunk = None
        if policy is not None:
            chunk = policy.denoise(policy.prepare(observation), 0)
        return Kept(observation, 0, None, chunk)

    # the way out ---------------------------------------------------------------------------

    def close(self) -> bool:
        """Give up what is being loaded; False when the loader is in the midst of a step."""
        return self.beside.close(timeout_s=2.0)
