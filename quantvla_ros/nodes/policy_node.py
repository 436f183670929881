# SPDX-License-Identifier: Apache-2.0
"""The node that serves a policy: parameters, transitions, services and what it says of itself.

Wires only: serving.py puts the parts together, the control core decides. Commands leave from the
control thread; everything in this file runs on the executor's thread and never waits for
inference, except inside configure and activate, which hear the inputs while they wait.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from std_msgs.msg import Bool, String
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import load_contract
from quantvla_ros.control.difference import Difference
from quantvla_ros.control.types import State
from quantvla_ros.nodes import diagnostics, names, parameters
from quantvla_ros.nodes.commands import make_chunk
from quantvla_ros.nodes.controller_check import ask_controller, check_controller
from quantvla_ros.nodes.inputs import JOINTS, camera_key, vector_key
from quantvla_ros.nodes.lifecycle import ManagedNode, run
from quantvla_ros.nodes.live import LiveParameters
from quantvla_ros.nodes.origin import Origin
from quantvla_ros.nodes.serving import Serving
from quantvla_ros.nodes.snapshot import snapshot
from quantvla_ros.nodes.swap import Outcome

WATCH_PERIOD_S = 0.05
REPORT_PERIOD_S = 1.0


class PolicyNode(ManagedNode):
    """Serves one policy on one robot, as its contract says."""

    def __init__(self, name: str = names.POLICY_NODE, **options: Any) -> None:
        super().__init__(name, **options)
        parameters.declare(self)
        self.serving: Serving | None = None
        self._live = LiveParameters(self, self._ready)
        self._estop_sentence = ''  # pressed while nothing was configured
        self._description = ''
        self._chunks = self.create_publisher(JointTrajectory, names.CHUNK, 1)
        self._shadow = self.create_publisher(JointTrajectory, names.SHADOW, 1)
        self._origins = self.create_publisher(String, names.CHUNK_ORIGIN, 10)
        self._status = self.create_publisher(String, names.STATUS, names.LATCHED)
        self._is_active = self.create_publisher(Bool, names.IS_ACTIVE, names.LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, names.DIAGNOSTICS, 1)
        self.create_service(SetBool, names.ENABLE, self._on_enable)
        self.create_service(Trigger, names.ESTOP, self._on_estop)
        self.create_service(Trigger, names.RESET, self._on_reset)
        self._listener = self.create_subscription(
            String, names.ROBOT_DESCRIPTION, self._on_description, names.LATCHED
        )
        self._edge: tuple[Any, ...] = ()
        self._levels: tuple[bytes, ...] = ()
        self._report_at = 0.0
        self.create_timer(WATCH_PERIOD_S, self._watch, clock=self.steady_clock)
        if self.get_parameter('autostart').value:
            self.start_by_itself()

    # transitions ---------------------------------------------------------------------------

    def load(self) -> None:
        """Read parameters and limits, load the policy and warm it up."""
        values = parameters.read(self)
        contract = load_contract(values['contract'])
        if not self.wait_until(
            lambda: bool(self._description), values['limits.description_timeout_s']
        ):
            raise ValueError(
                f'no robot description on {self._listener.topic_name!r} within '
                f'{values["limits.description_timeout_s"]:g} s; start robot_state_publisher or '
                'remap the topic'
            )
        serving = self.serving = Serving(self, contract, values, self._description)
        serving.connect(self)
        serving.load_policy(self.wait_until)
        assert serving.inference is not None  # load_policy made it
        assert serving.exchange is not None and serving.shadowing is not None
        serving.inference.on_chunk = self._on_chunk
        warn = functools.partial(self.get_logger().warning, throttle_duration_sec=1.0)
        serving.inference.on_trouble = serving.exchange.on_trouble = warn
        serving.shadowing.on_trouble, serving.shadowing.told = warn, self._on_shadow
        serving.inputs.on_instruction = self._on_instruction
        if self._estop_sentence:
            serving.guard.estop(self._estop_sentence)

    def begin(self) -> None:
        """Wait for fresh inputs; start from the measured pose, or wait for ~/enable."""
        serving = self._configured()
        self._check_controller(serving)
        serving.begin(self.wait_until)
        if serving.values['enable_on_activate']:
            serving.enable()

    def _check_controller(self, serving: Serving) -> None:
        """Refuse a controller of other joints, where it can be asked."""
        topic = serving.contract.controller.topic
        found = ask_controller(self, topic, self.wait_until)
        for warning in check_controller(serving.contract, found or {}):
            self.get_logger().warning(warning)

    def halt(self) -> None:
        """Bring the arm to rest."""
        if self.serving is not None:
            self.serving.halt()
            self._watch()

    def unload(self) -> None:
        """Give everything back."""
        serving, self.serving = self.serving, None
        if serving is not None and not serving.end():
            self.get_logger().error(
                'the policy does not come back; its thread is left behind and its memory stays in '
                'use until this process ends'
            )

    def listen(self) -> None:
        """Hear the robot description and the inputs within a transition."""
        with self._listener.handle:
            taken = self._listener.handle.take_message(String, False)
        if taken is not None:
            self._on_description(taken[0])
        if self.serving is not None:
            self.serving.listen()
        self._watch()

    # callbacks -----------------------------------------------------------------------------

    def _on_description(self, message: Any) -> None:
        if message.data == self._description:
            return
        self._description = message.data
        if self.serving is not None:
            self.get_logger().warning(
                'the robot description changed; limits stay as they were until the next configure'
            )

    def _on_instruction(self, text: str) -> None:
        self.get_logger().info(f'instruction: {text!r}')

    def _on_chunk(self, chunk: ActionChunk, origin: Origin) -> None:
        """Show a chunk that was taken over; runs in the inference thread."""
        self._chunks.publish(make_chunk(chunk))
        self._origins.publish(String(data=origin.text()))

    def _on_shadow(self, found: Difference, stamp_ns: int) -> None:
        """Show how far the shadow's chunk is from the one that commands; inference thread."""
        serving = self.serving
        if serving is not None:
            step_s = serving.contract.action.step_dt_s
            self._shadow.publish(
                make_chunk(ActionChunk(found.joint_names, found.steps, stamp_ns, step_s)))

    def _on_enable(self, request: Any, response: Any) -> Any:
        if request.data:
            return self._answer(response, 'moving', lambda: self._configured().enable())
        return self._answer(response, 'stopping', self._disable)

    def _disable(self) -> None:
        serving = self._configured()
        if serving.exchange is not None:
            serving.exchange.stay()
        serving.guard.stop('disabled', 'stopped by ~/enable')

    def _on_estop(self, request: Any, response: Any) -> Any:
        self._estop_sentence = 'pressed by ~/estop'
        if self.serving is not None:
            self.serving.guard.estop(self._estop_sentence)
            if self.serving.exchange is not None:
                self.serving.exchange.stay()
        return self._answer(response, 'e-stop is latched; ~/reset releases it', lambda: None)

    def _on_reset(self, request: Any, response: Any) -> Any:
        return self._answer(response, 'released; ~/enable starts again', self._reset)

    def _reset(self) -> None:
        if self.serving is not None:
            self.serving.guard.reset()
        self._estop_sentence = ''

    def _answer(self, response: Any, sentence: str, act: Callable[[], Any]) -> Any:
        """Act; answer with a sentence, also when it was refused."""
        response.success, response.message = True, sentence
        try:
            act()
        except ValueError as error:
            response.success, response.message = False, str(error)
            self.get_logger().warning(str(error))
        self._watch()
        return response

    def _configured(self) -> Serving:
        if self.serving is None:
            raise ValueError('the node is not configured; configure it first')
        return self.serving

    # watching ------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Stop what only the graph can tell, and publish what changed; at 20 Hz and on calls."""
        serving = self._ready()
        if serving is not None:
            self._watch_graph(serving)
            self._watch_swap(serving)
        now = time.monotonic()
        edge = self._present_edge()
        if edge == self._edge and now < self._report_at:
            return
        changed, self._edge = edge != self._edge, edge
        if changed or now >= self._report_at:
            self._report(changed=changed, periodic=now >= self._report_at)
        if now >= self._report_at:
            self._report_at = now + REPORT_PERIOD_S

    def _ready(self) -> Serving | None:
        """Return what serves the policy once it is loaded; half of it has nothing to tell."""
        serving = self.serving
        return serving if serving is not None and serving.inference is not None else None

    def _watch_graph(self, serving: Serving) -> None:
        control = serving.control
        if control is not None and control.error is not None:
            self.get_logger().fatal(f'the control thread met a bug:\n{control.error}')
            control.error = None
            self.trigger_deactivate()
            return
        if serving.guard.state is State.RUNNING and serving.needs_controller and (
            not serving.controller_listens()
        ):
            serving.guard.stop('controller_absent', serving.no_controller())

    def _watch_swap(self, serving: Serving) -> None:
        """Carry a swap on, and log what became of it once."""
        exchange = serving.exchange
        assert exchange is not None and serving.shadowing is not None, 'serving'
        exchange.step()
        serving.shadowing.step()
        self._live.tell(serving)
        outcome = exchange.swap.outcome
        if outcome is not None and outcome is not self._outcome:
            text = f'{outcome.wish}: {outcome.result.replace("_", " ")}'
            if outcome.sentence:
                text += f', {outcome.sentence}; {exchange.swap.running} runs'
            self.get_logger().info(text)
        self._outcome = outcome

    _outcome: Outcome | None = None

    def _present_edge(self) -> tuple[Any, ...]:
        """What ~/status must tell at once."""
        serving = self._ready()
        if serving is None:
            return (self.state_label, self._estop_sentence)
        guard, exchange = serving.guard, serving.exchange
        assert exchange is not None and serving.shadowing is not None, 'serving'
        swap, shadowing = exchange.swap, serving.shadowing
        return (
            self.state_label, guard.state, guard.cause, guard.latch, serving.builder.instruction,
            swap.running, swap.wish, swap.stage, swap.outcome, exchange.doubt,
            shadowing.running, shadowing.trouble,
        )

    def _report(self, *, changed: bool, periodic: bool) -> None:
        serving = self._ready()
        active = False
        if serving is not None:
            active = serving.guard.state is State.RUNNING and not serving.dry_run
        shot = snapshot(serving, self.state_label, self._estop_sentence)
        self._status.publish(String(data=json.dumps(shot)))
        if changed:
            self._is_active.publish(Bool(data=active))
            self._log_edge(shot)
        array = diagnostics.diagnostics(
            shot, self._input_statuses(), self.get_fully_qualified_name(),
            serving.contract.robot if serving is not None else '',
        )
        if periodic or diagnostics.levels(array) != self._levels:
            self._levels = diagnostics.levels(array)
            array.header.stamp = self.get_clock().now().to_msg()
            self._diagnostics.publish(array)

    def _input_statuses(self) -> list[Any]:
        serving = self._ready()
        if serving is None:
            return []
        now_ns = time.monotonic_ns()
        ages = serving.freshness.ages_s()
        faults = {fault.input: fault.sentence for fault in serving.faults}
        contract = serving.contract
        keys = [camera_key(name) for name in contract.camera_names] + [JOINTS]
        keys += [vector_key(vector.name) for vector in contract.vectors]
        return [
            diagnostics.input_status(
                key, serving.inputs.rates[key].rate_hz(now_ns), ages[key], faults.get(key)
            )
            for key in keys
        ]

    def _log_edge(self, shot: dict[str, Any]) -> None:
        """Log a stop and a start once each."""
        cause = shot['cause']
        if shot['rivals']:
            self.get_logger().warning(
                f'{shot["rivals"]} other publisher(s) on the command topic: the controller obeys '
                'whoever spoke last', throttle_duration_sec=10.0,
            )
        if cause is not None and cause != self._logged_cause:
            self.get_logger().error(f'stopped ({cause["kind"]}): {cause["sentence"]}')
        self._logged_cause = cause

    _logged_cause: dict[str, Any] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the policy node until a signal; return 0 after a clean end."""
    return run(PolicyNode, argv)
