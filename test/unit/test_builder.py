# SPDX-License-Identifier: Apache-2.0
"""builder.py: the newest of each input becomes an Observation."""

import array
from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.contract import parse_contract
from quantvla_ros.decode import DecodeError

CONTRACT = {
    'contract': 1, 'robot': 'r', 'policy': 'hold', 'instruction': {'default': 'stay'},
    'cameras': {'front': {'topic': 'front', 'width': 4, 'height': 2,
                          'policy': {'width': 2, 'height': 2}}},
    'joints': {'names': ['a', 'b'], 'topic': 'joint_states', 'units': 'rad'},
    'vectors': {'force': {'topic': 'force', 'size': 1}},
    'action': {'kind': 'absolute', 'joints': ['a'], 'horizon': 4, 'rate_hz': 10.0},
    'controller': {'kind': 'forward_command', 'topic': 'c', 'joints': ['a']},
}


def header(stamp_ns):
    return SimpleNamespace(stamp=SimpleNamespace(sec=stamp_ns // 10**9, nanosec=stamp_ns % 10**9))


def picture(value=0, stamp_ns=1, width=4):
    return SimpleNamespace(header=header(stamp_ns), width=width, height=2, encoding='rgb8',
                           step=3 * width, is_bigendian=0, data=bytes([value]) * (6 * width))


def joint_state(a=0.0, b=0.0, stamp_ns=1):
    return SimpleNamespace(header=header(stamp_ns), name=['b', 'a'],
                           position=array.array('d', [b, a]))


@pytest.fixture
def builder():
    return ObservationBuilder(parse_contract(CONTRACT))


def fill(builder):
    builder.put_camera('front', picture(7, 30))
    builder.put_joints(joint_state(0.1, 0.2, 40))
    builder.put_vector('force', SimpleNamespace(data=array.array('d', [3.0])), 50)


def test_every_missing_input_is_named_with_its_topic(builder):
    assert builder.missing() == ("camera 'front' on 'front'", "joint states on 'joint_states'",
                                 "vector 'force' on 'force'")
    with pytest.raises(ValueError, match='front.*joint states.*force'):
        builder.build()


def test_observation_holds_the_newest_of_each_with_its_stamp(builder):
    fill(builder)
    builder.put_camera('front', picture(9, 60))
    found = builder.build()
    assert found.images['front'].shape == (2, 2, 3)
    assert (found.images['front'] == 9).all()
    assert found.image_stamps_ns == {'front': 60}
    assert found.joint_positions.tolist() == [0.1, 0.2]
    assert (found.joint_stamp_ns, found.vector_stamps_ns) == (40, {'force': 50})
    assert found.vectors['force'].tolist() == [3.0]
    assert found.instruction == 'stay'


def test_refused_message_leaves_the_one_before_in_place(builder):
    fill(builder)
    with pytest.raises(DecodeError, match='size is 5x2'):
        builder.put_camera('front', picture(1, 70, width=5))
    assert builder.build().image_stamps_ns == {'front': 30}


def test_pictures_are_decoded_once_however_often_they_are_used(builder):
    fill(builder)
    assert np.shares_memory(builder.build().images['front'], builder.build().images['front'])


def test_clear_forgets_messages_and_keeps_the_instruction(builder):
    fill(builder)
    builder.instruction = 'go'
    builder.clear()
    assert len(builder.missing()) == 3
    assert builder.instruction == 'go'


def test_the_pose_is_the_one_that_the_picture_shows(builder):
    fill(builder)
    for number, stamp_ns in enumerate((50, 60, 70, 80), 1):
        builder.put_joints(joint_state(number, 0.0, stamp_ns))
    assert builder.build().joint_stamp_ns == 40  # before any: the picture is of 30
    builder.put_camera('front', picture(9, 64))
    found = builder.build()
    assert (found.joint_stamp_ns, found.joint_positions[0]) == (60, 2.0)
    builder.put_camera('front', picture(9, 66))
    assert builder.build().joint_stamp_ns == 70
    builder.put_camera('front', picture(9, 200))
    assert builder.build().joint_stamp_ns == 80
    assert builder.joint_positions()[1] == 80  # what control measures is the newest


def test_oldest_of_the_pictures_decides():
    two = {**CONTRACT, 'cameras': {**CONTRACT['cameras'], 'wrist': {
        'topic': 'wrist', 'width': 4, 'height': 2, 'policy': {'width': 2, 'height': 2}}}}
    builder = ObservationBuilder(parse_contract(two))
    assert builder.shown_ns() == 0
    fill(builder)
    builder.put_joints(joint_state(0.0, 0.0, 90))
    builder.put_camera('wrist', picture(1, 95))
    assert builder.build().joint_stamp_ns == 40
    assert builder.shown_ns() == 30
    builder.put_camera('front', picture(7, 96))
    assert builder.shown_ns() == 95


def test_poses_are_kept_for_a_while_and_none_from_before_a_clock_went_back(builder):
    fill(builder)
    for tenth in range(1, 60):
        builder.put_joints(joint_state(0.0, 0.0, tenth * 10**8))
    assert builder.build().joint_stamp_ns == 39 * 10**8
    builder.put_joints(joint_state(0.5, 0.0, 10**8))
    assert builder.build().joint_stamp_ns == 10**8
