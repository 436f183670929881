# SPDX-License-Identifier: Apache-2.0
"""What the policy sees at one instant. Owns no clock, no message type and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def freeze(array: np.ndarray) -> np.ndarray:
    """Return a read-only view, so that no thread can change what another one reads."""
    view = array.view()
    view.flags.writeable = False
    return view


@dataclass(frozen=True)
class Observation:
    """Named camera frames, named joint positions and the instruction, each with its stamp.

    images: camera name -> (height, width, 3) uint8 RGB, already resized as the contract says.
    joint_positions: (joints,) float64 in rad or m, in the order of joint_names.
    vectors: further named sensors of the contract -> (size,) float64; empty for most robots.
    Stamps are header stamps in ns. Raises ValueError when shapes or dtypes are off.
    """

    images: Mapping[str, np.ndarray]
    image_stamps_ns: Mapping[str, int]
    joint_names: tuple[str, ...]
    joint_positions: np.ndarray
    joint_stamp_ns: int
    instruction: str
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    vector_stamps_ns: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, image in self.images.items():
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(
                    f'camera {name!r}: expected (height, width, 3) uint8, '
                    f'got {image.shape} {image.dtype}'
                )
        if set(self.images) != set(self.image_stamps_ns):
            raise ValueError('every camera frame needs a stamp and every stamp a frame')
        positions = np.asarray(self.joint_positions, dtype=np.float64)
        if positions.shape != (len(self.joint_names),):
            raise ValueError(
                f'{len(self.joint_names)} joint names but positions of shape {positions.shape}'
            )
        object.__setattr__(self, 'joint_positions', freeze(positions))
        object.__setattr__(self, 'images', {k: freeze(v) for k, v in self.images.items()})
        object.__setattr__(
            self,
            'vectors',
            {k: freeze(np.asarray(v, dtype=np.float64)) for k, v in self.vectors.items()},
        )

    @property
    def stamp_ns(self) -> int:
        """The instant the chunk starts from: the stamp of the joint positions."""
        return self.joint_stamp_ns

    def spread_ns(self) -> int:
        """How far apart the oldest and the newest part of this observation are."""
        stamps = [self.joint_stamp_ns, *self.image_stamps_ns.values()]
        return max(stamps) - min(stamps)
