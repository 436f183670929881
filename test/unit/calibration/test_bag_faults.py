# SPDX-License-Identifier: Apache-2.0
"""Bags that must not be calibrated on: each is refused with a sentence, none with a traceback."""

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bag_maker import (
    CONTRACT,
    STILL,
    Scene,
    joint_state,
    picture,
    record,
    script,
    storage_file,
    text,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from quantvla_ros.calibration import bags
from quantvla_ros.calibration.bags import BagError, ReadOptions, observations
from quantvla_ros.calibration.frames import FrameSettings, frames_of

FEW = FrameSettings(20, 5)
PARTIAL = ReadOptions(partial=True)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return record(tmp_path_factory.mktemp('plain') / 'bag')


def refuses(bag, sentence, wanted=FEW):
    with pytest.raises(ValueError, match=sentence) as caught:
        frames_of(bag, CONTRACT, wanted)
    assert '\n' not in str(caught.value)


def test_path_without_a_bag_is_refused(tmp_path):
    refuses(tmp_path / 'nothing', 'does not exist')
    refuses(tmp_path, 'is no bag: it holds nothing')
    (tmp_path / 'old.bag').write_bytes(b'#ROSBAG V2.0')
    refuses(tmp_path / 'old.bag', 'ROS 1 bags must be converted')
    refuses(tmp_path / 'no.npz', 'missing')


def test_missing_topic_is_refused_with_what_the_bag_has(tmp_path):
    bag = record(tmp_path / 'bag', Scene(without=('wrist/image',)))
    refuses(bag, 'no topic /wrist/image.*it has /front/image')


def test_topic_that_was_announced_but_never_sent_is_refused(tmp_path):
    """Our recorder announces every topic of the contract, whether anybody publishes or not."""
    messages = [item for item in script() if item[0] != 'wrist/image']
    kind = 'sensor_msgs/msg/Image'
    bag = write(tmp_path / 'bag', messages, announce={'wrist/image': kind})
    refuses(bag, r"no usable message of camera 'wrist' on 'wrist/image'")


def test_wrong_type_is_refused_with_both_types(tmp_path):
    messages = [(t, s, text('x') if t == 'front/image' else m) for t, s, m in script()]
    refuses(write(tmp_path / 'bag', messages),
            'wrong type: /front/image is std_msgs/msg/String, expected sensor_msgs/msg/Image')


def test_cameras_of_another_size_are_refused(tmp_path):
    refuses(record(tmp_path / 'bag', Scene(size=(20, 12))),
            "camera 'front': size is 20x12; the contract says 16x12")


def test_size_that_changes_on_the_way_is_counted(tmp_path):
    messages = [(t, s, picture(1, s, (20, 12)) if t == 'front/image' and i > 400 else m)
                for i, (t, s, m) in enumerate(script())]
    found = frames_of(write(tmp_path / 'bag', messages), CONTRACT, FEW)
    assert found.rejected["camera 'front': size"] == 20
    refuses(write(tmp_path / 'b', messages), "80 usable.*20 camera 'front': size",
            FrameSettings(90, 9))


def test_joints_of_another_robot_are_refused(tmp_path):
    def renamed(stamp):
        return replace(joint_state(0.0, 0.0, stamp), name=['x', 'y'])

    messages = [(t, s, renamed(s) if t == 'joint_states' else m) for t, s, m in script()]
    refuses(write(tmp_path / 'bag', messages), 'a, b is missing; the message names x, y')


def test_driver_that_does_not_stamp_is_refused(tmp_path):
    messages = [(t, s, picture(i, 0) if t == 'front/image' else m)
                for i, (t, s, m) in enumerate(script())]
    refuses(write(tmp_path / 'bag', messages), "camera 'front': the header stamp is 0 ns")


def test_stamps_that_go_back_are_refused(tmp_path):
    """Two recordings joined: the clock of the second began anew."""
    second = [(t, s + 20 * 10**9, m) for t, s, m in script()]
    refuses(write(tmp_path / 'bag', [*script(), *second]), r'stamps go back by 9\.\d+ s')


def test_picture_that_overtook_another_is_passed_and_counted(tmp_path):
    messages = list(script())
    places = [i for i, item in enumerate(messages) if item[0] == 'front/image']
    first, second = messages[places[40]], messages[places[41]]
    messages[places[40]] = (first[0], first[1], second[2])
    messages[places[41]] = (second[0], second[1], first[2])
    found = frames_of(write(tmp_path / 'bag', messages), CONTRACT, FEW)
    assert found.rejected == {"camera 'front': the stamp went back": 1}


def test_too_few_frames_are_refused_with_the_count(tmp_path):
    refuses(record(tmp_path / 'bag', Scene(frames=30)),
            '30 usable frames, 30 of them different; 128 to fit and 32 to judge',
            FrameSettings())


def test_frames_that_are_all_alike_are_refused(tmp_path):
    refuses(record(tmp_path / 'bag', STILL), 'frames are all alike: of 100 only 2 differ')


def test_few_frames_in_one_part_of_the_time_are_refused(tmp_path):
    """The arm stands still in the last third, from which the held-out frames would come."""
    moving = list(script(Scene(frames=60, instructions=('pick',))))
    end = moving[-1][1]
    still = [(t, s + end - 17 * 10**17 + 10**8, m) for t, s, m in script(replace(STILL, frames=40))
             if t != 'instruction']
    still = [(t, s, restamped(m, s)) for t, s, m in still]
    refuses(write(tmp_path / 'bag', [*moving, *still]), 'are left to fit and .* to judge',
            FrameSettings(40, 10))


def restamped(message, stamp_ns):
    message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
    return message


@pytest.mark.parametrize('storage', StoragePlugin, ids=lambda v: v.name.lower())
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_file_cut_anywhere_is_refused_and_partly_readable(
    plain, tmp_path_factory, storage, data
):
    whole = whole_file(tmp_path_factory, storage)
    cut = data.draw(st.integers(0, len(whole) - 1))
    file = tmp_path_factory.getbasetemp() / f'cut{storage_suffix(storage)}'
    file.write_bytes(whole[:cut])
    try:
        assert len(list(observations(file, CONTRACT))) == 100  # only its index is cut off
    except ValueError:
        assert_prefix_of(plain, file)


@pytest.mark.parametrize('storage', StoragePlugin, ids=lambda v: v.name.lower())
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_end_in_a_traceback(plain, tmp_path_factory, storage, data):
    whole = bytearray(whole_file(tmp_path_factory, storage))
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        whole[place] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.getbasetemp() / f'flip{storage_suffix(storage)}'
    file.write_bytes(whole)
    for options in (ReadOptions(), PARTIAL):
        try:
            found = list(observations(file, CONTRACT, options))
        except ValueError:
            continue
        assert len(found) <= 100


MADE = {}


def whole_file(factory, storage):
    """Return the bytes of the plain bag, each message compressed, so that they are few."""
    if storage not in MADE:
        bag = record(factory.mktemp('whole') / 'bag', storage=storage,
                     mode=CompressionMode.MESSAGE)
        MADE[storage] = storage_file(bag).read_bytes()
    return MADE[storage]


def storage_suffix(storage):
    return '.mcap' if storage == StoragePlugin.MCAP else '.db3'


def assert_prefix_of(plain, file):
    """What can be read of a cut file is what the whole file begins with."""
    try:
        found = list(observations(file, CONTRACT, PARTIAL))
    except ValueError:
        return  # not even the topics can be read
    whole = observations(plain, CONTRACT)
    for one, other in zip(found, whole, strict=False):
        assert one.joint_stamp_ns == other.joint_stamp_ns
        assert np.array_equal(one.images['front'], other.images['front'])


@pytest.mark.parametrize('share, least', [(0.9, 70), (0.5, 30)])
def test_much_of_a_cut_file_can_be_read(tmp_path, share, least):
    """A megabyte is what a chunk may lose; this bag has eight."""
    big = record(tmp_path / 'bag', pad=40_000)
    whole = storage_file(big).read_bytes()
    assert len(whole) > 8e6
    file = tmp_path / 'cut.mcap'
    file.write_bytes(whole[: int(share * len(whole))])
    refuses(file, r'cut off at byte \d+\. Before that \d+ messages over \d+\.\d s can be read')
    assert len(list(observations(file, CONTRACT, PARTIAL))) >= least


def test_corrupt_chunk_is_refused_with_what_came_before(tmp_path):
    big = record(tmp_path / 'bag', pad=20_000, mode=CompressionMode.STORAGE)
    overwrite(storage_file(big), 300_000, 0xA5)  # a zstd block has 128 kB at most
    refuses(big, r'is damaged.*Before that [1-9]\d* messages')


@pytest.mark.parametrize('storage', StoragePlugin, ids=lambda v: v.name.lower())
def test_hole_of_zeros_is_refused(tmp_path, storage):
    """As a power cut leaves it: the file has its length, a part of it was never written."""
    big = record(tmp_path / 'bag', pad=20_000, storage=storage)
    overwrite(storage_file(big), 1_500_000, 0)
    refuses(big, r'is damaged.*Before that [1-9]\d* messages')


def overwrite(file, size, value):
    data = bytearray(file.read_bytes())
    start = len(data) // 2
    data[start : start + size] = bytes([value]) * size
    file.write_bytes(data)


def test_recording_that_goes_on_is_refused(plain, tmp_path, monkeypatch):
    bag = shutil.copytree(plain, tmp_path / 'bag')
    moments = bags.moments

    def and_more(*given):
        yield from moments(*given)
        with storage_file(bag).open('ab') as file:
            file.write(b'more')

    monkeypatch.setattr('quantvla_ros.calibration.frames.moments', and_more)
    refuses(bag, 'changed while it was read|no end')


@pytest.mark.parametrize('storage', StoragePlugin, ids=lambda v: v.name.lower())
def test_bag_removed_while_reading_is_told(tmp_path, monkeypatch, storage):
    bag = record(tmp_path / 'bag', storage=storage)
    moments = bags.moments

    def vanishing(*given):
        for i, moment in enumerate(moments(*given)):
            if i == 10:
                shutil.rmtree(bag, ignore_errors=True)
            yield moment

    monkeypatch.setattr('quantvla_ros.calibration.frames.moments', vanishing)
    refuses(bag, 'cannot be read any more.*removed')


def test_disk_that_fails_while_reading_is_told(plain, monkeypatch):
    """A stick that is pulled out: the file is there, its bytes are not."""
    original = bags.open_source

    def opened(file, storage):
        class Failing:
            def __enter__(self):
                self.inner = original(file, storage)
                self.source = self.inner.__enter__()
                return self

            def __exit__(self, *error):
                return self.inner.__exit__(*error)

            def topics(self):
                return self.source.topics()

            def messages(self, wanted):
                for i, raw in enumerate(self.source.messages(wanted)):
                    if i == 100:
                        raise OSError(5, 'Input/output error')
                    yield raw

        return Failing()

    monkeypatch.setattr(bags, 'open_source', opened)
    refuses(plain, 'cannot be read any more .Input/output error.')


def test_memory_does_not_grow_with_the_bag(tmp_path):
    """240 frames of 150 kB each: 36 MB pass through less than 8."""
    bag = record(tmp_path / 'bag', Scene(frames=240), pad=75_000)
    assert Path(storage_file(bag)).stat().st_size > 30e6
    tracemalloc.start()
    try:
        count = sum(1 for _ in observations(bag, CONTRACT))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 240
    assert peak < 8e6


def test_refusals_are_of_the_type_that_users_can_mend():
    assert issubclass(BagError, ValueError)
