# SPDX-License-Identifier: Apache-2.0
"""CalibrationRun: a robot's frames and an artifact in, a Calibration with its evidence out.

Owns the order of work and what may stay: refits of layers first, then alpha, then beta, each
found on the fitted frames and kept only if the action error of held-out frames falls with
confidence. The teacher's quantized linears stay on the disk; what is held is the quantized
network, one float linear and the activations of a batch. Writes nothing: its caller does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from quantvla_ros.calibration import evidence as ev
from quantvla_ros.calibration import factors as fa
from quantvla_ros.calibration.frames import FrameSet
from quantvla_ros.calibration.passes import Encoded, Played, Seen, compare, encode, play, range_of
from quantvla_ros.calibration.refit import refit
from quantvla_ros.calibration.settings import KINDS, REFITS, CalibrationSettings
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_quantized import Opened, build, open_artifact, read_teacher
from quantvla_ros.quant.calibrated import Calibration
from quantvla_ros.quant.evidence import Evidence
from quantvla_ros.quant.linear import Make, QuantizedLayer

HELD_SEED, FLOOR_SEED = 1 << 20, 1 << 21  # of noise that no fitted frame meets


@dataclass(frozen=True)
class Progress:
    """How far a run is. share: 0 to 1 of the work. left_s: by the pace so far."""

    stage: str
    share: float
    left_s: float


Tell = Callable[[Progress], None]
Note = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """What was tried on held-out frames and what they said. Errors in rad."""

    what: str
    kept: bool
    sentence: str
    before_rad: float
    after_rad: float
    low_rad: float = 0.0
    searched_rad: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A calibration, and everything that the report shows beside it.

    found: kind -> form -> attention -> factors before band and clip. details: of
    evidence.details, by 'floor', 'before', 'after'. reference: what float does.
    """

    calibration: Calibration
    questions: tuple[Question, ...]
    found: Mapping[str, Mapping[str, Mapping[str, list[float]]]]
    details: Mapping[str, Mapping[str, Any]]
    reference: Played


class _Work:
    """Counts work in frames, weighted by what a frame costs, and says how much time is left."""

    TEACHER, STUDENT, ACTIONS, REFIT = 2.5, 1.0, 0.6, 12.0

    def __init__(self, tell: Tell) -> None:
        self._tell, self._began = tell, time.monotonic()
        self.total, self._done, self._stage = 0.0, 0.0, ''

    def stage(self, name: str, cost: float) -> Note:
        """Begin a stage; return what is told of each batch of frames in it."""
        self._stage = name
        self.step(0, 0.0)
        return lambda frames: self.step(frames, cost)

    def step(self, frames: int, cost: float) -> None:
        """Frames were done."""
        self._done += frames * cost
        share = min(1.0, self._done / max(self.total, 1e-9))
        spent = time.monotonic() - self._began
        self._tell(Progress(self._stage, share, spent * (1 - share) / share if share else 0.0))


class CalibrationRun:
    """One run. `run` may be left by an exception of `tell` at any time; nothing is on the disk."""

    def __init__(
        self,
        frames: FrameSet,
        contract: Contract,
        settings: CalibrationSettings,
        make: Make,
        tell: Tell = lambda _: None,
    ) -> None:
        self.frames, self.contract, self.settings = frames, contract, settings
        self._make = make
        self._work = _Work(tell)
        self._work.total = self._expected()
        self._questions: list[Question] = []

    def _expected(self) -> float:
        """Weigh the stages that are known beforehand."""
        w, fit, held = self._work, len(self.frames.fit), len(self.frames.held_out)
        search = min(self.settings.search_frames, fit)
        refits = sum(name in self.settings.learn for name in REFITS[:2])
        trials = sum(16 * w.ACTIONS * search + 2 * w.ACTIONS * held
                     for kind in KINDS if kind in self.settings.learn)
        return (2 * held * w.TEACHER + fit * (w.TEACHER + w.STUDENT) + 2 * held * w.STUDENT
                + search * (w.TEACHER + w.STUDENT) + trials
                + refits * min(self.settings.refit_frames, fit) * w.REFIT)

    def run(self) -> Outcome:
        """Do it all. Raises ValueError, with a sentence, for what the user can mend."""
        torch.manual_seed(self.settings.seed)
        opened = open_artifact(self.settings.model, self.settings.precision)
        teacher = self._policy(opened, read_teacher(opened))
        layers: Mapping[str, QuantizedLayer] = opened.artifact.layers
        student = self._policy(opened, build(opened, layers, self._make))
        held, w = self.frames.held_out, self._work
        note = w.stage('float, held-out frames', w.TEACHER)
        encoded = encode(teacher, held, HELD_SEED)
        reference = play(teacher, encoded, note)
        floor = play(teacher, Encoded(encoded.batches, FLOOR_SEED), note)
        del encoded
        before = self._judged(student, 'quantized, held-out frames')
        tests = self._tests(layers)
        student, layers, refitted = self._refits(
            opened, student, layers, reference, before, tests)
        seen = compare(
            teacher, student, opened.sites.attentions, self._measured(opened),
            self.frames.fit, self.settings.seed, w.stage('side by side', w.TEACHER + w.STUDENT),
        )
        factors = self._factors(teacher, student, opened, layers, seen, reference, tests)
        after = self._judged(student, 'calibrated, held-out frames')
        return self._outcome(
            opened, factors, refitted, seen, reference, floor, before, after)

    # -- parts ---------------------------------------------------------------------------------

    def _policy(self, opened: Opened, net: Any) -> LiberoVla:
        settings = PolicySettings(threads=self.settings.threads)
        return LiberoVla.around(self.contract, settings, opened.checkpoint, net)

    def _measured(self, opened: Opened) -> list[str]:
        """Linears whose inputs are measured: those that run for each frame."""
        return [site.name for site in opened.sites.linears if site.group != 'modulation'
                and not site.name.startswith('action.time')]

    def _tests(self, layers: Mapping[str, QuantizedLayer]) -> int:
        """How many questions the held-out frames may be asked."""
        asked = set(self.settings.learn)
        if all(layer.act_scales is None for layer in layers.values()):
            asked.discard('activations')
        return max(1, len(asked))

    def _judged(self, student: LiberoVla, stage: str) -> Played:
        note = self._work.stage(stage, self._work.STUDENT)
        return play(student, encode(student, self.frames.held_out, HELD_SEED), note)

    def _errors(self, found: Played, reference: Played) -> np.ndarray:
        return ev.frame_errors(found, reference, self.contract.action.execute)

    def _played(
        self, student: LiberoVla, encoded: Encoded, reference: Played, note: Note
    ) -> np.ndarray:
        return self._errors(play(student, encoded, note), reference)

    def _ask(
        self, what: str, before: np.ndarray, after: np.ndarray, tests: int,
        searched: Mapping[str, float] | None = None,
    ) -> bool:
        """Ask the held-out frames whether a change stays, and note what they say."""
        confidence = 1 - (1 - self.settings.confidence) / tests
        verdict = ev.judge(before, after, confidence, self.settings.seed)
        said = 'lowers' if verdict.helps else 'does not lower'
        self._questions.append(Question(
            what, verdict.helps,
            f'{said} the action error of {len(before)} held-out frames with '
            f'{100 * confidence:.1f} % confidence (paired bootstrap): '
            f'{1e3 * before.mean():.3f} to {1e3 * after.mean():.3f} mrad, gain at least '
            f'{1e3 * verdict.low_rad:.3f}',
            float(before.mean()), float(after.mean()), verdict.low_rad, searched or {}))
        return verdict.helps

    def _refits(
        self, opened: Opened, student: LiberoVla, layers: Mapping[str, QuantizedLayer],
        reference: Played, before: Played, tests: int,
    ) -> tuple[LiberoVla, Mapping[str, QuantizedLayer], dict[str, QuantizedLayer]]:
        """Try refits of layers; return the student, all its layers, and those that changed."""
        kept: dict[str, QuantizedLayer] = {}
        errors = self._errors(before, reference)
        for what in (name for name in REFITS if name in self.settings.learn):
            note = self._work.stage(f'refit: {what}', self._work.REFIT)
            some = _spread(self.frames.fit, self.settings.refit_frames)
            found = refit(what, opened, self.contract, layers, some, self.settings, self._make,
                          note)
            if not found:
                self._questions.append(Question(
                    what, False, 'this artifact has no layer of that kind',
                    float(errors.mean()), float(errors.mean())))
                continue
            trial = self._policy(opened, build(opened, {**layers, **found}, self._make))
            after = self._errors(self._judged(trial, f'refit: {what}, held-out'), reference)
            if self._ask(what, errors, after, tests):
                student, layers, errors = trial, {**layers, **found}, after
                kept.update(found)
        return student, layers, kept

    def _factors(
        self, teacher: LiberoVla, student: LiberoVla, opened: Opened,
        layers: Mapping[str, QuantizedLayer], seen: Seen, reference: Played, tests: int,
    ) -> fa.Factors:
        """Choose alpha and beta on fitted frames, and ask the held-out ones."""
        w, kept = self._work, fa.Factors()
        kinds = [kind for kind in KINDS if kind in self.settings.learn]
        foldable = fa.Foldable(student.net, opened.sites, layers, self._make)
        if not kinds or not foldable.sites.attentions:
            return kept
        some = _spread(self.frames.fit, self.settings.search_frames)
        note = w.stage('float, search frames', w.TEACHER)
        goal = play(teacher, encode(teacher, some, self.settings.seed), note)
        searching = encode(student, some, self.settings.seed)
        judging = encode(student, self.frames.held_out, HELD_SEED)
        note = w.stage('search', w.ACTIONS)
        errors = partial(self._played, student, searching, goal, note)
        options = {kind: fa.proposals(seen, foldable.sites.attentions, kind,
                                      self.settings.neutral, self.settings.clip)
                   for kind in kinds}
        # what weighs most comes first: beside a large error a small gain cannot be told
        for kind in fa.by_weight(foldable, options, errors):
            choice = fa.choose(foldable, kept, kind, options[kind], errors)
            if not choice.factors:
                self._questions.append(Question(
                    kind, False, 'no form lowers the error of the frames it was fitted on'
                    if choice.form else 'every factor lies in the neutral band',
                    choice.before_rad, choice.before_rad, searched_rad=choice.errors_rad))
                continue
            old = self._played(student, judging, reference, note)
            trial = kept.put(kind, choice.factors)
            foldable.set(trial)
            new = self._played(student, judging, reference, note)
            name = f'{kind} ({choice.form}, {len(choice.factors)} attentions)'
            if self._ask(name, old, new, tests, choice.errors_rad):
                kept = trial
            foldable.set(kept)
        return kept

    def _outcome(
        self, opened: Opened, factors: fa.Factors, refitted: dict[str, QuantizedLayer],
        seen: Seen, reference: Played, floor: Played, before: Played, after: Played,
    ) -> Outcome:
        execute = self.contract.action.execute
        stood = standing(self.frames.held_out, self.contract)
        judged = {'floor': floor, 'before': before, 'after': after}
        evidence = Evidence(len(self.frames.held_out), **{
            name: ev.figures(found, reference, stood, execute) for name, found in judged.items()})
        calibration = Calibration(
            artifact=opened.artifact.sha256,
            checkpoint=opened.checkpoint.sha256,
            precision=opened.artifact.provenance.precision,
            evidence=evidence,
            alpha=factors.alpha,
            beta=factors.beta,
            activations={name: range_of(found) for name, found in seen.inputs.items()},
            logits={name: range_of(found) for name, found in seen.spreads.items()},
            layers=refitted,
        )
        return Outcome(
            calibration, tuple(self._questions), fa.raw_values(seen),
            {name: ev.details(found, reference, execute) for name, found in judged.items()},
            reference,
        )


def with_provenance(outcome: Outcome, provenance: Mapping[str, Any]) -> Outcome:
    """Return the outcome with where it came from written into its calibration."""
    return replace(outcome, calibration=replace(outcome.calibration, provenance=provenance))


def _spread(observations: Sequence[Observation], count: int) -> list[Observation]:
    chosen = np.linspace(0, len(observations) - 1, min(count, len(observations)))
    return [observations[i] for i in chosen.round().astype(int)]


def standing(observations: Sequence[Observation], contract: Contract) -> np.ndarray:
    """Where the arm's commanded joints, but the gripper, stood in each frame."""
    joints = contract.action.joints[:-1]
    return np.stack([
        o.joint_positions[[o.joint_names.index(name) for name in joints]] for o in observations
    ])
