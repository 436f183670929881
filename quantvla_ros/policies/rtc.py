# SPDX-License-Identifier: Apache-2.0
"""Real-time chunking: pull a new chunk towards what is still being executed.

Weights of the published schedules, and the prefix of a running chunk resampled at the steps of
the new one. The correction itself is flow.denoise's: closed form, no gradient, so that it serves
every kernel. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.contract import Action
from quantvla_ros.policies.flow import PrefixGuidance

SCHEDULES = ('zeros', 'ones', 'linear', 'exp')
EXECUTION_HORIZON = 10
STRONGEST = 10.0


def schedule_weights(schedule: str, frozen: int, overlap: int, steps: int) -> np.ndarray:
    """Weights (steps,) of the published schedules: 1 while frozen, 0 behind the overlap.

    Between them: zeros 0, ones 1, linear 1 - i / (n + 1), exp w (e^w - 1) / (e - 1) of the linear
    w. frozen: steps that run before the new chunk arrives.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule {schedule!r} is unknown; known are {", ".join(SCHEDULES)}')
    overlap = min(overlap, steps)
    frozen = min(frozen, overlap)
    weights = np.zeros(steps)
    weights[:frozen] = 1.0
    between = np.linspace(1.0, 0.0, overlap - frozen + 2)[1:-1]
    fall = {
        'zeros': 0.0 * between,
        'ones': 0.0 * between + 1.0,
        'linear': between,
        'exp': between * np.expm1(between) / np.expm1(1.0),
    }
    weights[frozen:overlap] = fall[schedule]
    return weights


def prefix_guidance(
    prefix: ActionChunk,
    stamp_ns: int,
    action: Action,
    steps: int,
    to_model: Callable[[np.ndarray], np.ndarray],
    *,
    schedule: str = 'linear',
    device: str = 'cpu',
) -> PrefixGuidance | None:
    """Resample a prefix at the steps of a chunk that starts at stamp_ns; None without overlap.

    steps: horizon of the model, which may exceed the contract's. to_model: absolute targets
    (steps, joints) of action.joints -> the model's normalised actions (steps, width). The first
    half of the covered steps counts as executed by the time the new chunk arrives.
    """
    if prefix.joint_names != action.joints:
        raise ValueError(
            f'the prefix moves {", ".join(prefix.joint_names)}; '
            f'expected {", ".join(action.joints)}'
        )
    at_s = np.arange(steps) * action.step_dt_s
    known_s = (prefix.stamp_ns - stamp_ns) / NS_PER_S + (
        np.arange(prefix.horizon) * prefix.step_dt_s
    )
    overlap = int(np.sum(at_s <= known_s[-1] + 1e-9))
    if overlap == 0:
        return None
    target = np.stack([np.interp(at_s, known_s, column) for column in prefix.positions.T], 1)
    weights = schedule_weights(schedule, (overlap + 1) // 2, overlap, steps)
    return PrefixGuidance(
        torch.from_numpy(to_model(target).astype(np.float32))[None].to(device),
        torch.from_numpy(weights.astype(np.float32)).to(device),
        STRONGEST,
    )
