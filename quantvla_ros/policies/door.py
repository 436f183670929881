# SPDX-License-Identifier: Apache-2.0
"""The one door between a robot in SI and a published checkpoint in its own numbers.

Order and units of joints, gripper values, statistics, targets against differences, camera slots:
all of it happens here, both ways, and nowhere else. Refuses a contract that does not fit the
checkpoint and an observation that does not fit the contract. Holds no network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import Contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.agreement import Agreement
from quantvla_ros.policies.normalize import Affine


class Door:
    """Observation -> what a model reads; what a model writes -> ActionChunk."""

    def __init__(
        self,
        contract: Contract,
        agreement: Agreement,
        slots: Sequence[str],
        state: Affine | None,
        action: Affine | None,
    ) -> None:
        self.contract, self.agreement = contract, agreement
        self.state_map, self.action_map = state, action
        self.slots = tuple(slots) or tuple(slot for slot, _ in agreement.cameras)
        problems = self._problems()
        if problems:
            raise ValueError(
                'the contract does not fit the checkpoint:\n  ' + '\n  '.join(problems)
            )
        measured = contract.joints.names
        self._state_order = [measured.index(name) for name in agreement.state]
        self._from = [measured.index(name) for name in agreement.action]  # measured -> model
        self._action_order = [agreement.action.index(name) for name in contract.action.joints]
        gripper = contract.gripper.joint if agreement.gripper else ''
        self._gripper = np.array([name == gripper for name in agreement.action])
        self._state_gripper = np.array([name == gripper for name in agreement.state])

    def _problems(self) -> list[str]:
        found = []
        given = dict(self.agreement.cameras)
        unknown = sorted(set(given) - set(self.slots))
        if unknown:
            found.append(
                f'model.cameras names {", ".join(unknown)}; the checkpoint has the slots '
                f'{", ".join(self.slots)} (map them: slot: camera)'
            )
        for what, size, names in (
            ('state', self.state_map, self.agreement.state),
            ('action', self.action_map, self.agreement.action),
        ):
            if size is not None and size.size != len(names):
                found.append(
                    f'model.{what}.joints names {len(names)} joints ({", ".join(names)}); the '
                    f'statistics of the checkpoint have {size.size} numbers'
                    + (', as end-effector checkpoints do, which speak no joints'
                       if size.size == 7 and what == 'action' else '')
                )
        return found

    def images(self, observation: Observation, size: int) -> Tensor:
        """Frames of the cameras that exist, in the order of the slots: (V, 3, size, size) uint8.

        A slot without a camera is left out: at batch 1 that equals masking it.
        """
        given = dict(self.agreement.cameras)
        frames = []
        for camera in (given[slot] for slot in self.slots if slot in given):
            if camera not in observation.images:
                raise ValueError(f'the observation lacks camera {camera!r}')
            frame = observation.images[camera]
            if frame.shape[:2] != (size, size):
                raise ValueError(
                    f'camera {camera!r} is {frame.shape[1]}x{frame.shape[0]}; the checkpoint '
                    f'reads {size}x{size}: set policy.width, policy.height and policy.resize '
                    'in the contract'
                )
            frames.append(torch.from_numpy(np.array(frame)))
        return torch.stack(frames).permute(0, 3, 1, 2)

    def measured(self, observation: Observation) -> np.ndarray:
        """Measured joints in the contract's order, SI."""
        absent = [n for n in self.contract.joints.names if n not in observation.joint_names]
        if absent:
            raise ValueError(f'the observation lacks joint {", ".join(absent)}')
        order = [observation.joint_names.index(name) for name in self.contract.joints.names]
        return observation.joint_positions[order]

    def state(self, measured: np.ndarray) -> np.ndarray:
        """Measured joints in SI -> the checkpoint's normalised state, float32."""
        own = measured[self._state_order]
        turned = own * self.agreement.state_units
        own = np.where(self._state_gripper, self._gripper_in(own), turned)
        return own.astype(np.float32) if self.state_map is None else self.state_map.to_model(own)

    def normalise(self, targets: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Absolute targets (steps, contract's action.joints) in SI -> normalised actions."""
        own = np.empty((len(targets), len(self._action_order)))
        own[:, self._action_order] = targets
        arm = self._relative(own, measured) * self.agreement.action_units
        own = np.where(self._gripper, self._gripper_in(own), arm)
        return own.astype(np.float32) if self.action_map is None else self.action_map.to_model(own)

    def chunk(self, action: np.ndarray, measured: np.ndarray, stamp_ns: int) -> ActionChunk:
        """Normalised actions (steps, width) -> absolute targets of the contract's joints, SI.

        Numbers and steps that the checkpoint pads with are cut off.
        """
        wanted = self.contract.action
        own = np.asarray(action, np.float64)[: wanted.horizon, : len(self._action_order)]
        if self.action_map is not None:
            own = self.action_map.to_robot(own)
        arm = self._absolute(own / self.agreement.action_units, measured)
        own = np.where(self._gripper, self._gripper_out(own), arm)
        return ActionChunk(wanted.joints, own[:, self._action_order], stamp_ns, wanted.step_dt_s)

    def _absolute(self, own: np.ndarray, measured: np.ndarray) -> np.ndarray:
        kind = self.agreement.kind
        if kind == 'absolute':
            return own
        if kind == 'velocity':
            own = np.cumsum(own, 0) * self.contract.action.step_dt_s
        return own + measured[self._from]

    def _relative(self, own: np.ndarray, measured: np.ndarray) -> np.ndarray:
        kind = self.agreement.kind
        if kind == 'absolute':
            return own
        own = own - measured[self._from]
        if kind == 'velocity':
            own = np.diff(own, axis=0, prepend=0.0) / self.contract.action.step_dt_s
        return own

    def _gripper_in(self, own: np.ndarray) -> np.ndarray:
        """Positions of the gripper's joint -> the checkpoint's values."""
        if self.agreement.gripper is None:
            return own
        opened, closed = self.agreement.gripper
        robot = self.contract.gripper
        share = (own - robot.open_position) / (robot.closed_position - robot.open_position)
        return opened + share * (closed - opened)

    def _gripper_out(self, own: np.ndarray) -> np.ndarray:
        """The checkpoint's values -> positions of the gripper's joint, inside its range."""
        if self.agreement.gripper is None:
            return own
        opened, closed = self.agreement.gripper
        robot = self.contract.gripper
        share = np.clip((own - opened) / (closed - opened), 0.0, 1.0)
        return robot.open_position + share * (robot.closed_position - robot.open_position)
