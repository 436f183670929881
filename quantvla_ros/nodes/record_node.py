# SPDX-License-Identifier: Apache-2.0
"""Record the topics of a contract into a rosbag2 mcap directory. Wires only.

Each topic is subscribed with the QoS its publishers offer, as serialized bytes that nobody
decodes. The queue, the disk and the bag belong to recording.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import SetParametersResult
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.lifecycle import ManagedNode, run
from quantvla_ros.nodes.names import DIAGNOSTICS, LATCHED, STATUS
from quantvla_ros.nodes.parameters import check, declare, read
from quantvla_ros.nodes.recording import (
    MB,
    RECORD_NODE,
    Limits,
    Recording,
    RecordingError,
    Topic,
    new_bag,
    recorded_topics,
)
from quantvla_ros.nodes.typed import message_class

RECORD = '~/record'  # std_srvs/srv/SetBool
START, STOP = '~/start', '~/stop'  # std_srvs/srv/Trigger, the same two
SEARCH_S = 0.2  # how often topics without a publisher are looked for
DEPTH = 50


class RecordNode(ManagedNode):
    """Listens while configured, records while active and told so."""

    def __init__(self, **options: Any) -> None:
        super().__init__('record_node', **options)
        declare(self, RECORD_NODE)
        self._loaded = False
        self._types: dict[str, str] = {}  # topic -> type, all that the contract names
        self._topics: dict[str, Topic] = {}  # those with a publisher, subscribed
        self._latched: dict[str, bytes] = {}  # their last message, the first of every recording
        self._active = False
        self._recording: Recording | None = None
        self._told = ''
        self._subscriptions_made: list[Any] = []
        self._status = self.create_publisher(String, STATUS, LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, DIAGNOSTICS, 1)
        self.create_service(SetBool, RECORD, self._on_record)
        self.create_service(Trigger, START, lambda _, reply: self._reply(True, reply))
        self.create_service(Trigger, STOP, lambda _, reply: self._reply(False, reply))
        self.create_timer(SEARCH_S, self._search, clock=self.steady_clock)
        self.create_timer(1.0, self._report, clock=self.steady_clock)
        self.add_on_set_parameters_callback(self._on_parameters)
        if self.get_parameter('autostart').value:
            self.start_by_itself()

    # lifecycle -----------------------------------------------------------------------------

    def load(self) -> None:
        """Read the contract and listen to its topics."""
        contract = load_contract(self.get_parameter('contract').value)
        self._types = {
            self.resolve_topic_name(name): kind for name, kind in recorded_topics(contract).items()
        }
        self._loaded = True
        self._search()

    def begin(self) -> None:
        """Allow recording, and start it where the parameter says so."""
        self._active = True
        if self.get_parameter('record_on_activate').value:
            self.start()

    def halt(self) -> None:
        """Close the bag."""
        self._active = False
        if self._recording is not None:
            self.stop_recording()

    def unload(self) -> None:
        """Stop listening."""
        for subscription in self._subscriptions_made:
            self.destroy_subscription(subscription)
        self._subscriptions_made, self._types, self._topics = [], {}, {}
        self._latched = {}
        self._loaded = False

    def _on_parameters(self, parameters: Sequence[Any]) -> SetParametersResult:
        values = {parameter.name: parameter.value for parameter in parameters}
        problems = check(values, RECORD_NODE, loaded=self._loaded)
        return SetParametersResult(successful=not problems, reason='; '.join(problems))

    # recording -----------------------------------------------------------------------------

    def start(self) -> str:
        """Start a recording and return its bag. Raises RecordingError with the way out."""
        if not self._active:
            raise RecordingError('the node is not active; configure and activate it first')
        if self._recording is not None and self._recording.running:
            raise RecordingError(f'recording already, to {self._recording.report.bag}')
        values = read(self, RECORD_NODE)
        limits = Limits(values['queue_mb'] * MB, values['min_free_mb'] * MB)
        topics = {name: self._topics.get(name, Topic(kind)) for name, kind in self._types.items()}
        self._recording = Recording(new_bag(values['bag']), topics, limits)
        self._told = ''
        for name, data in self._latched.items():
            self._recording.offer(name, self._now(), data)
        self.get_logger().info(f'recording to {self._recording.report.bag}')
        return self._recording.report.bag

    def stop_recording(self) -> str:
        """Close the bag and return what was recorded, as a sentence."""
        if self._recording is None:
            raise RecordingError('nothing is being recorded')
        report = self._recording.stop()
        self._recording = None
        dropped = sum(report.dropped.values())
        text = (f'{sum(report.messages.values())} messages, {report.bytes // MB} MB, '
                f'{dropped} dropped, in {report.bag}')
        if report.cause:
            text += f'; ended early: {report.cause}'
        self.get_logger().info(text)
        return text

    def _now(self) -> int:
        return self.get_clock().now().nanoseconds

    def _search(self) -> None:
        """Subscribe to topics that have found a publisher, with the QoS it offers."""
        for name, kind in self._types.items():
            if name in self._topics:
                continue
            offers = [info.qos_profile for info in self.get_publishers_info_by_topic(name)
                      if info.topic_type == kind]
            if not offers:
                continue
            reliable = all(o.reliability == ReliabilityPolicy.RELIABLE for o in offers)
            latched = all(o.durability == DurabilityPolicy.TRANSIENT_LOCAL for o in offers)
            self._topics[name] = Topic(kind, reliable, latched)
            profile = QoSProfile(
                depth=DEPTH,
                reliability=(ReliabilityPolicy.RELIABLE if reliable
                             else ReliabilityPolicy.BEST_EFFORT),
                durability=(DurabilityPolicy.TRANSIENT_LOCAL if latched
                            else DurabilityPolicy.VOLATILE),
            )
            self._subscriptions_made.append(self.create_subscription(
                message_class(kind), name, self._taker(name, latched), profile, raw=True))

    def _taker(self, name: str, latched: bool) -> Any:
        def take(data: bytes) -> None:
            if latched:
                self._latched[name] = data
            if self._recording is not None:
                self._recording.offer(name, self._now(), data)
        return take

    def _on_record(self, request: Any, reply: Any) -> Any:
        return self._reply(request.data, reply)

    def _reply(self, start: bool, reply: Any) -> Any:
        try:
            reply.message = self.start() if start else self.stop_recording()
            reply.success = True
        except RecordingError as error:
            reply.message, reply.success = str(error), False
            self.get_logger().error(str(error))
        self._report()
        return reply

    def _report(self) -> None:
        """Publish status and diagnostics; log the end of a recording once."""
        recording = self._recording
        report = recording.report if recording else None
        state: dict[str, Any] = {
            'recording': bool(recording and recording.running),
            'bag': report.bag if report else '',
            'messages': sum(report.messages.values()) if report else 0,
            'bytes': report.bytes if report else 0,
            'dropped': dict(report.dropped) if report else {},
            'cause': report.cause if report else '',
            'without_publisher': sorted(set(self._types) - set(self._topics)),
        }
        if state['cause'] and state['cause'] != self._told:
            self._told = state['cause']
            self.get_logger().error(f'recording ended early: {state["cause"]}')
        self._status.publish(String(data=json.dumps(state)))
        self._diagnostics.publish(self._diagnostic(state))

    def _diagnostic(self, state: dict[str, Any]) -> DiagnosticArray:
        level, text = DiagnosticStatus.OK, 'recording' if state['recording'] else 'idle'
        if state['dropped']:
            level, text = DiagnosticStatus.WARN, 'messages dropped: the disk is too slow'
        if state['cause']:
            level, text = DiagnosticStatus.ERROR, state['cause']
        values = [KeyValue(key=key, value=json.dumps(value)) for key, value in state.items()]
        status = DiagnosticStatus(level=level, name=f'{self.get_name()}: bag', message=text,
                                  hardware_id='', values=values)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self.get_clock().now().to_msg()
        return message


def main(argv: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM."""
    return run(RecordNode, argv)


if __name__ == '__main__':
    raise SystemExit(main())
