# SPDX-License-Identifier: Apache-2.0
"""The process behind isolated.py: `python -m quantvla_ros.nodes.policy_process FD`.

It imports once what a policy needs, answers questions about artifacts, and forks a process for
each policy that is asked for. Such a process loads at low priority, serves one caller, and ends
when the caller's end of the socket is closed, by whatever cause. Publishes and commands nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.making import LocalMaker
from quantvla_ros.nodes.parcel import (
    Parcel,
    chunk_of,
    observation_of,
    pack,
    pack_chunk,
    receive,
    send,
    unpack,
)
from quantvla_ros.policies.base import POLICIES, DeviceError, Policy, PolicySettings, policy_class
from quantvla_ros.priority import set_session_nice, set_thread_nice

LARGEST = 1 << 16  # bytes of a question
SERVING_NICE = 5  # the threads of the node that hear inputs go first
# kind of an error -> what it was; the first that fits. Anything else is 'raised'.
KINDS: tuple[tuple[str, type[BaseException]], ...] = (
    ('device', DeviceError), ('missing', FileNotFoundError), ('value', ValueError),
    ('memory', MemoryError),
)


def told(error: BaseException) -> dict[str, str]:
    """Return an error as the caller is told of it; a bug leaves its traceback on stderr."""
    for kind, sort in KINDS:
        if isinstance(error, sort):
            return {'error': kind, 'text': str(error)}
    traceback.print_exception(error)
    return {'error': 'raised', 'text': f'{type(error).__name__}: {error}'}


class Server:
    """Answers the questions of one node, one after the other."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._maker: LocalMaker

    def serve(self) -> None:
        """Answer until the node has gone."""
        while True:
            data, fds, _, _ = socket.recv_fds(self._control, LARGEST, 1)
            if not data:
                return
            question = json.loads(data)
            if question['do'] == 'make':
                self._fork(fds[0], settings_of(question), question['nice'])
            else:
                self._control.send(json.dumps(self._answer(question)).encode())

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._do(question)
        except Exception as error:  # a border: the node is told, and the server goes on
            return told(error)

    def _do(self, question: dict[str, Any]) -> dict[str, Any]:
        if question['do'] == 'begin':
            if question['maker']:
                POLICIES.setdefault(question['policy'], question['maker'])
            policy_class(question['policy'])
            self._maker = LocalMaker(question['policy'], load_contract(question['contract']))
            return {}
        if question['do'] == 'doubt':
            artifact = Path(question['artifact'])
            return {'doubt': self._maker.doubt(artifact, question['calibration'],
                                               question['limits'])}
        found = self._maker.look(settings_of(question))
        artifact_text = None if found.artifact is None else str(found.artifact)
        return {'nbytes': found.nbytes, 'artifact': artifact_text}

    def _fork(self, fd: int, settings: PolicySettings, nice: int) -> None:
        """Start the process of a policy: what was imported is shared with it."""
        if os.fork():
            os.close(fd)
            return
        try:
            self._control.close()
            os.setsid()  # a group of its own among those that share the machine
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            set_session_nice(nice)
            threading.Thread(target=end_with, args=(fd,), daemon=True).start()
            PolicyProcess(socket.socket(fileno=fd), self._maker, settings).serve(nice)
        except BaseException:  # the border of a process
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)


def end_with(fd: int) -> None:
    """End this process once nobody is at the other end, also in the midst of foreign code."""
    poll = select.poll()
    poll.register(fd, 0)  # a hang-up is always reported
    poll.poll()
    os._exit(0)


def settings_of(question: dict[str, Any]) -> PolicySettings:
    """Return the settings that a question carries."""
    return PolicySettings(**question['settings'])


class PolicyProcess:
    """One policy and its one caller."""

    def __init__(
        self, channel: socket.socket, maker: LocalMaker, settings: PolicySettings
    ) -> None:
        self._channel, self._maker, self._settings = channel, maker, settings
        self._policy: Policy
        self._context: Any = None
        self._number = 0  # of the context
        self._watching = contextlib.ExitStack()
        self._seen: Any = None

    def serve(self, nice: int) -> None:
        """Load, then answer until the caller has gone."""
        set_thread_nice(SERVING_NICE)
        send(self._channel, self._loaded(nice))
        while True:
            try:
                head, arrays = unpack(receive(self._channel))
            except (EOFError, ConnectionError):
                return
            send(self._channel, self._answer(head, arrays))

    def _loaded(self, nice: int) -> Parcel:
        """Load in a thread of its own priority: this one could not rise again, and it serves."""
        found: list[Any] = []

        def load() -> None:
            set_thread_nice(nice)
            try:
                found.append(self._maker.make(self._settings))
            except Exception as error:  # the border of a thread
                found.append(error)

        self._take_threads()
        thread = threading.Thread(target=load, name='load')
        thread.start()
        thread.join()
        set_session_nice(0)
        if isinstance(found[0], Exception):
            return pack({'pid': os.getpid(), **told(found[0])})
        self._policy = found[0]
        return pack({'pid': os.getpid(), **self._about()})

    def _take_threads(self) -> None:
        """Let this thread, which serves, start those that it computes with."""
        if 'torch' in sys.modules:
            from quantvla_ros.policies.threads import take_threads

            take_threads(self._settings.threads, self._settings.device)

    def _about(self) -> dict[str, Any]:
        """Return what the caller must know of the policy."""
        policy: Any = self._policy
        calibration = getattr(policy, 'calibration', None)
        ranges = None
        if calibration is not None:
            ranges = {
                kind: {name: [float(value) for value in values]
                       for name, values in getattr(calibration, kind).items()}
                for kind in ('activations', 'logits')
            }
        return {'calibrated': getattr(policy, 'calibrated', None), 'ranges': ranges,
                'watching': hasattr(policy, 'watching')}

    def _answer(self, head: dict[str, Any], arrays: Any) -> Parcel:
        try:
            return self._do(head, arrays)
        except Exception as error:  # a border: the caller is told, and the policy goes on
            return pack(told(error))

    def _do(self, head: dict[str, Any], arrays: Any) -> Parcel:
        policy: Any = self._policy
        if head['do'] == 'prepare':
            self._context = None
            self._context = policy.prepare(observation_of(head, arrays))
            self._number += 1
            return pack({'context': self._number})
        if head['do'] == 'denoise':
            if head['context'] != self._number or self._context is None:
                raise ValueError('only the newest context is kept; prepare again')
            return pack_chunk(policy.denoise(self._context, head['seed'], chunk_of(head, arrays)))
        if head['do'] == 'watch':
            self._seen = self._watching.enter_context(policy.watching(head['turn']))
            return pack({})
        if head['do'] == 'seen':
            self._watching.close()
            seen, self._seen = self._seen, None
            return pack({'inputs': dict(seen.inputs), 'spreads': dict(seen.spreads),
                         'partial': sorted(seen.partial)})
        policy.reset()
        return pack({})


def main() -> int:
    """Serve a node over the socket whose number is the one argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the node decides when this ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a policy's process leaves nothing behind
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    return 0


if __name__ == '__main__':
    sys.exit(main())
