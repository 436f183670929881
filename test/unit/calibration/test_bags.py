# SPDX-License-Identifier: Apache-2.0
"""Bags of every kind give the same observations; only the contract's topics are read."""

from dataclasses import replace

import numpy as np
import pytest
from bag_maker import CONTRACT, record
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from quantvla_ros.calibration.bags import observations
from quantvla_ros.calibration.frames import FrameSettings, frames_digest, frames_of
from quantvla_ros.calibration.frames_file import write_frames
from quantvla_ros.contract import load_contract

KINDS = [(storage, mode) for storage in StoragePlugin for mode in CompressionMode
         if (storage, mode) != (StoragePlugin.SQLITE3, CompressionMode.STORAGE)]


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return record(tmp_path_factory.mktemp('plain') / 'bag')


def digest_of(path):
    return frames_digest([list(observations(path, CONTRACT))])


@pytest.mark.parametrize('storage, mode', KINDS, ids=lambda v: v.name.lower())
def test_every_storage_and_compression_gives_the_same_observations(
    plain, tmp_path, storage, mode
):
    bag = record(tmp_path / 'bag', storage=storage, mode=mode)
    assert digest_of(bag) == digest_of(plain)


def test_chosen_frames_are_the_same_each_time_and_other_ones_with_another_seed(plain):
    first, again, other = (
        frames_of(plain, CONTRACT, FrameSettings(20, 5, seed)) for seed in (0, 0, 1))
    assert (len(first.fit), len(first.held_out)) == (20, 5)
    assert first.digest == again.digest != other.digest
    assert np.array_equal(first.fit[3].images['front'], again.fit[3].images['front'])


def test_a_long_bag_is_thinned_evenly_and_still_covered(plain):
    """Only every second moment is looked at; the bag reads the same from its start to its end."""
    few = FrameSettings(12, 4, candidates=50)
    found = frames_of(plain, CONTRACT, few)
    assert found.digest == frames_of(plain, CONTRACT, few).digest
    stamps = sorted(one.stamp_ns for one in (*found.fit, *found.held_out))
    assert len(set(stamps)) == 16
    assert stamps[0] < stamps[-1] - 8 * 10**9


@pytest.fixture
def frames_file(plain, tmp_path):
    seen = [replace(one, images={k: v.copy() for k, v in one.images.items()})
            for one in observations(plain, CONTRACT)]
    write_frames(tmp_path / 'frames.npz', seen)
    return tmp_path / 'frames.npz'


def test_frames_file_is_chosen_from_like_a_bag(frames_file, plain):
    found = frames_of(frames_file, CONTRACT, FrameSettings(20, 5))
    assert (len(found.fit), len(found.held_out), found.facts['storage']) == (20, 5, 'npz')
    fitted = {one.joint_positions.tobytes() for one in found.fit}
    assert not fitted & {one.joint_positions.tobytes() for one in found.held_out}
    assert {one.instruction for one in found.fit} == {'pick', 'place'}


def test_frames_file_of_another_robot_or_with_too_few_frames_is_refused(frames_file):
    with pytest.raises(ValueError, match='100 usable frames'):
        frames_of(frames_file, CONTRACT)
    with pytest.raises(ValueError, match='is of another robot: cameras'):
        frames_of(frames_file, load_contract('libero_panda'))
    frames_file.write_bytes(b'PK nothing')
    with pytest.raises(ValueError, match='is not a frames file'):
        frames_of(frames_file, CONTRACT)
