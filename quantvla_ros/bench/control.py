# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench control`: hostile generated input through player and guard, judged outside.

Owns the generator: chunks with jumps, NaN, lateness, overlap and wrong widths, jittered ticks,
clock jumps, stops, e-stops, resumes, speed-scale changes and measured poses that lie. The judge is
wire_checker.py. Exit status 1 on any violation. Commands no robot.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.bench.wire_checker import WireChecker
from quantvla_ros.control.clock import ManualClock
from quantvla_ros.control.guard import Guard, GuardSettings
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.player import ChunkPlayer
from quantvla_ros.control.types import Fault, State
from quantvla_ros.control.urdf import Limit

# seven turning joints and a finger, with unequal limits
LIMITS = {
    'j1': Limit(-2.9, 2.9, 2.17, 10.0),
    'j2': Limit(-1.76, 1.76, 2.17, 7.5),
    'j3': Limit(-2.9, 2.9, 2.17, 10.0),
    'j4': Limit(-3.07, -0.07, 2.17, 12.5),
    'j5': Limit(-2.9, 2.9, 2.61, 15.0),
    'j6': Limit(-0.02, 3.75, 2.61, 20.0),
    'j7': Limit(-2.9, 2.9, 2.61, 20.0),
    'finger': Limit(0.0, 0.04, 0.2, 2.0, prismatic=True),
}
# short times, so that a run sees thousands of starts and stops
SETTINGS = GuardSettings(
    hold_s=0.05, start_ramp_s=0.2, first_chunk_s=0.3, long_clip_s=0.5, estop_cooldown_s=0.1
)


def hostile_limiter() -> JointLimiter:
    """Return the limiter that the run uses unless it is given another one."""
    return JointLimiter(LIMITS, snap_joints=('finger',))


class HostileChunks:
    """Makes chunks around a pose: most are plausible, some are anything but."""

    def __init__(self, limiter: JointLimiter, rng: np.random.Generator) -> None:
        self._names = limiter.joint_names
        self._reach = np.minimum(limiter.velocity, 3.0)
        self._low, self._high = limiter.lower, limiter.upper
        self._rng = rng

    def next(self, pose: np.ndarray, now_ns: int, dice: random.Random) -> ActionChunk:
        """Return a chunk of 2 to 24 steps."""
        rng, width = self._rng, len(self._names)
        names, horizon = self._names, dice.randint(2, 24)
        step_s = dice.choice((0.02, 0.033, 0.05, 0.1))
        drift = rng.normal(0, 1, width) * self._reach * dice.choice((0.1, 0.5, 1.5))
        noise = rng.normal(0, dice.choice((0.0, 0.003, 0.03, 0.1)), (horizon, width))
        path = pose + drift * step_s * np.arange(horizon)[:, None] + noise
        stamp_ns = now_ns - round(dice.choice((0.0, 0.05, 0.3, 0.6)) * dice.random() * 1e9)
        trick = dice.random()
        if trick < 0.05:  # straight at a limit, and beyond
            path = pose + (self._high + 0.2 - pose) * np.linspace(0, 1, horizon)[:, None]
        elif trick < 0.10:
            path = pose + (self._low - 0.2 - pose) * np.linspace(0, 1, horizon)[:, None]
        elif trick < 0.14:  # a jump of one joint
            path[dice.randrange(horizon) :, dice.randrange(width)] += dice.uniform(-3, 3)
        elif trick < 0.17:
            bad = dice.choice((np.nan, np.inf, -np.inf, 1e308))
            path[dice.randrange(horizon), dice.randrange(width)] = bad
        elif trick < 0.19:
            names, path = names[:-1], path[:, :-1]
        elif trick < 0.21:
            names = names[::-1]
        elif trick < 0.25:  # wholly past, or far ahead
            stamp_ns += round(dice.choice((-5.0, 0.3, 3.0)) * 1e9)
        elif trick < 0.30:  # zigzag faster than any limit
            path[::2] += 0.2
        return ActionChunk(names, path, stamp_ns, step_s)


@dataclass(frozen=True)
class ControlReport:
    """What a run saw. nearest: largest share of each limit that was used."""

    commands: int
    streams: int
    seed: int
    violations: dict[str, int]
    nearest: dict[str, float]
    states: dict[str, int]
    causes: dict[str, int]
    chunks: dict[str, int]
    clipped: dict[str, int]
    tick_p50_us: float
    tick_p99_us: float
    wall_s: float
    machine: str


class HostileRun:
    """One arm, one guard, one player, and everything that can go wrong with them."""

    def __init__(self, seed: int, limiter: JointLimiter | None = None) -> None:
        self.limiter = limiter or hostile_limiter()
        self.clock = ManualClock()
        self.player = ChunkPlayer(self.limiter)
        self.guard = Guard(self.limiter.joint_names, self.limiter, SETTINGS, self.clock)
        self.checker = WireChecker(
            *([getattr(limit, key) for limit in LIMITS.values()]
              for key in ('lower', 'upper', 'velocity', 'acceleration'))
        )
        self.dice = random.Random(seed)
        self._rng = np.random.default_rng(seed)
        self._chunks = HostileChunks(self.limiter, self._rng)
        self.arm = (self.checker.lower + self.checker.upper) / 2  # where it really is
        self._wire = self.arm  # what the controller was told last
        self._faults: list[Fault] = []
        self.states: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.chunks: Counter[str] = Counter()
        self.tick_s: list[float] = []

    def _step_s(self) -> float:
        """Length of a control period: 10 ms with jitter, at times far off."""
        luck = self.dice.random()
        if luck < 0.9:
            return max(0.0006, self.dice.gauss(0.01, 0.001))
        if luck < 0.95:
            return self.dice.uniform(0.0001, 0.01)
        if luck < 0.999:
            return self.dice.uniform(0.01, 0.09)
        return self.dice.uniform(0.09, 2.0)

    def _measured(self) -> np.ndarray | None:
        luck = self.dice.random()
        measured = self.arm + self._rng.normal(0, 1e-4, self.arm.shape)
        if luck < 0.0005:
            return None
        if luck < 0.001:
            measured[self.dice.randrange(len(measured))] = self.dice.choice((np.nan, 9.0))
        return measured

    def _disturb(self) -> None:
        """Do to guard, player and clock what operators and machines do to them."""
        dice, luck = self.dice, self.dice.random()
        self._faults = []
        if luck < 0.02:
            chunk = self._chunks.next(self._wire, self.clock.now_ns(), dice)
            reason = self.guard.admit(chunk)
            merged = reason or self.player.merge(
                chunk, self.clock.now_ns(), prefixed=dice.random() < 0.2
            )
            self.chunks['merged' if merged is None else 'refused'] += 1
        elif luck < 0.0205:
            self.guard.stop('asked', 'somebody asked')
        elif luck < 0.0208:
            self.guard.estop('somebody pressed it')
        elif luck < 0.0218:
            self.limiter.speed_scale = dice.choice((0.0, 0.02, 0.1, 0.5, 1.0, 1.0))
        elif luck < 0.0220:
            self.clock.jump(dice.uniform(-2, 2))
        elif luck < 0.0223:
            self._faults = [Fault('camera', 'stale', 'generated')]
        elif luck < 0.0230:
            self.player.clear()

    def _resume(self, measured: np.ndarray | None) -> None:
        """Start again as soon as the guard lets us, now and then before that."""
        if self.guard.state is State.RUNNING or self.dice.random() < 0.7:
            return
        try:
            self.guard.reset()
            self.player.clear()
            self.guard.start(measured)
        except ValueError:
            self.states['start refused'] += 1
            return
        if self.dice.random() < 0.8:  # as a policy does: a chunk right after the start
            path = self._wire + np.zeros((8, 1))
            self.player.merge(
                ActionChunk(self.limiter.joint_names, path, self.clock.now_ns(), 0.05),
                self.clock.now_ns(),
            )

    def step(self) -> None:
        """One control period."""
        self.clock.advance(self._step_s())
        stops = self.guard.counts['stops']
        self._disturb()
        measured = self._measured()
        self._resume(measured)
        starts = self.guard.counts['starts'] if self.guard.at_rest is False else -1
        begun = time.perf_counter()
        sample = self.player.sample(self.clock.now_ns())
        skipped = self._skips()
        setpoint = self.guard.tick(sample, measured, self._faults)
        self.tick_s.append(time.perf_counter() - begun)
        if self.guard.cause is not None and self.guard.counts['stops'] > stops:
            self.causes[self.guard.cause.kind] += 1
        self.states[self.guard.state.value] += 1
        if setpoint is None:
            if self._skips() == skipped:
                self.checker.silence()
            return
        began = starts >= 0 and self.guard.counts['starts'] > starts
        self.checker.command(
            self.clock.steady_ns(), setpoint.positions, scale=self.limiter.speed_scale,
            start_pose=measured if began else None,
        )
        self._wire = setpoint.positions
        blocked = self.dice.random() < 0.02
        self.arm = self.arm + (0.0 if blocked else 0.3) * (self._wire - self.arm)

    def _skips(self) -> int:
        return self.guard.counts['skipped']

    def report(self, seed: int, wall_s: float) -> ControlReport:
        """Return what was seen so far."""
        p50, p99 = np.percentile(self.tick_s, (50, 99)) * 1e6
        return ControlReport(
            self.checker.commands, self.checker.streams, seed, dict(self.checker.violations),
            self.checker.nearest, dict(self.states), dict(self.causes.most_common()),
            {**self.chunks, **self.guard.counts['refused']}, self.guard.counts['clipped'],
            round(float(p50), 1), round(float(p99), 1), round(wall_s, 1),
            f'{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}',
        )


def run_hostile(
    commands: int, seed: int, limiter: JointLimiter | None = None
) -> ControlReport:
    """Publish `commands` commands under generated hostility and report."""
    begun = time.perf_counter()
    arm = HostileRun(seed, limiter)
    for _ in range(20 * commands + 1000):  # a guard that falls silent for good must not hang us
        if arm.checker.commands >= commands:
            break
        arm.step()
    return arm.report(seed, time.perf_counter() - begun)


def format_report(report: ControlReport) -> str:
    """Return the table for the terminal."""
    lines = [f'{report.commands} commands in {report.streams} streams, seed {report.seed}']
    lines += ['', f'{"violations of":<20} {"count":>8} {"nearest, share of limit":>26}']
    for kind, count in report.violations.items():
        near = f'{report.nearest[kind]:.9f}' if kind in report.nearest else ''
        lines.append(f'{kind:<20} {count:>8} {near:>26}')
    for title, table in (
        ('ticks by state', report.states), ('stops by cause', report.causes),
        ('chunks', report.chunks), ('clipped commands', report.clipped),
    ):
        lines += ['', title + ': ' + ', '.join(f'{key} {n}' for key, n in table.items())]
    lines += ['', f'sample + tick: p50 {report.tick_p50_us} us, p99 {report.tick_p99_us} us, '
              f'one process; whole run {report.wall_s} s; {report.machine}']
    return '\n'.join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument('--commands', type=int, default=1_000_000, help='how many to publish')
    parser.add_argument('--seed', type=int, default=0, help='the same seed, the same run')
    parser.add_argument('--json', type=Path, help='also write the report there')


def run(args: argparse.Namespace) -> int:
    """Run and print; 1 when anything was violated."""
    if args.commands < 1:
        raise ValueError(f'--commands is {args.commands}; expected at least 1')
    report = run_hostile(args.commands, args.seed)
    print(format_report(report))
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=2) + '\n')
    if report.commands < args.commands:
        print(f'only {report.commands} of {args.commands} commands were published')
    return int(sum(report.violations.values()) > 0 or report.commands < args.commands)
