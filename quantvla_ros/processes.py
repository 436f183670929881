# SPDX-License-Identifier: Apache-2.0
"""Run the processes of a graph as children: prefixed output, one clean stop, no orphan.

Each child leads a process group of its own, so that Ctrl-C reaches it once, through this module.
A warden, a shell that waits for the end of a pipe, ends the groups when the parent dies first.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from quantvla_ros.graph import Process

GRACE_S = 10.0  # between SIGINT and SIGTERM: time for an arm to come to rest
KILL_S = 3.0  # between SIGTERM and SIGKILL
# Reads '+pgid' and '-pgid' lines. At the end of the pipe every group left is ended, in steps.
WARDEN = """
trap '' INT TERM HUP
groups=
alive() { for g in $groups; do kill -s 0 -- "$g" 2>/dev/null && return 0; done; return 1; }
while read -r line; do
  case $line in
    +*) groups="$groups -${line#+}" ;;
    -*) kept=; for g in $groups; do [ "$g" = "$line" ] || kept="$kept $g"; done; groups=$kept ;;
  esac
done
for signal in INT TERM KILL; do
  alive || exit 0
  for g in $groups; do kill -s $signal -- "$g" 2>/dev/null; done
  n=0
  while [ $n -lt 30 ] && alive; do sleep 0.1; n=$((n + 1)); done
done
"""


def command_of(process: Process) -> list[str]:
    """Return the command line that starts a process with this interpreter."""
    if process.command:
        return list(process.command)
    start = [sys.executable, '-u', '-m', 'quantvla_ros.executables', process.executable]
    return [*start, *process.ros_arguments()]


def environment_of(process: Process) -> dict[str, str]:
    """Return the variables of a child: those of this process and of the graph."""
    package_parent = str(Path(__file__).resolve().parent.parent)
    paths = [package_parent, *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
    added = {
        'AMENT_PREFIX_PATH': os.environ.get('AMENT_PREFIX_PATH') or sys.prefix,
        'PYTHONPATH': os.pathsep.join(dict.fromkeys(path for path in paths if path)),
    }
    return {**os.environ, **added, **process.environment}


@dataclass
class Child:
    """A started process."""

    name: str
    popen: subprocess.Popen[str]
    required: bool

    @property
    def ended(self) -> bool:
        """Whether it has ended. What it left in its group goes before its number is free again."""
        if self.popen.returncode is None:
            seen = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if seen is None:
                return False
            self.signal(signal.SIGKILL)
            self.popen.wait()
        return True

    def signal(self, number: int) -> None:
        """Send a signal to its whole group, as long as it has not been reaped."""
        if self.popen.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def fate(self) -> str:
        """Say how it ended."""
        status = self.popen.returncode
        if status < 0:
            return f'was ended by {signal.Signals(-status).name}'
        return f'ended with status {status}'


class Supervisor:
    """Starts processes and stops them all. Use it as a context: leaving it leaves nothing behind.

    Start it from the main thread. log: where lines go, each with the name of its process.
    """

    def __init__(
        self,
        log: IO[str] | None = None,
        grace_s: float = GRACE_S,
        kill_s: float = KILL_S,
    ) -> None:
        self._log = log or sys.stdout
        self._grace_s, self._kill_s = grace_s, kill_s
        self._readers: list[threading.Thread] = []
        self._line = threading.Lock()
        self.children: list[Child] = []
        self.stopping = False
        self._warden: subprocess.Popen[str] | None = None

    def __enter__(self) -> Supervisor:
        self._warden = subprocess.Popen(
            ['/bin/sh', '-c', WARDEN], stdin=subprocess.PIPE, text=True, bufsize=1,
            start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._warden and self._warden.stdin:
            self._warden.stdin.close()
            self._warden.wait()

    def say(self, name: str, text: str) -> None:
        """Write one line with the name of a process before it."""
        with self._line, suppress(ValueError, BrokenPipeError):
            self._log.write(f'[{name}] {text}\n')
            self._log.flush()

    def start(self, process: Process) -> Child:
        """Start one process of a graph."""
        return self.start_command(
            process.name, command_of(process), environment_of(process), process.required)

    def start_command(
        self, name: str, command: Sequence[str], env: Mapping[str, str], required: bool = True
    ) -> Child:
        """Start any command under supervision."""
        popen = subprocess.Popen(
            list(command), env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors='replace', start_new_session=True)
        child = Child(name, popen, required)
        self.children.append(child)
        self._tell_warden(f'+{popen.pid}')
        reader = threading.Thread(target=self._copy, args=(child,), daemon=True)
        reader.start()
        self._readers.append(reader)
        return child

    def _tell_warden(self, line: str) -> None:
        if self._warden and self._warden.stdin:
            with suppress(BrokenPipeError):
                self._warden.stdin.write(line + '\n')

    def _copy(self, child: Child) -> None:
        assert child.popen.stdout is not None
        for line in child.popen.stdout:
            self.say(child.name, line.rstrip('\n'))

    def first_ended(self) -> Child | None:
        """Return a child whose end ends the graph, if there is one."""
        return next((c for c in self.children if c.required and c.ended), None)

    def wait(self, stop: threading.Event, poll_s: float = 0.1) -> Child | None:
        """Wait for the stop event or for the end of a required child, and return that child."""
        told: set[str] = set()
        while not stop.wait(poll_s):
            ended = self.first_ended()
            if ended:
                self.say(ended.name, ended.fate())
                return ended
            for child in self.children:
                if child.ended and child.name not in told:
                    told.add(child.name)
                    self.say(child.name, f'{child.fate()}; the rest goes on')
        return None

    def stop(self) -> None:
        """End every child: SIGINT, then SIGTERM, then SIGKILL to what is left of its group."""
        self.stopping = True
        for number, wait_s in ((signal.SIGINT, self._grace_s), (signal.SIGTERM, self._kill_s),
                               (signal.SIGKILL, self._kill_s)):
            left = [child for child in self.children if not child.ended]
            for child in left:
                if number != signal.SIGINT:
                    self.say(child.name, f'still runs; sending {number.name}')
                child.signal(number)
            self._await(left, wait_s)
        for child in self.children:
            if child.ended:
                self._tell_warden(f'-{child.popen.pid}')
        for reader in self._readers:
            reader.join(self._kill_s)

    def _await(self, children: Sequence[Child], wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and not all(child.ended for child in children):
            time.sleep(0.02)
