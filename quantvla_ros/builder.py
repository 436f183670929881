# SPDX-License-Identifier: Apache-2.0
"""The newest pictures and the pose they show, made into an Observation when somebody asks.

A picture is older than the newest joint state by its exposure, its way here and up to a period; a
policy was trained on pairs of one instant, and a moving hand is centimetres farther by then. So
the pose is the one that was measured when the oldest of the pictures was taken.

Used live and by the bag reader. Checks a message when it comes, decodes pictures only when they
are used. Knows no clock: how old is too old is for the control core to say.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from quantvla_ros.action import NS_PER_S
from quantvla_ros.contract import Contract
from quantvla_ros.decode import check_camera, decode_camera, decode_joints, decode_vector, stamp_ns
from quantvla_ros.observation import Observation

POSES_S = 2.0  # of measured joints that are kept


def nearest(
    poses: Sequence[tuple[np.ndarray, int]], instant_ns: int
) -> tuple[np.ndarray, int]:
    """Return the pose whose stamp is nearest to an instant; poses are in the order of stamps."""
    after = bisect_left(poses, instant_ns, key=lambda pose: pose[1])
    around = poses[max(0, after - 1) : after + 1]
    return min(around, key=lambda pose: abs(pose[1] - instant_ns))


class ObservationBuilder:
    """Latest of each input of a contract, and the joints of the last seconds.

    The put methods are called by one thread and build by another: each input is one reference
    that is swapped, and poses are copied in one call of the interpreter, so that build sees a
    message whole. They return the stamp in ns and raise
    DecodeError; a message that is refused leaves the one before it in place.
    """

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.instruction = contract.instruction
        self._cameras: dict[str, tuple[Any, int]] = {}
        self._poses: deque[tuple[np.ndarray, int]] = deque()
        self._vectors: dict[str, tuple[np.ndarray, int]] = {}
        self._decoded: dict[str, tuple[Any, np.ndarray]] = {}

    def clear(self) -> None:
        """Forget every message; the instruction stays."""
        self._cameras = {}
        self._poses = deque()
        self._vectors = {}
        self._decoded = {}

    def put_camera(self, name: str, message: Any) -> int:
        """Keep a picture undecoded."""
        check_camera(message, self.contract.camera(name))
        stamp = stamp_ns(message.header, f'camera {name!r}')
        self._cameras[name] = (message, stamp)
        return stamp

    def put_joints(self, message: Any) -> int:
        """Keep the measured positions of the contract's joints."""
        positions = decode_joints(message, self.contract.joints)
        stamp = stamp_ns(message.header, 'joint states')
        poses = self._poses
        if poses and stamp < poses[-1][1]:  # the clock went back: what was before it is no past
            self._poses = poses = deque()
        poses.append((positions, stamp))
        while stamp - poses[0][1] > POSES_S * NS_PER_S:
            poses.popleft()
        return stamp

    def put_vector(self, name: str, message: Any, received_ns: int) -> int:
        """Keep a vector; its type has no header, so the time of receipt is its stamp."""
        vector = next(item for item in self.contract.vectors if item.name == name)
        self._vectors[name] = (decode_vector(message, vector), received_ns)
        return received_ns

    def joint_positions(self) -> tuple[np.ndarray, int] | None:
        """Return the newest positions, in the order of contract.joints, and their stamp in ns."""
        poses = self._poses
        return poses[-1] if poses else None

    def shown_ns(self) -> int:
        """Return when the oldest of the newest pictures was taken, 0 before there is one."""
        return min((stamp for _, stamp in list(self._cameras.values())), default=0)

    def missing(self) -> tuple[str, ...]:
        """Name every input that has not come yet, with its topic."""
        found = [
            f'camera {camera.name!r} on {camera.topic!r}'
            for camera in self.contract.cameras
            if camera.name not in self._cameras
        ]
        if not self._poses:
            found.append(f'joint states on {self.contract.joints.topic!r}')
        found += [
            f'vector {vector.name!r} on {vector.topic!r}'
            for vector in self.contract.vectors
            if vector.name not in self._vectors
        ]
        return tuple(found)

    def build(self) -> Observation:
        """Decode the newest pictures and return the Observation of the instant they show.

        Raises ValueError that names what is missing, and DecodeError.
        """
        missing, poses = self.missing(), list(self._poses)
        if missing or not poses:
            raise ValueError('nothing has come yet from ' + ', '.join(missing))
        cameras = dict(self._cameras)
        positions, joint_stamp = nearest(poses, min(
            (stamp for _, stamp in cameras.values()), default=poses[-1][1]))
        return Observation(
            images={name: self._picture(name, cameras[name][0]) for name in cameras},
            image_stamps_ns={name: stamp for name, (_, stamp) in cameras.items()},
            joint_names=self.contract.joints.names,
            joint_positions=positions,
            joint_stamp_ns=joint_stamp,
            instruction=self.instruction,
            vectors={name: values for name, (values, _) in self._vectors.items()},
            vector_stamps_ns={name: stamp for name, (_, stamp) in self._vectors.items()},
        )

    def _picture(self, name: str, message: Any) -> np.ndarray:
        """Decode a picture, or return it again when it is the one decoded last."""
        last = self._decoded.get(name)
        if last is not None and last[0] is message:
            return last[1]
        picture = decode_camera(message, self.contract.camera(name))
        self._decoded[name] = (message, picture)
        return picture
