# SPDX-License-Identifier: Apache-2.0
"""Which command came of which chunk, by the micrometres that number chunks."""

import json

import numpy as np

from quantvla_ros.bench.ros_policy import MARK, ConstantTime, first_commands
from quantvla_ros.contract import load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings

POSE = 0.7


def test_first_command_of_a_chunk_is_found_though_the_first_chunk_came_before_any(tmp_path):
    contract, log = load_contract('libero_panda'), tmp_path / 'log.jsonl'
    policy = ConstantTime(contract, PolicySettings(model=f'sleep 0 {log}'))
    names = contract.joints.names
    seen = Observation(
        images={'agentview': np.zeros((8, 8, 3), np.uint8)}, image_stamps_ns={'agentview': 1},
        joint_names=names,
        joint_positions=np.full(len(names), POSE), joint_stamp_ns=1, instruction='go')
    chunks = [policy.denoise(policy.prepare(seen), 0) for _ in range(3)]
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    assert np.allclose([chunk.positions[0, 0] - POSE for chunk in chunks],
                       MARK * np.arange(1, 4), rtol=1e-6, atol=0)
    after = [note['end_ns'] + 1_000_000 for note in notes]
    commands = [(after[1], chunks[1].positions[0, 0]), (after[1] + 5, chunks[1].positions[0, 0]),
                (after[2], chunks[2].positions[0, 0]), (after[0], POSE + 900 * MARK)]
    assert first_commands(notes, commands) == [(notes[1], after[1]), (notes[2], after[2])]
    late = [(notes[0]['end_ns'] + 200_000_000, chunks[0].positions[0, 0])]
    assert first_commands(notes, late) == []
