# SPDX-License-Identifier: Apache-2.0
"""Position, velocity and acceleration limits of the commanded joints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quantvla_ros.contract import JointLimits


class JointLimiter:
    """joint_names, lower, upper, velocity, acceleration as arrays; speed_scale 0..1 (settable)."""

    speed_scale: float

    @classmethod
    def from_description(
        cls,
        joint_names: Sequence[str],
        description: str,
        tighter: Mapping[str, JointLimits] | None = None,
        *,
        allow_unlimited: bool = False,
    ) -> JointLimiter:
        """Read the URDF text, tighten by the contract's limits, refuse what is missing."""
        raise NotImplementedError
