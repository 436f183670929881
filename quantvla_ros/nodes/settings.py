# SPDX-License-Identifier: Apache-2.0
"""Parameter values -> the settings of the control core. Free functions; each names its group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from quantvla_ros.contract import Contract
from quantvla_ros.control.freshness import InputBounds
from quantvla_ros.control.guard import GuardSettings
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.control.player import PlayerSettings
from quantvla_ros.nodes.drift import DriftSettings
from quantvla_ros.nodes.inference import InferenceSettings
from quantvla_ros.nodes.inputs import JOINTS, camera_key, vector_key
from quantvla_ros.policies.base import PolicySettings

Values = Mapping[str, Any]


def _group(kind: Any, prefix: str, values: Values) -> dict[str, Any]:
    """Return the values of a group for every field of a settings class."""
    return {item.name: values[f'{prefix}{item.name}'] for item in fields(kind)}


def guard_settings(values: Values) -> GuardSettings:
    """Return guard.*."""
    return GuardSettings(**_group(GuardSettings, 'guard.', values))


def player_settings(values: Values) -> PlayerSettings:
    """Return player.*."""
    return PlayerSettings(**_group(PlayerSettings, 'player.', values))


def policy_settings(values: Values) -> PolicySettings:
    """Return what a policy is made with."""
    return PolicySettings(**_group(PolicySettings, '', values))


def drift_settings(values: Values) -> DriftSettings:
    """Return drift.*."""
    return DriftSettings(**_group(DriftSettings, 'drift.', values))


def gate_limits(values: Values) -> dict[str, Any]:
    """Return gate.* by the names of quant.gate.GateLimits, which imports torch."""
    return {name: values[f'gate.{name}'] for name in ('mean_ratio', 'worst_ratio',
                                                      'needs_evidence')}


def inference_settings(values: Values, contract: Contract) -> InferenceSettings:
    """Return inference.* together with what the contract says of chunks."""
    return InferenceSettings(
        execute=contract.action.execute,
        step_dt_s=contract.action.step_dt_s,
        timeout_s=values['inference.timeout_s'],
        margin_s=values['inference.margin_s'],
        seed=values['seed'],
        prefix=values['player.seam'] == 'prefix',
    )


def input_bounds(values: Values, contract: Contract) -> dict[str, InputBounds]:
    """Return the bounds of every input: a parameter that is not 0 overrides the contract."""
    camera_age = values['freshness.camera_max_age_s']
    camera_silence = values['freshness.camera_max_silence_s']
    bounds = {
        camera_key(camera.name): InputBounds(
            camera_age or camera.max_age_s,
            camera_silence or camera.max_silence_s,
            values['freshness.frozen_s'],
        )
        for camera in contract.cameras
    }
    bounds[JOINTS] = InputBounds(
        values['freshness.joints_max_age_s'] or contract.joints.max_age_s,
        values['freshness.joints_max_silence_s'] or contract.joints.max_silence_s,
    )
    for vector in contract.vectors:
        bounds[vector_key(vector.name)] = InputBounds(vector.max_age_s, vector.max_silence_s)
    return bounds


def joint_limiter(values: Values, contract: Contract, description: str) -> JointLimiter:
    """Return the limits of every commanded joint; raises ValueError for what is missing."""
    gripper = contract.gripper
    limiter = JointLimiter.from_description(
        contract.action.joints,
        description,
        contract.limits,
        lead_rad=values['limits.lead_rad'],
        lead_m=values['limits.lead_m'],
        snap_joints=() if gripper.kind == 'none' else (gripper.joint,),
        allow_unlimited=values['limits.allow_unlimited'],
    )
    limiter.speed_scale = values['limits.speed_scale']
    return limiter
