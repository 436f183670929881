# SPDX-License-Identifier: Apache-2.0
"""The control thread, and a request to stop."""

import threading

from quantvla_ros.nodes.control_thread import ControlThread
from quantvla_ros.nodes.signals import StopRequest

PATIENCE_S = 30.0


def test_control_thread_ticks_until_it_is_stopped():
    enough = threading.Event()
    control = ControlThread(lambda: enough.set() if control.ticks > 5 else None, 1000.0)
    control.start()
    assert enough.wait(PATIENCE_S)
    assert control.stop()
    ticks = control.ticks
    assert not control._thread.is_alive()
    assert control.ticks == ticks
    assert control.lateness().count >= ticks


def test_exception_in_a_tick_ends_the_thread_and_is_kept():
    def tick():
        raise RuntimeError('a bug')

    control = ControlThread(tick, 1000.0)
    control.start()
    control._thread.join(PATIENCE_S)
    assert 'RuntimeError: a bug' in control.error


def test_missed_ticks_are_counted_and_not_made_up():
    calls, gate, done = [], threading.Event(), threading.Event()

    def tick():
        calls.append(1)
        if len(calls) == 1:
            gate.wait(PATIENCE_S)
        elif control.missed:
            done.set()

    control = ControlThread(tick, 100.0)
    control.start()
    threading.Timer(0.1, gate.set).start()
    assert done.wait(PATIENCE_S)
    control.stop()
    assert control.missed >= 8
    assert len(calls) <= 3 + control.ticks - 1


def test_stop_request_is_set_once_and_stays():
    request = StopRequest()
    assert not request
    request.set()
    request.set()
    assert request
