# SPDX-License-Identifier: Apache-2.0
"""One comparison: a model folder, a contract, an observation, and the chunk it must give.

Runs our side of it, from a folder on disk to a chunk in joint units, with no public package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.contract import Contract, parse_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings, make_policy

TASK = 'pick up_the black bowl\nand place it'
CAMERAS = ('agentview', 'wrist')
MEASURED = tuple(f'joint{i}' for i in range(9))
COMMANDED = MEASURED[:8]
SEED = 3


@dataclass(frozen=True)
class ParityCase:
    """policy, horizon, image size and the contract's model section; everything else is fixed."""

    policy: str
    horizon: int
    image: int
    model: Mapping[str, Any]
    commanded: int = len(COMMANDED)

    def contract(self) -> Contract:
        """The contract of a made-up robot with nine joints and two cameras."""
        joints = list(COMMANDED[: self.commanded])
        return parse_contract({
            'contract': 1,
            'robot': 'parity',
            'policy': self.policy,
            'cameras': {
                name: {'topic': name, 'width': self.image, 'height': self.image}
                for name in CAMERAS
            },
            'joints': {'names': list(MEASURED)},
            'action': {'kind': 'absolute', 'joints': joints, 'horizon': self.horizon,
                       'rate_hz': 20.0},
            'controller': {'kind': 'forward_command', 'topic': 'commands', 'joints': joints},
            'model': dict(self.model),
        })

    def observation(self) -> Observation:
        """The same frames and joints every time."""
        rng = np.random.default_rng(0)
        size = (self.image, self.image, 3)
        images = {name: rng.integers(0, 256, size, dtype=np.uint8) for name in CAMERAS}
        return Observation(images, dict.fromkeys(CAMERAS, 0), MEASURED, rng.normal(size=9), 0,
                           TASK)

    def ours(self, folder: Path) -> np.ndarray:
        """Our chunk (horizon, joints) from a folder."""
        policy = make_policy(self.policy, self.contract(), PolicySettings(model=str(folder)))
        return policy.denoise(policy.prepare(self.observation()), SEED).positions


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


PI_SLOTS = {'base_0_rgb': 'agentview', 'left_wrist_0_rgb': 'wrist'}
GROOT_PARTS = {'state': {'parts': ['arm', 'gripper']}, 'action': {'parts': ['arm', 'gripper']}}
CASES: dict[str, ParityCase] = {
    'pi05_lerobot': ParityCase('pi05', 10, 28, {'cameras': PI_SLOTS}),
    'pi0_lerobot': ParityCase('pi0', 10, 28, {'cameras': PI_SLOTS}),
    'groot_n15_isaac': ParityCase('groot_n15', 16, 28, GROOT_PARTS),
    'groot_n15_lerobot': ParityCase('groot_n15', 16, 28, {}),
    'openvla_hf': ParityCase('openvla', 1, 28, {'statistics': 'made_up'}, 7),
    'openvla_oft': ParityCase('openvla_oft', 4, 28, {'statistics': 'made_up'}, 7),
    'smolvla_lerobot': ParityCase('smolvla', 10, 64, {'cameras': PI_SLOTS}),
}
