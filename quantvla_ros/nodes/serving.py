# SPDX-License-Identifier: Apache-2.0
"""Everything that serves a policy between configure and cleanup, put together once.

Three threads meet here. The executor's calls begin, enable, stop and end; the control thread
calls tick and nothing else; the inference thread makes chunks. What they share is an immutable
snapshot inside player, guard and builder each.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.node import Node

from quantvla_ros.action import NS_PER_S
from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.contract import Contract
from quantvla_ros.control.freshness import Freshness
from quantvla_ros.control.guard import Guard
from quantvla_ros.control.player import ChunkPlayer
from quantvla_ros.control.types import Fault, Setpoint, State
from quantvla_ros.nodes import settings
from quantvla_ros.nodes.collector import COLLECTOR
from quantvla_ros.nodes.commands import joint_order
from quantvla_ros.nodes.control_thread import ControlThread
from quantvla_ros.nodes.exchange import Admission, Exchange, wish_of
from quantvla_ros.nodes.handover import Handover
from quantvla_ros.nodes.inference import NICENESS, Inference, InferenceThread
from quantvla_ros.nodes.inputs import Inputs
from quantvla_ros.nodes.making import LocalMaker, Maker
from quantvla_ros.nodes.shadow import Shadowing
from quantvla_ros.nodes.swap import Wish
from quantvla_ros.nodes.wire import CommandPublisher
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import Policy
from quantvla_ros.priority import set_thread_realtime

Wait = Callable[[Callable[[], bool], float], bool]
LOAD_TIMEOUT_S = 3600.0
REST_TIMEOUT_S = 5.0
# Slower than this, in rad/s or m/s, a picture of few pixels may rightly stay as it was.
MOVING_SPEED = 0.02


class NodeClock:
    """Header stamps by the node's clock, simulated when it says so; steady time by the host's."""

    def __init__(self, node: Node) -> None:
        self._clock = node.get_clock()

    def now_ns(self) -> int:
        """Return ROS time."""
        return int(self._clock.now().nanoseconds)

    def steady_ns(self) -> int:
        """Return the host's steady time."""
        return time.monotonic_ns()


class Serving:
    """A policy on a robot. Raises ValueError for whatever the user can mend; end() undoes all."""

    def __init__(
        self, node: Node, contract: Contract, values: dict[str, Any], description: str
    ) -> None:
        self.contract, self.values = contract, values
        self.clock = NodeClock(node)
        self.dry_run: bool = values['dry_run']
        self.simulated_time = bool(node.get_parameter('use_sim_time').value)
        self.limiter = settings.joint_limiter(values, contract, description)
        self.player = ChunkPlayer(self.limiter, settings.player_settings(values))
        self.guard = Guard(
            contract.action.joints, self.limiter, settings.guard_settings(values), self.clock
        )
        self.builder = ObservationBuilder(contract)
        self.freshness = self._new_freshness()
        self.inference_settings = settings.inference_settings(values, contract)
        self._undo: list[Callable[[], Any]] = []  # of what connect has built, newest last
        self.commands: CommandPublisher
        self.send: Callable[[np.ndarray, np.ndarray], None]  # to the wire; of the control thread
        self.inputs: Inputs
        self.thread: InferenceThread
        self.inference: Inference | None = None
        self.exchange: Exchange | None = None
        self.shadowing: Shadowing | None = None
        self.control: ControlThread | None = None
        self._maker: Maker | None = None
        self._moving = False
        self.faults: list[Fault] = []  # of the last tick, for diagnostics
        self._columns = joint_order(contract.joints.names, contract.action.joints)
        self._virtual: np.ndarray | None = None  # dry run: where a perfect robot would be

    # configure -----------------------------------------------------------------------------

    def connect(self, node: Node) -> None:
        """Create publishers, subscriptions and the thread; end undoes also a part of it."""
        self.commands = CommandPublisher(
            node, self.contract, self.limiter, self.values['trajectory.lead_s']
        )
        self.send = self.commands.publish
        self._undo.append(self.commands.destroy)
        self.inputs = Inputs(node, self.contract, self.builder)
        self._undo.append(self.inputs.destroy)
        # Where a policy has a process of its own, this thread only waits and must not be late.
        isolated = self.values['policy_process']
        self.thread = InferenceThread(niceness=0 if isolated else NICENESS)
        self._undo.append(lambda: self.thread.close(timeout_s=1.0))

    def listen(self) -> None:
        """Hear the inputs within a transition."""
        if len(self._undo) > 1:
            self.inputs.listen()

    def load_policy(self, wait: Wait) -> None:
        """Make the policy and warm it up in the inference thread; hears a request to stop."""
        name, wish = self.values['policy'] or self.contract.policy, wish_of(self.values)
        maker = self._maker = self._make_maker(name)
        admission = Admission(maker, self.values)
        job = self.thread.submit(lambda: self._warmed_up(admission.make(wish)))
        wait(job.done.is_set, LOAD_TIMEOUT_S)
        policy = job.value()
        job.result = None
        running = Wish(wish.precision, getattr(policy, 'calibrated', wish.calibration))
        exchange = self.exchange = Exchange(
            self.thread, admission, self.values, running, self.limiter, self.guard)
        self._undo.append(exchange.close)
        step_s = self.inference_settings.execute * self.inference_settings.step_dt_s
        handover = Handover(policy, exchange.swap.report, exchange.beside.free, step_s,
                            settings.drift_settings(self.values))
        self.inference = Inference(
            self.thread, handover, self.builder, self.player, self.guard, self.clock,
            self.inference_settings,
        )
        self.inference.speed_scale = lambda: self.limiter.speed_scale
        exchange.resume = self.enable
        self.inputs.on_picture = self._picture_came
        exchange.serve(self.inference, self._observe)
        self.shadowing = Shadowing(
            self.thread, self.inference, self.limiter, exchange.reference, time.monotonic)
        self._undo.append(self.shadowing.close)
        if self.values['shadow']:
            shadow = self.values['shadow']
            self.shadowing.request(shadow, lambda: exchange.make_shadow(shadow))

    def _make_maker(self, name: str) -> Maker:
        """Return what makes policies: in this process, or in processes of their own."""
        if not self.values['policy_process']:
            return LocalMaker(name, self.contract)
        from quantvla_ros.nodes.isolated import PolicyServer

        return PolicyServer(name, self.contract, self.values['contract'])

    def _warmed_up(self, policy: Policy) -> Policy:
        observation = self.example()
        for turn in range(self.values['warmup']):
            policy.denoise(policy.prepare(observation), turn)
        policy.reset()
        return policy

    @property
    def policy(self) -> Policy | None:
        """The policy that makes the next chunk."""
        return None if self.inference is None else self.inference.handover.running

    def _observe(self) -> Observation:
        """Return what is seen now, or an example where nothing is."""
        return self.example() if self.builder.missing() else self.builder.build()

    def example(self) -> Observation:
        """Return an observation of the contract's shapes, for warming up."""
        contract = self.contract
        middle = np.zeros(len(contract.joints.names))
        middle[self._columns] = np.where(
            np.isfinite(self.limiter.lower + self.limiter.upper),
            0.5 * (self.limiter.lower + self.limiter.upper), 0.0,
        )
        return Observation(
            images={
                camera.name: np.zeros((camera.policy_height, camera.policy_width, 3), np.uint8)
                for camera in contract.cameras
            },
            image_stamps_ns=dict.fromkeys(contract.camera_names, NS_PER_S),
            joint_names=contract.joints.names,
            joint_positions=middle,
            joint_stamp_ns=NS_PER_S,
            instruction=contract.instruction,
            vectors={vector.name: np.zeros(vector.size) for vector in contract.vectors},
            vector_stamps_ns={vector.name: NS_PER_S for vector in contract.vectors},
        )

    # activate ------------------------------------------------------------------------------

    def begin(self, wait: Wait) -> None:
        """Wait for fresh inputs and a controller, then tick; nothing moves before enable."""
        self.refuse_stuck()
        COLLECTOR.freeze()  # before the inputs, which would grow old in that time
        timeout_s = self.values['freshness.wait_s']
        self.builder.clear()
        self.freshness = self._new_freshness()
        self.inputs.watch(self.freshness)
        if not wait(lambda: not self.problems(), timeout_s):
            raise ValueError(
                f'inputs are not fresh after {timeout_s:g} s: ' + '; '.join(self.problems())
            )
        if self.needs_controller and not wait(self.controller_listens, timeout_s):
            raise ValueError(self.no_controller())
        self.control = ControlThread(
            self.tick, self.contract.controller.rate_hz, self.values['control_priority']
        )
        self._hold_the_core(1)
        self.control.start()

    def _hold_the_core(self, priority: int) -> None:
        """Keep the threads that hold the interpreter from losing their core while they hold it.

        Else a busy machine keeps the control thread waiting for them, whatever its own priority.
        Only beside a control thread that asks too, and for threads that compute no chunk.
        """
        if not self.values['control_priority']:
            return
        set_thread_realtime(priority)
        if self.values['policy_process']:
            assert self.exchange is not None and self.shadowing is not None, 'serving'
            for thread in (self.thread, self.exchange.beside.thread, self.shadowing.beside.thread):
                thread.submit(lambda: set_thread_realtime(priority))

    def enable(self) -> None:
        """Start moving from the measured pose. Raises ValueError with a sentence."""
        self.refuse_stuck()
        if self.control is None or self.inference is None or self.exchange is None:
            raise ValueError('the node is not active; activate it first')
        if self.exchange.swap.held:
            raise ValueError(
                'no policy is loaded: '
                + (f'{self.exchange.swap.wish} is on its way' if self.exchange.swap.target
                   else 'set precision again, or clean up and configure')
            )
        if self.needs_controller and not self.controller_listens():
            raise ValueError(self.no_controller())
        self.inputs.listen()  # what waits behind this very call must not look late
        problems = self.problems()
        if problems:
            raise ValueError('cannot start: ' + '; '.join(problems))
        self.inference.cancel()
        self.player.clear()
        self._virtual = self._measured()
        self.guard.start(self._measured())
        self.commands.clear()
        self.inference.new_episode()

    def problems(self) -> list[str]:
        """Say what keeps the inputs from being fresh, one sentence each."""
        missing = [f'nothing from {name}' for name in self.builder.missing()]
        # Only faults of inputs that have come: a missing one is told with its topic above.
        faults = [
            fault.sentence
            for fault in self.freshness.check(moving=False)
            if not (missing and fault.kind == 'silent')
        ]
        return missing + faults

    def refuse_stuck(self) -> None:
        """Raise ValueError when the inference hangs: foreign code cannot be interrupted."""
        sentence = self.overdue()
        if sentence:
            raise ValueError(
                f'{sentence}, so nothing can start; if it does not come back, clean up and '
                'configure again'
            )

    @property
    def needs_controller(self) -> bool:
        """Whether somebody must subscribe to the command topic."""
        return bool(self.values['require_controller']) and not self.dry_run

    def controller_listens(self) -> bool:
        """Tell whether somebody subscribes to the command topic."""
        return self.commands.listeners() > 0

    def no_controller(self) -> str:
        """Say that nobody does."""
        topic = self.commands.publisher.topic_name
        return (
            f'no controller subscribes to {topic!r}; start the controller, correct '
            'controller.topic in the contract, or set require_controller to false'
        )

    # the control thread --------------------------------------------------------------------

    def tick(self) -> None:
        """Serve one control period; never waits."""
        inference, guard = self.inference, self.guard
        assert inference is not None  # begin comes after load_policy
        faults = self.faults = self.freshness.check(moving=self._moving)
        hung = inference.overdue(self.clock.steady_ns())
        if hung:
            guard.stop('inference_timeout', hung)
        now_ns = self.clock.now_ns()
        sample = self.player.sample(now_ns)
        running_s = inference.running_s(self.clock.steady_ns())
        if sample is not None and sample.exhausted and running_s:
            guard.stop(
                'exhausted', f'the plan ran out while the inference had run for {running_s:.2f} s'
            )
        setpoint = guard.tick(sample, self._measured(), faults)
        self._moving = setpoint is not None and (
            float(np.abs(setpoint.velocities).max()) > MOVING_SPEED
        )
        if setpoint is not None:
            self._send(setpoint)
        if guard.state is State.RUNNING:
            inference.poke(now_ns)

    def _picture_came(self) -> None:
        """Let what is soon due begin with it now, in the executor, and not at the next tick."""
        if self.inference is not None and self.guard.state is State.RUNNING:
            self.inference.poke(self.clock.now_ns())

    def _send(self, setpoint: Setpoint) -> None:
        if self.dry_run:
            self._virtual = setpoint.positions
        else:
            self.send(setpoint.positions, setpoint.velocities)

    def _measured(self) -> np.ndarray | None:
        """Return (joints,) measured positions in the order of action.joints.

        In a dry run no robot follows: the commands are measured against themselves.
        """
        if self.dry_run and self._virtual is not None and not self.guard.at_rest:
            return self._virtual
        latest = self.builder.joint_positions()
        return None if latest is None else latest[0][self._columns]

    # the way out ---------------------------------------------------------------------------

    def halt(self) -> None:
        """Bring the arm to rest within its limits, then stop ticking."""
        COLLECTOR.unfreeze()
        if self.exchange is not None:
            self.exchange.stay()
        if self.control is None:
            return
        self.guard.stop('deactivated', 'the node was deactivated')
        end = time.monotonic() + REST_TIMEOUT_S
        while not self.guard.at_rest and self.control.error is None and time.monotonic() < end:
            self.inputs.listen()
            time.sleep(0.002)
        self.control.stop()
        self.control = None
        self._hold_the_core(0)
        if self.inference is not None:
            self.inference.cancel()

    def end(self) -> bool:
        """Give everything back; False when the inference thread hangs and was left behind."""
        self.halt()
        if self._maker is not None:
            self._maker.close()  # first: whoever waits for a policy's process comes back
        ended = True
        while self._undo:
            ended = self._undo.pop()() is not False and ended
        self.inference = self.exchange = self.shadowing = None
        gc.collect()
        return ended

    def overdue(self) -> str | None:
        """Say that the inference hangs, or None."""
        return None if self.inference is None else self.inference.overdue(self.clock.steady_ns())

    def _new_freshness(self) -> Freshness:
        jump_s = 0.0 if self.simulated_time else self.values['freshness.clock_jump_s']
        bounds = settings.input_bounds(self.values, self.contract)
        return Freshness(bounds, self.clock, clock_jump_s=jump_s)
