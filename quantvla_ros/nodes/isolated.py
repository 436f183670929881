# SPDX-License-Identifier: Apache-2.0
"""Policies in processes of their own, so that nothing of a policy holds this interpreter.

A policy that loads, infers, hangs, crashes or runs out of memory does so elsewhere: the control
tick shares an interpreter with inputs and services alone. Owns the sockets and the ends of these
processes; policy_process.py is their inside. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.nodes.parcel import (
    Parcel,
    chunk_of,
    pack,
    pack_chunk,
    pack_observation,
    receive,
    send,
    unpack,
)
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import (
    POLICIES,
    DeviceError,
    PolicyFailedError,
    PolicySettings,
    Prospect,
)

LARGEST = 1 << 20  # bytes of an answer about artifacts
END_S = 2.0  # a process that was left alone has so long to end by itself
OVERHEAD_BYTES = 60_000_000  # what a process takes beyond its policy; libraries are shared
GONE = ('the process of the policy has ended; is the memory full? Set another precision, or clean '
        'up and configure')


ERRORS: dict[str, type[Exception]] = {
    'value': ValueError, 'missing': FileNotFoundError, 'memory': MemoryError,
    'device': DeviceError,
}


def hang_up(near: socket.socket) -> None:
    """End a connection under whoever waits at it: both sides hear it."""
    with contextlib.suppress(OSError):
        near.shutdown(socket.SHUT_RDWR)


def raise_told(head: Mapping[str, Any]) -> None:
    """Raise the error that an answer tells of, if it does."""
    if 'error' in head:
        raise ERRORS.get(head['error'], PolicyFailedError)(head['text'])


@dataclass(frozen=True)
class Ranges:
    """Of a calibration, what drift is measured against: name -> (low, mean, high)."""

    activations: Mapping[str, np.ndarray] = field(default_factory=dict)
    logits: Mapping[str, np.ndarray] = field(default_factory=dict)


class IsolatedPolicy:
    """The near end of a policy in a process of its own. One thread at a time may use it.

    The process ends with the last reference to this, or with kill(). Waits until it is loaded.
    """

    def __init__(self, contract: Contract, near: socket.socket) -> None:
        self.contract, self._near = contract, near
        self._pidfd = -1
        made = self._hear()[0]
        with contextlib.suppress(OSError):  # it may be gone already
            self._pidfd = os.pidfd_open(made['pid'])
        self._watched: bool = made['watching']
        self.calibration = self._ranges(made['ranges'])
        if made['calibrated'] is not None:
            self.calibrated: str = made['calibrated']

    def prepare(self, observation: Observation) -> int:
        """See Policy; the context stays in the process and ends with the next one."""
        number: int = self._ask(pack_observation(observation, do='prepare'))[0]['context']
        return number

    def denoise(self, context: int, seed: int, prefix: ActionChunk | None = None) -> ActionChunk:
        """See Policy."""
        chunk = chunk_of(*self._ask(pack_chunk(prefix, do='denoise', context=context, seed=seed)))
        assert chunk is not None, 'every denoise makes a chunk'
        return chunk

    def reset(self) -> None:
        """See Policy."""
        self._ask(pack({'do': 'reset'}))

    @property
    def watching(self) -> Callable[[int], AbstractContextManager[Any]] | None:
        """How to look into a chunk, None where the policy cannot be seen."""
        return self._looking if self._watched else None

    @contextlib.contextmanager
    def _looking(self, turn: int) -> Iterator[Any]:
        """Look at the chunk that is made inside; what was seen is there afterwards."""
        self._ask(pack({'do': 'watch', 'turn': turn}))
        seen: dict[str, Any] = {}
        holder = _Late(seen)
        try:
            yield holder
        finally:
            seen.update(self._ask(pack({'do': 'seen'}))[0])

    def _ask(self, parcel: Parcel) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            send(self._near, parcel)
        except OSError as error:
            raise PolicyFailedError(GONE) from error
        return self._hear()

    def _hear(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            head, arrays = unpack(receive(self._near))
        except (EOFError, OSError) as error:
            raise PolicyFailedError(GONE) from error
        raise_told(head)
        return head, arrays

    @staticmethod
    def _ranges(told: Mapping[str, Any] | None) -> Ranges | None:
        if told is None:
            return None
        return Ranges(**{
            kind: {name: np.asarray(values) for name, values in rows.items()}
            for kind, rows in told.items()
        })

    def kill(self) -> None:
        """End the process at once; whoever waits for it hears that it has gone."""
        hang_up(self._near)
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def __del__(self) -> None:
        """Let the process end, and wait until its memory is back."""
        with contextlib.suppress(OSError):
            hang_up(self._near)
            self._near.close()
        if self._pidfd < 0:
            return
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)  # readable once it has ended
        if not poll.poll(1e3 * END_S):
            self.kill()
        os.close(self._pidfd)
        self._pidfd = -1


class _Late:
    """What a policy saw of itself; the values are there when the chunk has been made."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self._told = told

    @property
    def inputs(self) -> Mapping[str, float]:
        """Layer -> largest input."""
        return dict(self._told['inputs'])

    @property
    def spreads(self) -> Mapping[str, float]:
        """Attention -> spread of its logits."""
        return dict(self._told['spreads'])

    @property
    def partial(self) -> frozenset[str]:
        """Names of which not every step was seen."""
        return frozenset(self._told['partial'])


class PolicyServer:
    """A Maker whose policies live in processes of their own. Questions come from any thread.

    source: name or path of the contract, as load_contract takes it.
    """

    def __init__(self, name: str, contract: Contract, source: str) -> None:
        self._contract = contract
        self._asking = threading.Lock()
        self._made: weakref.WeakSet[IsolatedPolicy] = weakref.WeakSet()
        self._loading: set[socket.socket] = set()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far:
            self._popen = subprocess.Popen(
                [sys.executable, '-m', 'quantvla_ros.nodes.policy_process', str(far.fileno())],
                pass_fds=[far.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, sys.path))})
        self._control = near
        try:
            self._ask({'do': 'begin', 'policy': name, 'maker': POLICIES.get(name, ''),
                       'contract': source})
        except BaseException:
            self.close()
            raise

    def look(self, settings: PolicySettings) -> Prospect:
        """See Maker; a process of its own takes a little more."""
        found = self._ask({'do': 'look', 'settings': asdict(settings)})
        artifact = None if found['artifact'] is None else Path(found['artifact'])
        return Prospect(found['nbytes'] + OVERHEAD_BYTES, artifact)

    def doubt(self, artifact: Path, calibration: str, limits: Mapping[str, Any]) -> str:
        """See Maker."""
        return str(self._ask({'do': 'doubt', 'artifact': str(artifact),
                              'calibration': calibration, 'limits': dict(limits)})['doubt'])

    def make(self, settings: PolicySettings, nice: int = 0) -> IsolatedPolicy:
        """See Maker; waits until it is loaded."""
        near, far = socket.socketpair()
        question = {'do': 'make', 'settings': asdict(settings), 'nice': nice}
        with far, self._asking:
            self._send(json.dumps(question).encode(), [far.fileno()])
        self._loading.add(near)
        try:
            policy = IsolatedPolicy(self._contract, near)
        finally:
            self._loading.discard(near)
        self._made.add(policy)
        return policy

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with self._asking:
            self._send(json.dumps(question).encode(), [])
            data = self._control.recv(LARGEST)
        if not data:
            raise ValueError('the process that makes policies has ended; clean up and configure '
                             'again')
        found: dict[str, Any] = json.loads(data)
        raise_told(found)
        return found

    def _send(self, data: bytes, fds: list[int]) -> None:
        try:
            socket.send_fds(self._control, [data], fds)
        except OSError as error:
            raise ValueError('the process that makes policies has ended; clean up and configure '
                             'again') from error

    def close(self) -> None:
        """End every process, also one that hangs."""
        for near in list(self._loading):
            hang_up(near)
        for policy in list(self._made):
            policy.kill()
        self._control.close()
        try:
            self._popen.wait(END_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
