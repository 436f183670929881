# SPDX-License-Identifier: Apache-2.0
"""Keeps what went into the chunks of an episode, so that each can be computed again.

Listens beside an operator to cameras, joint states, ~/chunk and ~/chunk_origin, and pairs them by
stamps and hashes. Judges nothing: a chunk whose messages did not all arrive here has no
observation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.contract import Contract
from quantvla_ros.decode import stamp_ns
from quantvla_ros.nodes.names import POLICY_NODE
from quantvla_ros.nodes.operator import Operator
from quantvla_ros.nodes.origin import Origin, digest
from quantvla_ros.observation import Observation

# The policy node takes the newest only; here nothing it may have taken shall be missed.
DEEP = QoSProfile(depth=200, reliability=ReliabilityPolicy.BEST_EFFORT)
KEPT = QoSProfile(depth=50, reliability=ReliabilityPolicy.RELIABLE)


@dataclass(frozen=True)
class HeardChunk:
    """One chunk as it stood on the wire, (steps, joints) in SI, and what it was made from."""

    origin: Origin
    positions: np.ndarray
    observation: Observation | None


class ChunkAudit:
    """Collects the chunks of one episode after another."""

    def __init__(self, operator: Operator, contract: Contract) -> None:
        self._contract = contract
        self._pictures: dict[str, dict[int, Any]] = {name: {} for name in contract.camera_names}
        self._joints: dict[int, Any] = {}
        self._chunks: dict[str, np.ndarray] = {}
        self._origins: list[Origin] = []
        for camera in contract.cameras:
            kind = CompressedImage if camera.type.endswith('CompressedImage') else Image
            operator.hear(kind, camera.topic, self._keeper(self._pictures[camera.name]), DEEP)
        operator.hear(JointState, contract.joints.topic, self._keeper(self._joints), DEEP)
        operator.hear(JointTrajectory, f'{POLICY_NODE}/chunk', self._on_chunk, KEPT)
        operator.hear(String, f'{POLICY_NODE}/chunk_origin', self._on_origin, KEPT)

    def clear(self) -> None:
        """Forget the episode before."""
        for kept in (*self._pictures.values(), self._joints):
            kept.clear()
        self._chunks.clear()
        self._origins.clear()

    def chunks(self) -> list[HeardChunk]:
        """Return every chunk of which both halves were heard, in order."""
        return [
            HeardChunk(origin, self._chunks[origin.chunk_sha256], self._observation(origin))
            for origin in self._origins if origin.chunk_sha256 in self._chunks
        ]

    def _keeper(self, kept: dict[int, Any]) -> Callable[[Any], None]:
        def keep(message: Any) -> None:
            kept[stamp_ns(message.header, 'message')] = message

        return keep

    def _on_chunk(self, message: JointTrajectory) -> None:
        rows = np.array([point.positions for point in message.points])
        self._chunks[digest(rows)] = rows

    def _on_origin(self, message: String) -> None:
        self._origins.append(Origin.read(message.data))

    def _observation(self, origin: Origin) -> Observation | None:
        """Build what the policy saw, on the node's own way; None when a message is missing."""
        builder = ObservationBuilder(self._contract)
        builder.instruction = origin.instruction
        for name, stamp in origin.image_stamps_ns.items():
            if stamp not in self._pictures[name]:
                return None
            builder.put_camera(name, self._pictures[name][stamp])
        if origin.joint_stamp_ns not in self._joints or builder.contract.vectors:
            return None
        builder.put_joints(self._joints[origin.joint_stamp_ns])
        return builder.build()
