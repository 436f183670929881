# SPDX-License-Identifier: Apache-2.0
"""`quantvla train all`: the whole training as one command, side by side where GPUs allow it.

Each step is one of the other stages, in a process of its own with its own log. Where there are
more GPUs than seeds, the seeds are trained beside each other while a short-lived first model, the
scout, shows where the expert has to take over; else one after the other. What is finished is not
done again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantvla_ros.training.processes import Say

SCOUT_SEED = 9  # added to --seed
TUNE = ('--data', 'demos,takeover', '--later-weight', '2', '--rate', '2e-4')
PASSED_ON = ('suites', 'textures', 'batch', 'warm_up')


@dataclass(frozen=True)
class Shares:
    """How --seconds, the time of the whole training, is divided; the rest is for loading."""

    demos: float = 0.20
    first: float = 0.42
    scout: float = 0.10
    takeover: float = 0.19
    tune: float = 0.14
    select: float = 0.10


@dataclass(frozen=True)
class Lanes:
    """Which GPUs train which seed, and which one is left for the scout; '' on a CPU."""

    seeds: tuple[str, ...]
    spare: str
    side_by_side: bool


def lanes(gpus: int, seeds: int) -> Lanes:
    """Divide the GPUs: equal lanes and a spare one, or everything for one seed after the other."""
    if gpus > seeds:
        each = (gpus - 1) // seeds
        parts = tuple(
            ','.join(str(seed * each + k) for k in range(each)) for seed in range(seeds))
        return Lanes(parts, str(gpus - 1), True)
    everything = ','.join(map(str, range(gpus)))
    return Lanes((everything,) * seeds, everything, False)


class Step:
    """One stage in a process of its own; does nothing when it has been finished before."""

    def __init__(self, work: Path, name: str, arguments: Sequence[str], gpus: str) -> None:
        self.name, self.log = name, work / 'logs' / f'{name}.log'
        self.done = work / 'logs' / f'{name}.done'
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None
        if self.done.exists():
            return
        environment = {**os.environ, **({'CUDA_VISIBLE_DEVICES': gpus} if gpus else {})}
        command = [sys.executable, '-u', '-m', 'quantvla_ros', 'train', *arguments]
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                [*command, '--work', str(work)], stdout=log, stderr=log, env=environment)

    def finish(self) -> str:
        """Wait for it; return its last line of progress. Raises ValueError with its last words."""
        if self.process is not None:
            code = self.process.wait()
            if code:
                words = self.log.read_text(errors='replace').splitlines()[-5:]
                raise ValueError(f'{self.name} ended with {code}; {self.log} ends with:\n  '
                                 + '\n  '.join(words))
            self.done.touch()
        lines = self.log.read_text(errors='replace').splitlines() or ['']
        return max(lines[-3:], key=len)

    def stop(self) -> None:
        """End it when something else failed."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class Campaign:
    """The steps in their order; all the decisions are in lanes() and Shares."""

    def __init__(self, args: argparse.Namespace, gpus: int, say: Say,
                 shares: Shares | None = None) -> None:
        self.args, self.say, self.shares = args, say, shares or Shares()
        self.lanes = lanes(gpus, args.seeds)
        self.common: list[str] = []
        for name in PASSED_ON:
            self.common += [f'--{name.replace("_", "-")}', str(getattr(args, name))]
        if args.small:
            self.common.append('--small')
        if args.cores:
            self.common += ['--cores', str(args.cores)]
        self.running: list[Step] = []

    def run(self) -> list[str]:
        """Run everything; return the models' names. Raises ValueError when a step fails."""
        try:
            return self._run()
        finally:
            for step in self.running:
                step.stop()

    def _run(self) -> list[str]:
        attempts = self.args.attempts
        self.one('demos', ['demos', *self.data(attempts), *self.limit(self.shares.demos)])
        if self.lanes.side_by_side:
            firsts = [self.start(*first) for first in self.firsts()]
            self.scout(attempts)
            for step in firsts:
                self.finish(step)
        else:
            self.scout(attempts)
            for first in self.firsts():
                self.one(*first)
        return self.tune_and_choose()

    def scout(self, attempts: str) -> None:
        """Train the scout, let the expert take over from it, render what it showed."""
        spare, seed = self.lanes.spare, self.args.seed + SCOUT_SEED
        self.one('scout', self.fit('scout', seed, self.shares.scout), spare)
        self.one('takeover', ['takeover', '--model', 'scout', '--data', 'takeover',
                              *self.data(attempts), *self.limit(self.shares.takeover)], spare)
        self.one('render', ['render', '--data', 'takeover', *self.data(attempts)])

    def firsts(self) -> list[tuple[str, list[str], str]]:
        """How each seed begins: on the demonstrations alone."""
        return [(f'first{n}', self.fit(f'first{n}', self.args.seed + n, self.shares.first), gpus)
                for n, gpus in enumerate(self.lanes.seeds)]

    def tune_and_choose(self) -> list[str]:
        """Go on with the take-overs, then let all play from the same drawn starts."""
        names, steps = [], []
        for n, gpus in enumerate(self.lanes.seeds):
            names.append(f'seed{n}')
            fit = self.fit(names[-1], self.args.seed + n, self.shares.tune)
            fit += [*TUNE, '--init', str(self.args.work / f'first{n}')]
            steps.append(self.start(names[-1], fit, gpus))
            if not self.lanes.side_by_side:
                self.finish(steps[-1])
        for step in steps:
            if self.lanes.side_by_side:
                self.finish(step)
        plays = ','.join(str(min(8, int(n))) for n in self.args.attempts.split(','))
        self.one('select', ['select', '--model', ','.join(names), *self.data(plays),
                            *self.limit(self.shares.select)])
        return names

    # -- one step --------------------------------------------------------------------------------

    def start(self, name: str, arguments: Sequence[str], gpus: str = '') -> Step:
        """Begin a step beside the others."""
        step = Step(self.args.work, name, arguments, gpus)
        self.say(f'{name}: ' + ('done before' if step.process is None else str(step.log)))
        self.running.append(step)
        return step

    def finish(self, step: Step) -> None:
        """Wait for a step and say how it ended."""
        self.say(f'{step.name}: {step.finish()}')
        self.running.remove(step)

    def one(self, name: str, arguments: Sequence[str], gpus: str = '') -> None:
        """Run a step and wait for it."""
        self.finish(self.start(name, arguments, gpus))

    def data(self, attempts: str) -> list[str]:
        """Options of a stage that simulates."""
        return [*self.common, '--seed', str(self.args.seed), '--attempts', attempts]

    def limit(self, share: float) -> list[str]:
        """Stop a stage that simulates after its share of the time."""
        return ['--limit', f'{share * self.args.seconds:.0f}']

    def fit(self, name: str, seed: int, share: float) -> list[str]:
        """Options of a training, compiled where asked, by time or by --steps."""
        options = ['fit', '--model', name, '--seed', str(seed), *self.common,
                   '--seconds', f'{share * self.args.seconds:.0f}', '--steps',
                   str(self.args.steps)]
        return [*options, '--compile'] if self.args.compile else options
