# SPDX-License-Identifier: Apache-2.0
"""decode.py: one path for live messages and bags, without copies, and refusals as sentences."""

import array
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros import decode
from quantvla_ros.contract import Camera, Joints, Vector
from quantvla_ros.decode import DecodeError, decode_camera, decode_joints, decode_vector

RAW, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'


def camera(encoding='rgb8', width=6, height=4, policy=None, **more):
    goal = policy or (width, height)
    kind = COMPRESSED if encoding in ('jpeg', 'png') else RAW
    return Camera('front', 'front/image', kind, encoding, width, height, *goal, **more)


def header(sec=5, nanosec=7):
    return SimpleNamespace(stamp=SimpleNamespace(sec=sec, nanosec=nanosec), frame_id='')


def image(pixels, encoding='rgb8', padding=0, big_endian=0, container=bytes):
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    padded = np.hstack([rows, np.full((height, padding), 99, np.uint8)])
    return SimpleNamespace(
        header=header(), height=height, width=width, encoding=encoding, step=padded.shape[1],
        is_bigendian=big_endian, data=container(padded.tobytes()),
    )


def pixels(height=4, width=6, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def compressed(bgr, extension, text):
    done, data = cv2.imencode(f'.{extension}', bgr)
    assert done
    return SimpleNamespace(header=header(), format=text, data=data.tobytes())


def joints(names=('a', 'b'), units=('rad', 'mm')):
    return Joints('joint_states', names, units)


def joint_state(names, positions):
    return SimpleNamespace(header=header(), name=list(names), position=array.array('d', positions))


# pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize('big_endian', [0, 1])
def test_rgb8_comes_out_as_it_is(padding, big_endian):
    seen = pixels()
    found = decode_camera(image(seen, 'rgb8', padding, big_endian), camera())
    np.testing.assert_array_equal(found, seen)


@pytest.mark.parametrize('padding', [0, 3])
def test_bgr8_comes_out_as_rgb(padding):
    seen = pixels()
    found = decode_camera(image(seen, 'bgr8', padding), camera('bgr8'))
    np.testing.assert_array_equal(found, seen[:, :, ::-1])


@pytest.mark.parametrize('padding', [0, 3])
def test_mono8_comes_out_as_three_equal_channels(padding):
    seen = pixels(channels=1)
    found = decode_camera(image(seen, 'mono8', padding), camera('mono8'))
    assert found.shape == (4, 6, 3)
    np.testing.assert_array_equal(found, np.repeat(seen, 3, axis=2))


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'mono8'])
@pytest.mark.parametrize('container', [
    lambda data: array.array('B', data), bytes, lambda data: np.frombuffer(data, np.uint8),
], ids=['array', 'bytes', 'ndarray'])
def test_picture_of_policy_size_shares_memory_with_the_message(encoding, container):
    message = image(pixels(480, 640, 1 if encoding == 'mono8' else 3), encoding,
                    container=container)
    found = decode_camera(message, camera(encoding, 640, 480))
    assert np.shares_memory(found, np.frombuffer(message.data, np.uint8))


def test_array_bytes_and_ndarray_give_the_same_picture():
    seen, found = pixels(), []
    for container in (bytes, lambda d: array.array('B', d), lambda d: np.frombuffer(d, np.uint8)):
        found.append(decode_camera(image(seen, container=container), camera(policy=(3, 2))))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_depth_picture_is_refused_with_the_reason():
    message = image(pixels(channels=2), '16UC1')
    with pytest.raises(DecodeError, match=r"'16UC1'.*says 'rgb8'.*no colours"):
        decode_camera(message, camera())


def test_other_encoding_than_the_contract_is_refused():
    with pytest.raises(DecodeError, match=r"encoding is 'bgr8'; the contract says 'rgb8'"):
        decode_camera(image(pixels(), 'bgr8'), camera())


def test_other_size_than_the_contract_is_refused():
    with pytest.raises(DecodeError, match=r'size is 7x4; the contract says 6x4'):
        decode_camera(image(pixels(4, 7)), camera())


def test_step_shorter_than_a_row_is_refused():
    message = image(pixels())
    message.step = 17
    with pytest.raises(DecodeError, match='step is 17; a row of it has 18 bytes'):
        decode_camera(message, camera())


def test_data_shorter_than_the_picture_is_refused():
    message = image(pixels())
    message.data = message.data[:-1]
    with pytest.raises(DecodeError, match='data holds 71 bytes; expected 72'):
        decode_camera(message, camera())


def test_padding_of_the_last_row_may_be_left_out():
    seen = pixels()
    message = image(seen, padding=5)
    message.data = message.data[:-5]
    np.testing.assert_array_equal(decode_camera(message, camera()), seen)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 7),
       st.sampled_from(['rgb8', 'bgr8', 'mono8']), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_padding_leaves_the_picture_alone(height, width, padding, encoding, seed):
    seen = pixels(height, width, 1 if encoding == 'mono8' else 3, seed)
    plain = decode_camera(image(seen, encoding), camera(encoding, width, height))
    padded = decode_camera(image(seen, encoding, padding), camera(encoding, width, height))
    np.testing.assert_array_equal(plain, padded)


# compressed pictures -------------------------------------------------------------------------


def test_png_comes_out_bit_for_bit_as_rgb():
    bgr = pixels(8, 10)
    found = decode_camera(compressed(bgr, 'png', 'bgr8; png compressed bgr8'),
                          camera('png', 10, 8))
    np.testing.assert_array_equal(found, bgr[:, :, ::-1])


@pytest.mark.parametrize('text', ['jpeg', 'jpg', 'rgb8; jpeg compressed bgr8'])
def test_jpeg_comes_out_as_rgb(text):
    bgr = np.zeros((16, 16, 3), np.uint8)
    bgr[:, :, 0] = 200  # blue
    found = decode_camera(compressed(bgr, 'jpg', text), camera('jpeg', 16, 16))
    assert found[8, 8, 2] > 190
    assert found[8, 8, 0] < 10


def test_compressed_format_that_differs_is_refused():
    with pytest.raises(DecodeError, match=r"format is 'png'; the contract says 'jpeg'"):
        decode_camera(compressed(pixels(), 'png', 'png'), camera('jpeg'))


def test_format_field_that_lies_is_refused():
    with pytest.raises(DecodeError, match='which is no jpeg'):
        decode_camera(compressed(pixels(), 'png', 'jpeg'), camera('jpeg'))


def test_broken_jpeg_is_refused():
    message = SimpleNamespace(header=header(), format='jpeg', data=b'\xff\xd8\xff\xe0 nothing')
    with pytest.raises(DecodeError, match='cannot be decoded'):
        decode_camera(message, camera('jpeg'))


def test_compressed_picture_of_another_size_is_refused():
    with pytest.raises(DecodeError, match='size is 10x8; the contract says 6x4'):
        decode_camera(compressed(pixels(8, 10), 'png', 'png'), camera('png'))


def test_without_cv2_a_jpeg_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(decode, '_cv2', lambda: None)
    with pytest.raises(DecodeError, match='install opencv-python'):
        decode_camera(compressed(pixels(), 'jpg', 'jpeg'), camera('jpeg'))


# flip and resize -----------------------------------------------------------------------------


@pytest.mark.parametrize(('flip', 'expected'), [
    ('none', lambda p: p), ('vertical', lambda p: p[::-1]),
    ('horizontal', lambda p: p[:, ::-1]), ('both', lambda p: p[::-1, ::-1]),
])
@pytest.mark.parametrize('encoding', ['rgb8', 'mono8'])
def test_flip_turns_the_picture(flip, expected, encoding):
    seen = pixels(channels=1 if encoding == 'mono8' else 3)
    found = decode_camera(image(seen, encoding), camera(encoding, flip=flip))
    np.testing.assert_array_equal(found, expected(np.broadcast_to(seen, (4, 6, 3))))


def test_stretch_takes_the_mean_over_the_area():
    seen = pixels(4, 8)
    found = decode_camera(image(seen), camera(width=8, height=4, policy=(4, 2)))
    mean = seen.reshape(2, 2, 4, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - mean).max() <= 0.51


def test_pad_keeps_the_aspect_ratio_and_fills_with_black():
    seen = np.full((4, 8, 3), 200, np.uint8)
    found = decode_camera(image(seen), camera(width=8, height=4, policy=(4, 4), resize='pad'))
    assert (found[1:3] == 200).all()
    assert (found[0] == 0).all()
    assert (found[3] == 0).all()


def test_crop_keeps_the_aspect_ratio_and_cuts_the_sides():
    seen = np.zeros((4, 8, 3), np.uint8)
    seen[:, 2:6] = 200
    found = decode_camera(image(seen), camera(width=8, height=4, policy=(4, 4), resize='crop'))
    assert (found == 200).all()


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24), st.integers(1, 24),
       st.sampled_from(['stretch', 'pad', 'crop']), st.sampled_from(['rgb8', 'bgr8', 'mono8']))
@settings(max_examples=80, deadline=None)
def test_every_resize_gives_the_policy_size(height, width, goal_h, goal_w, resize, encoding):
    seen = pixels(height, width, 1 if encoding == 'mono8' else 3)
    wanted = camera(encoding, width, height, (goal_w, goal_h), resize=resize)
    found = decode_camera(image(seen, encoding), wanted)
    assert found.shape == (goal_h, goal_w, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize('goal', [(224, 224), (256, 256), (320, 240), (84, 100)])
def test_area_resize_without_cv2_differs_by_one_at_most(goal):
    seen = pixels(480, 640)
    width, height = goal
    found = decode.area_resize(seen, height, width).astype(int)
    theirs = cv2.resize(seen, goal, interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(found - theirs).max() <= 1


# cv_bridge -----------------------------------------------------------------------------------


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'mono8'])
@pytest.mark.parametrize('padding', [0, 6])
def test_cv_bridge_reads_the_same_bits(encoding, padding):
    bridge_module = pytest.importorskip(
        'cv_bridge', reason='cv_bridge comes with a ROS 2 installation and is not on this machine'
    )
    message = image(pixels(channels=1 if encoding == 'mono8' else 3), encoding, padding)
    theirs = bridge_module.CvBridge().imgmsg_to_cv2(message, 'passthrough')
    np.testing.assert_array_equal(
        decode.view_pixels(message), theirs.reshape(message.height, message.width, -1)
    )


class Bridge:
    """What cv_bridge offers here; wrong on purpose when told to."""

    def __init__(self, change=0):
        self.change = change

    def imgmsg_to_cv2(self, message, desired_encoding):
        assert desired_encoding == 'passthrough'
        return decode.view_pixels(message) + np.uint8(self.change)


@pytest.mark.parametrize(('change', 'used'), [(0, True), (1, False)])
def test_cv_bridge_is_used_only_when_it_agrees_on_a_known_picture(monkeypatch, change, used):
    monkeypatch.setattr(decode.importlib, 'import_module',
                        lambda name: SimpleNamespace(CvBridge=lambda: Bridge(change)))
    decode.cv_bridge.cache_clear()
    try:
        assert (decode.cv_bridge() is not None) is used
    finally:
        decode.cv_bridge.cache_clear()


# joints, vectors, stamps ---------------------------------------------------------------------


def test_joints_are_matched_by_name_and_turned_into_si():
    found = decode_joints(joint_state(['b', 'x', 'a'], [20.0, math.nan, 0.5]), joints())
    np.testing.assert_allclose(found, [0.5, 0.02])


@given(st.permutations(['a', 'b', 'c', 'd']))
def test_order_in_the_message_does_not_matter(order):
    values = {'a': 1.0, 'b': 2.0, 'c': 3.0, 'd': 4.0}
    wanted = joints(('a', 'b', 'c', 'd'), ('rad',) * 4)
    found = decode_joints(joint_state(order, [values[name] for name in order]), wanted)
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(('names', 'positions', 'sentence'), [
    (['a', 'c'], [0.0, 0.0], 'b is missing; the message names a, c'),
    (['a', 'b', 'a'], [0.0, 0.0, 0.0], 'a is named more than once'),
    (['a', 'b'], [0.0], '2 names but 1 positions'),
    (['a', 'b'], [], '2 names but 0 positions'),
    (['a', 'b'], [0.0, math.nan], 'position of b is not finite'),
    (['a', 'b'], [math.inf, 0.0], 'position of a is not finite'),
])
def test_bad_joint_states_are_refused(names, positions, sentence):
    with pytest.raises(DecodeError, match=sentence):
        decode_joints(joint_state(names, positions), joints())


@given(st.floats(-1e6, 1e6), st.sampled_from(sorted(decode.UNITS)))
def test_units_survive_a_round_trip(value, unit):
    found = decode_joints(joint_state(['a'], [value]), joints(('a',), (unit,)))
    assert found[0] / decode.UNITS[unit] == pytest.approx(value)


def test_vector_of_another_size_is_refused():
    with pytest.raises(DecodeError, match='2 values; the contract says 3'):
        decode_vector(SimpleNamespace(data=array.array('d', [1, 2])), Vector('f', 'force', 3))


def test_vector_that_is_not_finite_is_refused():
    with pytest.raises(DecodeError, match='is not finite'):
        decode_vector(SimpleNamespace(data=array.array('d', [1, math.nan])), Vector('f', 't', 2))


def test_vector_is_a_copy_of_the_message():
    message = SimpleNamespace(data=array.array('d', [1, 2]))
    found = decode_vector(message, Vector('f', 'force', 2))
    message.data[0] = 9
    assert found.tolist() == [1.0, 2.0]


def test_stamp_is_seconds_and_nanoseconds():
    assert decode.stamp_ns(header(5, 7), 'camera') == 5_000_000_007


def test_zero_stamp_is_refused():
    with pytest.raises(DecodeError, match='must stamp each message'):
        decode.stamp_ns(header(0, 0), 'camera')
