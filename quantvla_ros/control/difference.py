# SPDX-License-Identifier: Apache-2.0
"""How far apart two chunks for the same instant are, joint by joint, in SI. Numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.control.limits import JointLimiter


@dataclass(frozen=True)
class Difference:
    """other - reference over the steps of a chunk.

    steps: (horizon, joints) rad or m. Joints that may jump (a gripper that opens or closes) are
    judged by no bound: `jumps` counts the steps in which they disagree.
    """

    joint_names: tuple[str, ...]
    steps: np.ndarray
    snap: np.ndarray

    @property
    def worst(self) -> np.ndarray:
        """Largest distance of each joint, (joints,)."""
        return np.abs(self.steps).max(axis=0)

    @property
    def jumps(self) -> int:
        """Steps in which a joint that may jump is elsewhere."""
        return int(np.count_nonzero(np.abs(self.steps[:, self.snap]) > 1e-6))

    def problem(self, bound: np.ndarray) -> str:
        """Say which joint is farther than its bound (joints,), '' when none is."""
        excess = np.where(self.snap, 0.0, self.worst / bound)
        joint = int(excess.argmax())
        if excess[joint] <= 1:  # not so for NaN
            return ''
        return (
            f'its answer differs by {self.worst[joint]:.4f} at joint '
            f'{self.joint_names[joint]!r}; at most {bound[joint]:g} is allowed'
        )


def difference(reference: ActionChunk, other: ActionChunk, limiter: JointLimiter) -> Difference:
    """Compare two chunks made from one observation. Raises ValueError for another shape."""
    if other.joint_names != reference.joint_names or (
        other.positions.shape != reference.positions.shape
    ):
        raise ValueError(
            f'it answers for {other.positions.shape[1]} joints over {other.horizon} steps; the '
            f'running one for {reference.positions.shape[1]} over {reference.horizon}'
        )
    with np.errstate(invalid='ignore'):  # NaN and infinity are told by problem()
        steps = other.positions - reference.positions
    return Difference(reference.joint_names, steps, limiter.snap)
