# SPDX-License-Identifier: Apache-2.0
"""What the node says of itself: /diagnostics and the JSON of ~/status. Reads, decides nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from quantvla_ros.control.latency import LatencyFigures

OK, WARN, ERROR, STALE = (
    DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR, DiagnosticStatus.STALE,
)


def milliseconds(figures: LatencyFigures) -> dict[str, float]:
    """Return percentiles in ms, for the JSON and the key-value pairs."""
    return {
        'p50_ms': round(figures.p50_s * 1e3, 3),
        'p95_ms': round(figures.p95_s * 1e3, 3),
        'p99_ms': round(figures.p99_s * 1e3, 3),
        'worst_ms': round(figures.worst_s * 1e3, 3),
    }


def status(level: bytes, name: str, message: str, values: Mapping[str, Any]) -> DiagnosticStatus:
    """Return one status; numbers keep four digits."""
    return DiagnosticStatus(
        level=level,
        name=name,
        message=message,
        values=[KeyValue(key=key, value=_text(value)) for key, value in values.items()],
    )


def input_status(name: str, rate_hz: float, age_s: float, fault: str | None) -> DiagnosticStatus:
    """Return the status of one input."""
    if math.isinf(age_s):
        return status(STALE, name, 'nothing has come yet', {'rate_hz': 0.0})
    level, message = (OK, 'fresh') if fault is None else (ERROR, fault)
    return status(level, name, message, {'rate_hz': rate_hz, 'age_s': age_s})


def inference_status(snapshot: Mapping[str, Any]) -> DiagnosticStatus:
    """Return the status of the inference: latencies, overruns, chunks."""
    figures = snapshot['inference']
    level, message = OK, f'p95 {figures["p95_ms"]:.1f} ms'
    if snapshot['overdue']:
        level, message = ERROR, snapshot['overdue']
    elif figures['p95_ms'] > figures['budget_ms'] and figures['count']:
        level = WARN
        message = f'p95 {figures["p95_ms"]:.1f} ms is over the {figures["budget_ms"]:.0f} ms a '
        message += 'chunk is executed for'
    return status(level, 'inference', message, figures)


def commands_status(snapshot: Mapping[str, Any]) -> DiagnosticStatus:
    """Return the status of the commands: state, cause, counts, lateness of the control tick."""
    cause = snapshot['cause']
    level, message = OK, snapshot['state']
    if snapshot['rivals']:
        level, message = WARN, f'{snapshot["rivals"]} other publisher(s) on the command topic'
    if cause is not None:
        deliberate = cause['kind'] in ('disabled', 'deactivated', 'swap')
        level, message = WARN if deliberate else ERROR, f'stopped: {cause["sentence"]}'
    if snapshot['estop']:
        level, message = ERROR, f'e-stop is latched: {snapshot["estop"]}'
    values = {**snapshot['tick'], **snapshot['commands'], 'dry_run': snapshot['dry_run']}
    return status(level, 'commands', message, values)


def policy_status(snapshot: Mapping[str, Any]) -> DiagnosticStatus:
    """Return the status of the policy: its name and the precision that runs."""
    keys = ('policy', 'precision', 'calibration', 'instruction', 'lifecycle')
    values = {key: snapshot[key] for key in keys}
    if not snapshot['policy']:
        return status(OK, 'policy', 'not configured', values)
    swap = snapshot['swap']
    last = swap['last'] or {}
    level, message = OK, f'{snapshot["policy"]} at {snapshot["precision"]}'
    if last.get('result') in ('refused', 'rolled_back'):
        level = WARN
        message += f'; {last["wish"]} was {last["result"].replace("_", " ")}: {last["sentence"]}'
    if snapshot['gate']:
        level, message = WARN, f'{message}; the gate is overridden: {snapshot["gate"]}'
    if not snapshot['precision']:
        level, message = ERROR, f'no policy is loaded; {swap["stage"]} {swap["target"]}'
    values.update(swap=swap['stage'], requested=swap['requested'])
    return status(level, 'policy', message, values)


def drift_status(snapshot: Mapping[str, Any]) -> DiagnosticStatus:
    """Return whether the activations are inside their calibrated range."""
    drift = snapshot['drift']
    level, message = OK, 'inside the calibrated range'
    if drift['warning']:
        level, message = WARN, drift['warning']
    elif not drift['ranges']:
        message = 'nothing was calibrated, so nothing is known of the range'
    return status(level, 'quantization', message, {**drift, 'shadow': snapshot['shadow']})


def diagnostics(
    snapshot: Mapping[str, Any], inputs: list[DiagnosticStatus], node: str, hardware: str
) -> DiagnosticArray:
    """Return the whole array, without its stamp."""
    statuses = [policy_status(snapshot), *inputs]
    if snapshot['policy']:
        statuses += [
            inference_status(snapshot), commands_status(snapshot), drift_status(snapshot)
        ]
    for item in statuses:
        item.name = f'{node}: {item.name}'
        item.hardware_id = hardware
    return DiagnosticArray(status=statuses)


def levels(array: DiagnosticArray) -> tuple[bytes, ...]:
    """Return every level, to tell a change."""
    return tuple(item.level for item in array.status)


def _text(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)
