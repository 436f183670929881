# SPDX-License-Identifier: Apache-2.0
"""What is true of a serving node now, as one JSON-ready mapping. Reads, decides nothing."""

from __future__ import annotations

from typing import Any

from quantvla_ros.control.types import StopCause
from quantvla_ros.nodes.diagnostics import milliseconds
from quantvla_ros.nodes.serving import Serving


def snapshot(serving: Serving | None, lifecycle: str, estop: str) -> dict[str, Any]:
    """Return the mapping behind ~/status and /diagnostics; keys are the same in every state.

    estop: an e-stop pressed while nothing was configured, '' for none.
    """
    if serving is None:
        return {
            'lifecycle': lifecycle, 'state': 'inactive', 'cause': None, 'estop': estop,
            'policy': '', 'precision': '', 'calibration': '', 'instruction': '',
            'dry_run': False, 'rivals': 0, 'overdue': None, 'inference': {}, 'tick': {},
            'commands': {}, 'swap': {}, 'gate': '', 'shadow': {}, 'drift': {},
        }
    guard, values, exchange = serving.guard, serving.values, serving.exchange
    latch = guard.latch
    assert exchange is not None and serving.shadowing is not None, 'only what serves is shown'
    assert serving.inference is not None
    running = exchange.swap.running
    return {
        'lifecycle': lifecycle,
        'state': guard.state.value,
        'cause': _cause(guard.cause),
        'estop': latch.sentence if latch is not None else '',
        'policy': values['policy'] or serving.contract.policy,
        'precision': running.precision,
        'calibration': running.calibration,
        'instruction': serving.builder.instruction,
        'dry_run': serving.dry_run,
        'rivals': serving.commands.rivals(),
        'overdue': serving.overdue(),
        'inference': _inference(serving),
        'tick': _tick(serving),
        'commands': {**guard.counts, 'rate_hz': serving.contract.controller.rate_hz},
        'swap': exchange.status(),
        'gate': exchange.doubt,
        'shadow': serving.shadowing.status(),
        'drift': serving.inference.handover.drift.status(),
    }


def _cause(cause: StopCause | None) -> dict[str, Any] | None:
    if cause is None:
        return None
    return {'kind': cause.kind, 'sentence': cause.sentence, 'stamp_ns': cause.stamp_ns}


def _inference(serving: Serving) -> dict[str, Any]:
    inference = serving.inference
    if inference is None:
        return {'count': 0, 'p95_ms': 0.0, 'budget_ms': 0.0}
    figures = inference.latency.figures()
    settings = inference.settings
    return {
        'count': figures.count,
        **milliseconds(figures),
        'budget_ms': round(settings.execute * settings.step_dt_s * 1e3, 1),
        'overruns': figures.overruns,
        'chunks': inference.chunks,
        'refused': inference.refused,
        'input_spread_ms': round(inference.spread_s * 1e3, 3),
    }


def _tick(serving: Serving) -> dict[str, Any]:
    control = serving.control
    if control is None:
        return {}
    late = {f'late_{key}': value for key, value in milliseconds(control.lateness()).items()}
    return {'ticks': control.ticks, 'missed': control.missed, 'realtime': control.realtime, **late}
