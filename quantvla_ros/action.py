# SPDX-License-Identifier: Apache-2.0
"""What the policy wants: a chunk of joint targets with absolute time. No model, no messages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.observation import freeze

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class ActionChunk:
    """Absolute joint targets of one inference.

    joint_names: commanded joints, the gripper among them when it is a joint.
    positions: (horizon, joints) float64 in rad or m; row i is due at stamp_ns + i * step_dt_s.
    Raises ValueError on a wrong width, an empty horizon or a step that is not positive.
    Values may be non-finite here: refusing those is the Guard's task, which records the cause.
    """

    joint_names: tuple[str, ...]
    positions: np.ndarray
    stamp_ns: int
    step_dt_s: float

    def __post_init__(self) -> None:
        positions = np.asarray(self.positions, dtype=np.float64)
        if positions.ndim != 2 or positions.shape[0] < 1:
            raise ValueError(f'a chunk is (horizon >= 1, joints), got shape {positions.shape}')
        if positions.shape[1] != len(self.joint_names):
            raise ValueError(
                f'{len(self.joint_names)} joint names but chunk of shape {positions.shape}'
            )
        if not self.step_dt_s > 0:
            raise ValueError(f'step_dt_s must be positive, got {self.step_dt_s}')
        object.__setattr__(self, 'positions', freeze(positions))

    @property
    def horizon(self) -> int:
        """Number of steps."""
        return self.positions.shape[0]

    @property
    def end_ns(self) -> int:
        """When the last step is due."""
        return self.step_stamp_ns(self.horizon - 1)

    def step_stamp_ns(self, step: int) -> int:
        """When a step is due, exact to the nanosecond for any step."""
        return self.stamp_ns + round(step * self.step_dt_s * NS_PER_S)
