# SPDX-License-Identifier: Apache-2.0
"""Serve one chunk of a folder in a process of its own and tell what that process held at most.

Run as `python -m quantvla_ros.policies.measured FOLDER CONTRACT PRECISION`; prints one line of
JSON. The observation is made up: pictures of noise, joints at zero.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from quantvla_ros.contract import Contract, load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.resources import peak_bytes


def example(contract: Contract) -> Observation:
    """Return an observation of a contract's shapes."""
    drawn = np.random.default_rng(0)
    return Observation(
        images={
            camera.name: drawn.integers(
                0, 256, (camera.policy_height, camera.policy_width, 3), dtype=np.uint8)
            for camera in contract.cameras
        },
        image_stamps_ns=dict.fromkeys(contract.camera_names, 0),
        joint_names=contract.joints.names,
        joint_positions=np.zeros(len(contract.joints.names)),
        joint_stamp_ns=0,
        instruction=contract.instruction,
    )


def serve(folder: str, contract_name: str, precision: str) -> dict[str, float]:
    """Load, serve one chunk, and return peaks in bytes and times in seconds."""
    before, began = peak_bytes(), time.monotonic()
    contract = load_contract(contract_name)
    settings = PolicySettings(model=folder, precision=precision)
    policy = make_policy(contract.policy, contract, settings)
    loaded, loaded_s = peak_bytes(), time.monotonic() - began
    chunk = policy.denoise(policy.prepare(example(contract)), 0)
    if not np.isfinite(chunk.positions).all():
        raise RuntimeError('the chunk is not finite')
    return {
        'imports_bytes': before, 'loaded_bytes': loaded, 'peak_bytes': peak_bytes(),
        'loaded_s': loaded_s, 'chunk_s': time.monotonic() - began - loaded_s,
    }


if __name__ == '__main__':
    print(json.dumps(serve(*sys.argv[1:4])))
