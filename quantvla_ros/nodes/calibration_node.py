# SPDX-License-Identifier: Apache-2.0
"""Calibrate a precision from the robot's own bag, as a service. Wires only.

`~/calibrate` answers at once; the work is a process of its own (calibrating.py), so that no
callback waits and a policy node beside it keeps its timing. Refuses beside a moving arm, and
stops when one begins to move, unless told otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import SetParametersResult
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger

from quantvla_ros.nodes.calibrating import CALIBRATION_NODE, Calibrating, CalibratingError
from quantvla_ros.nodes.diagnostics import status
from quantvla_ros.nodes.lifecycle import ManagedNode, run
from quantvla_ros.nodes.names import DIAGNOSTICS, LATCHED
from quantvla_ros.nodes.parameters import check, declare, read

CALIBRATE = '~/calibrate'  # std_srvs/srv/Trigger
CANCEL = '~/cancel'  # std_srvs/srv/Trigger
PROGRESS = '~/progress'  # std_msgs/msg/String, JSON, latched
POLL_S = 0.1
IDLE = {'state': 'idle', 'stage': '', 'share': 0.0, 'left_s': None, 'bag': '', 'precision': '',
        'sentence': '', 'result': None}
LEVELS = {'failed': DiagnosticStatus.ERROR, 'cancelled': DiagnosticStatus.WARN}


class CalibrationNode(ManagedNode):
    """Runs one calibration at a time while active."""

    def __init__(self, **options: Any) -> None:
        super().__init__('calibration_node', **options)
        declare(self, CALIBRATION_NODE)
        self._active = False
        self._arm_moves = False
        self._work: Calibrating | None = None
        self._told: dict[str, Any] = {}
        self._progress = self.create_publisher(String, PROGRESS, LATCHED)
        self._diagnostics = self.create_publisher(DiagnosticArray, DIAGNOSTICS, 1)
        self._arm = self.create_subscription(
            Bool, f'{self.get_parameter("policy_node").value}/is_active', self._on_arm, LATCHED)
        self.create_service(Trigger, CALIBRATE, self._on_calibrate)
        self.create_service(Trigger, CANCEL, self._on_cancel)
        self.create_timer(POLL_S, self._poll, clock=self.steady_clock)
        self.create_timer(1.0, self._diagnose, clock=self.steady_clock)
        self.add_on_set_parameters_callback(self._on_parameters)
        self._tell()
        if self.get_parameter('autostart').value:
            self.start_by_itself()

    # lifecycle -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Allow calibrations."""
        self._active = True

    def halt(self) -> None:
        """End a calibration that runs."""
        self._active = False
        if self._work is not None and self._work.running:
            self._work.finish()
            self._ended(self._work)

    def _on_parameters(self, parameters: Sequence[Any]) -> SetParametersResult:
        values = {parameter.name: parameter.value for parameter in parameters}
        problems = check(values, CALIBRATION_NODE)
        return SetParametersResult(successful=not problems, reason='; '.join(problems))

    # services ------------------------------------------------------------------------------

    def start(self) -> str:
        """Start a calibration with the present parameters. Raises CalibratingError."""
        if not self._active:
            raise CalibratingError('the node is not active; configure and activate it first')
        if self._work is not None and self._work.running:
            raise CalibratingError(f'calibrating already, from {self._work.bag}')
        values = read(self, CALIBRATION_NODE)
        if self._arm_active() and not values['beside_active']:
            raise CalibratingError(
                f'the arm moves ({self._arm.topic_name}); stop it, or set beside_active')
        self._work = Calibrating(values)
        self._tell()
        self.get_logger().info(f'calibrating {values["precision"]} from {values["bag"]}')
        return f'calibrating {values["precision"]} from {values["bag"]}; see {PROGRESS}'

    def _on_calibrate(self, _: Any, reply: Any) -> Any:
        try:
            reply.message, reply.success = self.start(), True
        except CalibratingError as error:
            reply.message, reply.success = str(error), False
            self.get_logger().error(str(error))
        return reply

    def _on_cancel(self, _: Any, reply: Any) -> Any:
        work = self._work
        reply.success = work is not None and work.running
        if work is not None and work.running:
            work.cancel('asked to')
        reply.message = 'cancelling' if reply.success else 'nothing is being calibrated'
        return reply

    # the arm -------------------------------------------------------------------------------

    def _on_arm(self, message: Bool) -> None:
        self._arm_moves = bool(message.data)
        work = self._work
        if (self._arm_moves and work is not None and work.running
                and not self.get_parameter('beside_active').value):
            work.cancel('the arm began to move')

    def _arm_active(self) -> bool:
        """Whether a policy node says that commands flow; one that is gone says nothing."""
        return self._arm_moves and self.count_publishers(self._arm.topic_name) > 0

    # telling -------------------------------------------------------------------------------

    def _poll(self) -> None:
        if self._work is not None and self._work.poll():
            self._ended(self._work)
        self._tell()

    def _ended(self, work: Calibrating) -> None:
        told = work.report()
        log = self.get_logger()
        {'done': log.info, 'cancelled': log.warning}.get(told['state'], log.error)(
            f'calibration {told["state"]}: {told["sentence"]}')
        self._tell()

    def _report(self) -> dict[str, Any]:
        return IDLE if self._work is None else self._work.report()

    def _tell(self) -> None:
        """Publish the progress when it has changed."""
        told = self._report()
        if told != self._told:
            self._told = told
            self._progress.publish(String(data=json.dumps(told)))

    def _diagnose(self) -> None:
        told = self._report()
        text = told['sentence'] or told['stage'] or 'idle'
        if told['state'] == 'running':
            text = f'{100 * told["share"]:.0f} %: {told["stage"]}'
        values = {key: json.dumps(value) for key, value in told.items() if key != 'result'}
        level = LEVELS.get(told['state'], DiagnosticStatus.OK)
        message = DiagnosticArray(
            status=[status(level, f'{self.get_name()}: calibration', text, values)])
        message.header.stamp = self.get_clock().now().to_msg()
        self._diagnostics.publish(message)


def main(argv: list[str] | None = None) -> int:
    """Run the node until SIGINT or SIGTERM."""
    return run(CalibrationNode, argv)


if __name__ == '__main__':
    raise SystemExit(main())
