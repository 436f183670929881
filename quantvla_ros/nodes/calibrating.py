# SPDX-License-Identifier: Apache-2.0
"""A calibration in a process of its own: its settings, its progress, its end. No rclpy here.

The child is `quantvla calibrate --json` at low priority. It dies with us, since it watches the
pipe that is its standard input; cancelled, it has GRACE_S to end by itself before it is killed,
which leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantvla_ros.nodes.parameters import LIVE, START, Parameter

GRACE_S = 0.5
KEPT_LINES = 12  # of what a failing child said

CALIBRATION_NODE: tuple[Parameter, ...] = (
    Parameter('autostart', False, '', START,
              'Configure and activate without a lifecycle manager.'),
    Parameter('policy_node', 'policy_node', '', START,
              'Node beside whose moving arm nothing is calibrated.'),
    Parameter('beside_active', False, '', LIVE,
              'Calibrate although the arm moves.'),
    Parameter('bag', '', '', LIVE,
              'rosbag2 directory, .mcap, .db3, or .npz of `quantvla frames`.'),
    Parameter('contract', '', '', LIVE,
              "Contract of the bag; empty takes the model's."),
    Parameter('model', '', '', LIVE,
              'Folder of the checkpoint; empty takes the shipped one.'),
    Parameter('precision', 'w4a8', '', LIVE,
              'Artifact beside the model, by name or path.'),
    Parameter('output', '', '', LIVE,
              "Name of the calibration, or a path; empty takes the bag's name."),
    Parameter('frames', 128, '', LIVE, 'Frames to fit on.', 2, 4096),
    Parameter('held_out', 32, '', LIVE, 'Frames to judge by.', 2, 1024),
    Parameter('learn', 'activations,alpha,beta', '', LIVE,
              'What is tried: any of rounding, smoothing, activations, alpha, beta.'),
    Parameter('recipe', '', '', LIVE,
              "Recipe of rounding and smoothing; empty takes the artifact's own."),
    Parameter('seed', 0, '', LIVE, 'Seed of the frames and of the noise.', 0, 2**31 - 1),
    Parameter('neutral', 0.03, '', LIVE,
              'Factors closer to 1 than this are 1 (log domain).', 0.0, 0.9),
    Parameter('clip', 0.4, '', LIVE, 'Largest factor (log domain).', 0.01, 1.9),
    Parameter('confidence', 0.95, '', LIVE,
              'Confidence that what is kept lowers the action error.', 0.5, 0.9999),
    Parameter('camera_max_age_s', 0.0, 's', LIVE,
              "Oldest picture of a recorded moment; 0 takes the contract's.", 0.0, 10.0),
    Parameter('joints_max_age_s', 0.0, 's', LIVE,
              "Oldest joint states of a recorded moment; 0 takes the contract's.", 0.0, 10.0),
    Parameter('partial', False, '', LIVE, 'Use what can be read of a damaged bag.'),
    Parameter('threads', 0, '', LIVE, 'Threads of torch; 0 lets it choose.', 0, 256),
    Parameter('nice', 19, '', LIVE,
              'Priority of the process: 0 normal, 19 only what others leave.', 0, 19),
)
SAME = ('contract', 'model', 'precision', 'frames', 'held_out', 'learn', 'recipe', 'seed',
        'neutral', 'clip', 'confidence', 'camera_max_age_s', 'joints_max_age_s', 'threads', 'nice')


class CalibratingError(ValueError):
    """A calibration that could not start; the message says what to do."""


def command(values: Mapping[str, Any]) -> list[str]:
    """Return the command line of the child. Raises CalibratingError without a bag."""
    if not values['bag']:
        raise CalibratingError('bag is empty; set it to a recording of this robot')
    words = [sys.executable, '-m', 'quantvla_ros', 'calibrate', str(values['bag']), '--json']
    for name in SAME:
        if values[name] != '':
            words += [f'--{name.replace("_", "-")}', str(values[name])]
    if values['output']:
        words += ['--out' if '/' in values['output'] else '--name', str(values['output'])]
    return [*words, *(['--partial'] if values['partial'] else [])]


def environment() -> dict[str, str]:
    """Return our variables, with this package first on the path of the child."""
    parent = str(Path(__file__).resolve().parents[2])
    paths = [parent, *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(dict.fromkeys(filter(None, paths)))}


class Calibrating:
    """One calibration. `poll` is called now and then by one thread, which also starts and cancels.

    state: what is told of it. A reader thread writes `_told` and `_errors`; poll reads them.
    """

    def __init__(self, values: Mapping[str, Any], words: Sequence[str] | None = None) -> None:
        self._words = list(words) if words is not None else command(values)
        self._popen = subprocess.Popen(
            self._words, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors='replace', start_new_session=True)
        self._told: dict[str, Any] = {}
        self._errors: list[str] = []
        self._cause, self._kill_at = '', 0.0
        self.bag, self.precision = str(values['bag']), str(values['precision'])
        self.began = time.monotonic()
        self.ended: str | None = None  # 'done', 'failed' or 'cancelled'
        self._readers = [threading.Thread(target=reader, daemon=True)
                         for reader in (self._read_lines, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @property
    def running(self) -> bool:
        """Whether the child runs."""
        return self.ended is None

    def _read_lines(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with suppress(json.JSONDecodeError):
                found = json.loads(line)
                if isinstance(found, dict):
                    self._told = {**self._told, **found}

    def _read_errors(self) -> None:
        assert self._popen.stderr is not None
        for line in self._popen.stderr:
            self._errors = [*self._errors[1 - KEPT_LINES:], line.rstrip()]

    def cancel(self, cause: str) -> None:
        """Ask the child to end; the first cause counts."""
        if self.running and not self._cause:
            self._cause, self._kill_at = cause, time.monotonic() + GRACE_S
            self._signal(signal.SIGINT)

    def _signal(self, number: int) -> None:
        if self._popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def poll(self) -> bool:
        """Look after the child; tell whether it has just ended."""
        if not self.running:
            return False
        if self._popen.poll() is None:
            if self._cause and time.monotonic() >= self._kill_at:
                self._signal(signal.SIGKILL)
            return False
        for reader in self._readers:
            reader.join(1.0)
        if 'result' in self._told:
            self.ended = 'done'
        else:
            self.ended = 'cancelled' if self._cause else 'failed'
        return True

    def finish(self) -> None:
        """End it and wait; for teardown."""
        self.cancel('the node is going')
        while self.running:
            self.poll()
            time.sleep(0.01)

    def report(self) -> dict[str, Any]:
        """Return what is told of it, ready for JSON."""
        told = self._told
        return {
            'state': self.ended or 'running',
            'stage': told.get('stage', 'starting'),
            'share': 1.0 if self.ended == 'done' else told.get('share', 0.0),
            'left_s': None if self.ended else told.get('left_s'),
            'bag': self.bag,
            'precision': self.precision,
            'sentence': self._sentence(),
            'result': told.get('result'),
        }

    def _sentence(self) -> str:
        if self.ended == 'cancelled':
            return f'cancelled: {self._cause}; nothing was written'
        if self.ended == 'failed':
            return str(self._told.get('error') or self._fate())
        if self.ended == 'done':
            result = self._told['result']
            figures = result['evidence']
            return (f'action error {1e3 * figures["before"]["mean_rad"]:.3f} mrad before, '
                    f'{1e3 * figures["after"]["mean_rad"]:.3f} after; {result["folder"]}')
        return ''

    def _fate(self) -> str:
        """Say how a child ended that did not say so itself."""
        status = self._popen.returncode
        said = '\n'.join(self._errors)
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            why = '; is the memory full?' if -status == signal.SIGKILL else ''
            return f'the calibration was ended by {name}{why}; nothing was written. {said}'
        return f'the calibration ended with status {status}: {said}'
