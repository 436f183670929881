# SPDX-License-Identifier: Apache-2.0
"""One frame before each chunk, until the task is done; the noise depends on the seed alone."""

import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from bag_maker import DATA, record

from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.policies.base import HoldPolicy, PolicySettings
from quantvla_ros.sim.record_frames import add_arguments, roll_out, run


class CountingWorld:
    """Succeeds after a number of steps; shows that number in every pixel."""

    def __init__(self, succeeds_after):
        self.steps, self.last, self.gripper = 0, succeeds_after, None
        self.scene = SimpleNamespace(instruction='put the cup on the plate')

    def render(self, camera, size):
        return np.full((size[1], size[0], 3), self.steps, np.uint8)

    def joint_state(self):
        return np.linspace(0, 0.03, 9)

    def step(self, target, gripper):
        assert target.shape == (7,)
        self.steps, self.gripper = self.steps + 1, gripper

    def success(self):
        return self.steps >= self.last


def play(contract, succeeds_after, chunks):
    world = CountingWorld(succeeds_after)
    policy = HoldPolicy(contract, PolicySettings())
    return world, roll_out(world, policy, contract, chunks, seed=0)


def test_a_frame_is_kept_before_every_chunk(contract):
    world, seen = play(contract, 1000, 3)
    assert [int(o.images['wrist'][0, 0, 0]) for o in seen] == [0, 8, 16]
    assert world.steps == 24
    assert [o.stamp_ns for o in seen] == [0, 400_000_000, 800_000_000]


def test_recording_ends_with_the_task(contract):
    world, seen = play(contract, 10, 5)
    assert world.steps == 10 and len(seen) == 2


def test_closing_command_closes_the_hand(contract):
    world, _ = play(contract, 1, 1)
    assert world.gripper in (-1.0, 1.0)


def from_bag(tmp_path, *words):
    (tmp_path / 'contract.yaml').write_text(yaml.safe_dump(DATA))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(['--contract', str(tmp_path / 'contract.yaml'), '--out',
                                  str(tmp_path / 'frames.npz'), *words]))


def test_frames_of_a_bag_become_a_frames_file_in_order_of_time(tmp_path, capsys):
    bag = record(tmp_path / 'bag')
    assert from_bag(tmp_path, '--bag', str(bag), '--count', '20') == 0
    kept = read_frames(tmp_path / 'frames.npz').observations
    stamps = [one.stamp_ns for one in kept]
    assert len(kept) == 20 and stamps == sorted(set(stamps))
    assert {one.instruction for one in kept} == {'pick', 'place'}
    assert '100 moments over 10 s' in capsys.readouterr().out


def test_bag_with_too_few_frames_is_refused(tmp_path):
    with pytest.raises(ValueError, match='100 usable frames'):
        from_bag(tmp_path, '--bag', str(record(tmp_path / 'bag')))
    assert not (tmp_path / 'frames.npz').exists()
