# SPDX-License-Identifier: Apache-2.0
"""The base of our managed nodes: it owns every transition, one teardown, and the way out.

A node fills in load, begin, halt and unload. What a user can mend (a ValueError or a missing
file) is logged as a sentence and fails the transition; anything else is a bug: its traceback is
logged, since rclpy swallows it, and the node goes through error processing to unconfigured.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import rclpy
from rclpy.clock import Clock, ClockType
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock as ClockMessage

from quantvla_ros.nodes.signals import STOP, StopRequest

AUTOSTART_PERIOD_S = 0.2
RETRY_AFTER_S = 1.0
SUCCESS = TransitionCallbackReturn.SUCCESS
FAILURE = TransitionCallbackReturn.FAILURE
ERROR = TransitionCallbackReturn.ERROR


class Stopped(ValueError):  # noqa: N818 - it is a request, not an error
    """The process was asked to end while a transition waited."""


class ManagedNode(LifecycleNode):
    """A lifecycle node whose subclass only says what each transition does.

    stop: looked at by every wait. autostart: configure and activate without a manager, again and
    again until it succeeds, because the robot may come up later than this node.
    """

    def __init__(self, name: str, *, stop: StopRequest | None = None, **options: Any) -> None:
        super().__init__(name, **options)
        self.stop = stop if stop is not None else STOP
        self.steady_clock = Clock(clock_type=ClockType.STEADY_TIME)
        self._retry_at = 0.0
        self._said = ''

    # what a node fills in ------------------------------------------------------------------

    def load(self) -> None:
        """Do the work of configure. May raise; unload then undoes what was half built."""

    def begin(self) -> None:
        """Do the work of activate. May raise; halt then undoes what was half begun."""

    def halt(self) -> None:
        """Undo begin. Is called in any state, also half begun, and again when it failed."""

    def unload(self) -> None:
        """Undo load. Is called in any state, also half built, and again when it failed."""

    def listen(self) -> None:
        """Take what waits on our own subscriptions: a transition keeps the executor busy."""

    # transitions ---------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load; a failure leaves nothing behind."""
        return self._attempt('configure', self.load, self.unload)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin; a failure leaves the node as it was before."""
        return self._attempt('activate', self.begin, self.halt)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Halt."""
        return self._attempt('deactivate', self.halt, self.halt)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back."""
        return self._attempt('clean up', self.unload, self.unload)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back, whatever state that was."""
        self.tear_down()
        return SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Give everything back; the node can be configured again."""
        self.tear_down()
        return SUCCESS

    def tear_down(self) -> None:
        """Halt and unload; tolerates every partial state, and one failure does not hide more."""
        for step in (self.halt, self.unload):
            try:
                step()
            except Exception:  # a border: teardown must reach its end
                self.get_logger().error(f'{step.__name__} failed:\n{traceback.format_exc()}')

    def _attempt(
        self, name: str, work: Callable[[], None], undo: Callable[[], None]
    ) -> TransitionCallbackReturn:
        try:
            work()
        except (ValueError, FileNotFoundError) as error:
            self._say_once(f'cannot {name}: {error}')
            return self._undone(undo, FAILURE)
        except Exception:  # a border: rclpy would swallow the traceback
            self.get_logger().fatal(f'{name} met a bug:\n{traceback.format_exc()}')
            return self._undone(undo, ERROR)
        self._said = ''
        self.get_logger().info(f'{name}: done')
        return SUCCESS

    def _undone(
        self, undo: Callable[[], None], result: TransitionCallbackReturn
    ) -> TransitionCallbackReturn:
        try:
            undo()
        except Exception:  # a border: rclpy would swallow the traceback
            self.get_logger().error(f'undoing failed:\n{traceback.format_exc()}')
            return ERROR
        return result

    def _say_once(self, sentence: str) -> None:
        """Log a refusal once, however often autostart meets it; figures in it do not count."""
        gist = re.sub(r'[0-9.]+', '#', sentence)
        if gist != self._said and not self.stop:
            self.get_logger().error(sentence)
        self._said = gist

    def destroy_node(self) -> None:
        """Destroy the node and its lifecycle services, which rclpy leaves on the graph.

        A service that nobody serves any more swallows the calls meant for the node's successor.
        """
        super().destroy_node()
        self._state_machine.destroy_when_not_in_use()

    # waiting -------------------------------------------------------------------------------

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait on the steady clock inside a transition, hearing our own subscriptions.

        Raises Stopped when the process is asked to end.
        """
        end = time.monotonic() + timeout_s
        while True:
            self._hear_clock()
            self.listen()
            if ready():
                return True
            if self.stop:
                raise Stopped('the process was asked to end')
            if time.monotonic() >= end:
                return False
            time.sleep(0.002)

    def _hear_clock(self) -> None:
        """Take what waits on /clock: under use_sim_time a transition would stop our own time."""
        source = self._time_source
        while source._clock_sub is not None:
            with source._clock_sub.handle:
                taken = source._clock_sub.handle.take_message(ClockMessage, False)
            if taken is None:
                return
            source.clock_callback(taken[0])

    # autostart -----------------------------------------------------------------------------

    @property
    def state_label(self) -> str:
        """The name of the present lifecycle state."""
        return str(self._state_machine.current_state[1])

    def start_by_itself(self) -> None:
        """Configure and activate from a timer, until both are done."""
        self._autostart = self.create_timer(
            AUTOSTART_PERIOD_S, self._autostart_step, clock=self.steady_clock
        )

    def _autostart_step(self) -> None:
        if self.stop or time.monotonic() < self._retry_at:
            return
        step = {'unconfigured': self.trigger_configure, 'inactive': self.trigger_activate}
        trigger = step.get(self.state_label)
        result = trigger() if trigger is not None else SUCCESS
        if result is not SUCCESS:
            self._retry_at = time.monotonic() + RETRY_AFTER_S
        if self.state_label == 'active' or result is ERROR:
            self._autostart.cancel()


def run(make_node: Callable[[], ManagedNode], argv: Sequence[str] | None = None) -> int:
    """Serve a node until SIGINT or SIGTERM; return the exit status, 0 after a clean end.

    Signals end it in any lifecycle state: the arm is brought to rest, everything is given back.
    """
    STOP.install()
    # Three kinds of threads share the interpreter: 0.5 ms instead of 5 bounds how long pure
    # Python work of one of them can keep the control tick waiting.
    sys.setswitchinterval(0.0005)
    rclpy.init(
        args=list(argv) if argv is not None else None,
        signal_handler_options=SignalHandlerOptions.NO,
    )
    try:
        node = make_node()
    except (ValueError, FileNotFoundError) as error:
        print(f'cannot start: {error}', file=sys.stderr)
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not STOP and rclpy.ok():
            executor.spin_once(timeout_sec=0.1)
    except (ExternalShutdownException, KeyboardInterrupt):
        pass
    finally:
        node.tear_down()
        executor.remove_node(node)
        node.destroy_node()
        rclpy.try_shutdown()
    STOP.ignore()
    _leave_stuck_threads()
    return 0


def _leave_stuck_threads() -> None:
    """End at once when a thread is stuck in foreign code: the interpreter may crash on it."""
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith('inference')]
    if stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
