# SPDX-License-Identifier: Apache-2.0
"""Guard, player and judge on a clock moved by hand, with an arm that follows its commands."""

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.bench.wire_checker import WireChecker
from quantvla_ros.control.clock import ManualClock
from quantvla_ros.control.guard import Guard, GuardSettings
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.player import ChunkPlayer
from quantvla_ros.control.types import Fault, State
from quantvla_ros.control.urdf import Limit

NAMES = ('a', 'b')
HOME = np.array([0.2, -0.3])
DT = 0.01
STALE = Fault('camera', 'stale', 'camera: stamped 0.3 s ago')


class Arm:
    """Guard and player on a hand-moved clock, with an arm that follows its commands."""

    def __init__(self, snap=(), lead_rad=0.5, **settings):
        limits = {name: Limit(-2.0, 2.0, 2.0, 10.0) for name in NAMES}
        self.limiter = JointLimiter(limits, lead_rad=lead_rad, snap_joints=snap)
        self.clock = ManualClock(now_ns=50 * 10**9)
        self.player = ChunkPlayer(self.limiter)
        self.guard = Guard(NAMES, self.limiter, GuardSettings(**settings), self.clock)
        self.checker = WireChecker([-2, -2], [2, 2], [2, 2], [10, 10])
        self.pose = HOME.copy()
        self.blocked = False
        self.sent = []

    def chunk(self, rows, stamp_ns=None, names=NAMES, step_s=0.05):
        rows = np.array(rows, dtype=float)
        if rows.ndim == 1:
            rows = rows[:, None] + HOME
        stamp_ns = self.clock.now_ns() if stamp_ns is None else stamp_ns
        return ActionChunk(names, rows, stamp_ns, step_s)

    def merge(self, rows, **more):
        chunk = self.chunk(rows, **more)
        return self.guard.admit(chunk) or self.player.merge(chunk, self.clock.now_ns())

    def tick(self, faults=(), measured='pose', step_s=DT):
        self.clock.advance(step_s)
        measured = self.pose.copy() if isinstance(measured, str) else measured
        starting = self.guard.counts['starts']
        sample = self.player.sample(self.clock.now_ns())
        setpoint = self.guard.tick(sample, measured, faults)
        if setpoint is None:
            self.checker.silence()
        else:
            new = self.guard.counts['starts'] > starting
            self.checker.command(
                self.clock.steady_ns(), setpoint.positions, scale=self.limiter.speed_scale,
                start_pose=measured if new else None,
            )
            self.sent.append(setpoint)
            if not self.blocked:
                self.pose = setpoint.positions.copy()
        return setpoint

    def ticks(self, count, **more):
        return [self.tick(**more) for _ in range(count)]

    def run(self, seconds=1.5):
        """Start and move at 0.2 rad/s; the plan lasts for ten seconds more."""
        self.guard.start(self.pose)
        self.tick()
        assert self.merge(0.01 * np.arange(240)) is None
        self.ticks(round(seconds / DT))
        assert self.guard.state is State.RUNNING and self.guard.moving
        return self

    def settle(self, count=400):
        """Tick until silent; nothing may be violated on the way."""
        self.ticks(count)
        assert self.guard.state is State.SILENT
        assert self.checker.total == 0, dict(self.checker.violations)
        return self
