# SPDX-License-Identifier: Apache-2.0
"""What a chunk was computed from, so that anybody can compute it again and compare.

Said beside every chunk on ~/chunk_origin, as JSON. Names the inputs by their stamps and holds no
picture: who wants to check keeps the messages. Knows neither rclpy nor torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from quantvla_ros.action import ActionChunk
from quantvla_ros.observation import Observation


def digest(positions: np.ndarray) -> str:
    """Hash the numbers (steps, joints) of a chunk, to the last bit."""
    return hashlib.sha256(np.ascontiguousarray(positions, np.float64).tobytes()).hexdigest()


@dataclass(frozen=True)
class Origin:
    """Inputs of one chunk, by their header stamps in ns.

    prefixed: the chunk continued a running plan. chunk_sha256: of the positions on ~/chunk; the
    stamp there cannot name it, since the first chunk after a start is stamped later than its
    joints and may share that with the second.
    """

    joint_stamp_ns: int
    image_stamps_ns: Mapping[str, int]
    vector_stamps_ns: Mapping[str, int]
    instruction: str
    seed: int
    prefixed: bool
    chunk_sha256: str = ''

    @classmethod
    def of(cls, observation: Observation, seed: int, *, prefixed: bool) -> Origin:
        """Return the origin of a chunk that is computed from this observation."""
        return cls(
            observation.joint_stamp_ns, dict(observation.image_stamps_ns),
            dict(observation.vector_stamps_ns), observation.instruction, seed, prefixed,
        )

    def of_chunk(self, chunk: ActionChunk) -> Origin:
        """Return this origin with the chunk that came of it."""
        return replace(self, chunk_sha256=digest(chunk.positions))

    def text(self) -> str:
        """Return the JSON of ~/chunk_origin."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Origin:
        """Return what text said."""
        return cls(**json.loads(text))
