# SPDX-License-Identifier: Apache-2.0
"""Frames come back as they were written, and a damaged file is refused."""

from dataclasses import replace

import numpy as np
import pytest

from quantvla_ros.calibration.frames_file import read_all, read_frames, write_frames


def test_frames_come_back_as_they_were(frames_path, observations):
    found = read_frames(frames_path)
    assert len(found) == len(observations)
    for one, two in zip(found.observations, observations, strict=True):
        assert one.instruction == two.instruction
        assert one.joint_names == two.joint_names
        assert np.array_equal(one.joint_positions, two.joint_positions)
        assert all(np.array_equal(one.images[name], two.images[name]) for name in two.images)


def test_same_frames_give_the_same_bytes_and_hash(tmp_path, observations):
    paths = [tmp_path / 'a.npz', tmp_path / 'b.npz']
    for path in paths:
        write_frames(path, observations)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert read_frames(paths[0]).sha256 == read_frames(paths[1]).sha256


def test_another_pixel_gives_another_hash(tmp_path, observations, frames_path):
    first = observations[0]
    images = {name: image.copy() for name, image in first.images.items()}
    images['agentview'][0, 0, 0] ^= 1
    changed = type(first)(images, first.image_stamps_ns, first.joint_names,
                          first.joint_positions, first.joint_stamp_ns, first.instruction)
    write_frames(tmp_path / 'other.npz', [changed, *observations[1:]])
    assert read_frames(tmp_path / 'other.npz').sha256 != read_frames(frames_path).sha256


def test_halves_share_no_frame(frames_path):
    one, two = read_frames(frames_path).halves()
    assert len(one) == len(two) == 6
    assert not {id(o) for o in one} & {id(o) for o in two}


def two_episodes_each(tmp_path, observations):
    """A file of four episodes with three frames each; the stamps start again in each."""
    seen = [replace(o, joint_stamp_ns=i % 3, image_stamps_ns=dict.fromkeys(o.images, i % 3))
            for i, o in enumerate(observations)]
    write_frames(tmp_path / 'episodes.npz', seen)
    return tmp_path / 'episodes.npz'


def test_halves_share_no_episode(tmp_path, observations):
    frames = read_frames(two_episodes_each(tmp_path, observations))
    assert frames.episodes == (0,) * 3 + (1,) * 3 + (2,) * 3 + (3,) * 3
    one, two = frames.halves()
    joints = [o.joint_positions.tolist() for o in observations]
    assert [o.joint_positions.tolist() for o in one] == joints[:3] + joints[6:9]
    assert [o.joint_positions.tolist() for o in two] == joints[3:6] + joints[9:]


def test_several_files_are_read_as_one(tmp_path, observations, frames_path):
    path = two_episodes_each(tmp_path, observations)
    both = read_all([path, frames_path], limit=12)
    assert len(both) == 12 and both.sha256 != read_all([frames_path, path], limit=12).sha256
    alone = read_frames(path, 6)
    assert both.episodes[:6] == alone.episodes
    fitted = {id(o) for o in both.halves()[0]}
    assert [id(o) in fitted for o in both.observations[:6]] == [
        e % 2 == 0 for e in alone.episodes]
    assert read_all([path], 5).sha256 == read_frames(path, 5).sha256


def test_limit_takes_frames_from_the_whole_file(frames_path, observations):
    found = read_frames(frames_path, limit=3).observations
    assert np.array_equal(found[-1].joint_positions, observations[-1].joint_positions)
    assert len(found) == 3


def test_truncated_file_is_refused(frames_path):
    frames_path.write_bytes(frames_path.read_bytes()[:5000])
    with pytest.raises(ValueError, match='is not a frames file'):
        read_frames(frames_path)


@pytest.mark.parametrize('change, sentence', [
    (lambda a: a.pop('stamps'), 'lacks stamps'),
    (lambda a: a.pop('image/wrist') is None or a.pop('image/agentview'), 'lacks images'),
    (lambda a: a.update(joints=a['joints'][:-1]), 'joints should have 12 rows'),
    (lambda a: a['joints'].__setitem__((0, 0), np.nan), 'not finite'),
])
def test_a_file_that_does_not_fit_together_is_refused(frames_path, change, sentence):
    with np.load(frames_path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(frames_path, **arrays)
    with pytest.raises(ValueError, match=sentence):
        read_frames(frames_path)


def test_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match='quantvla frames'):
        read_frames(tmp_path / 'none.npz')
