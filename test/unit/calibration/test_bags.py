# SPDX-License-Identifier: Apache-2.0
"""Bags of every kind give the same observations; only the contract's topics are read."""

import numpy as np
import pytest
from bag_maker import CONTRACT, Scene, record
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from quantvla_ros.calibration.bags import observations
from quantvla_ros.calibration.frames import FrameSettings, frames_digest, frames_of

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


def test_missing_topic_is_refused_with_what_the_bag_has(tmp_path):
    bag = record(tmp_path / 'bag', Scene(without=('wrist/image',)))
    with pytest.raises(ValueError, match='no topic /wrist/image.*it has /front/image'):
        frames_of(bag, CONTRACT)
