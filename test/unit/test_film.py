# SPDX-License-Identifier: Apache-2.0
"""Film and plot show what the bag holds, through the decode of the policy."""

from dataclasses import replace

import numpy as np
import pytest

from quantvla_ros.contract import load_contract
from quantvla_ros.film import Span, film, plot, read_footage
from quantvla_ros.nodes.recording import Limits, Recording, Topic, recorded_topics

pytest.importorskip('rosbags', reason='rosbags is not installed')
SECOND = 1_000_000_000


@pytest.fixture
def bag(tmp_path):
    """One second at 10 Hz: pictures that grow brighter, an arm that is 0.1 rad late."""
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_JAZZY)
    types = store.types
    contract = load_contract('libero_panda')
    topics = {f'/{n}'.replace('//', '/'): Topic(t) for n, t in recorded_topics(contract).items()}
    recording = Recording(tmp_path / 'bag', topics, Limits(min_free_bytes=0))

    def put(topic, kind, at, **fields):
        message = types[kind](**fields)
        recording.offer(f'/{topic}', at, bytes(store.serialize_cdr(message, kind)))

    time, header = types['builtin_interfaces/msg/Time'], types['std_msgs/msg/Header']
    for i in range(11):
        at = SECOND + i * SECOND // 10
        head = header(stamp=time(sec=at // SECOND, nanosec=at % SECOND), frame_id='')
        for camera in contract.cameras:
            put(camera.topic, camera.type, at, header=head, height=camera.height,
                width=camera.width, encoding='rgb8', is_bigendian=0, step=3 * camera.width,
                data=np.full(camera.height * camera.width * 3, 20 * i, np.uint8))
        put(contract.joints.topic, 'sensor_msgs/msg/JointState', at, header=head,
            name=list(contract.joints.names), position=np.full(9, 0.5), velocity=np.zeros(0),
            effort=np.zeros(0))
        layout = types['std_msgs/msg/MultiArrayLayout'](dim=[], data_offset=0)
        put(contract.controller.topic, 'std_msgs/msg/Float64MultiArray', at, layout=layout,
            data=np.full(8, 0.6))
    assert recording.stop().cause == ''
    return tmp_path / 'bag', contract


SPAN = Span('pick up the soup', SECOND, 2 * SECOND, True)


def test_footage_holds_pictures_and_joints_of_the_span_only(bag):
    path, contract = bag
    footage = read_footage(path, contract, replace(SPAN, end_ns=SECOND + SECOND // 2))
    assert [int(p[0, 0, 0]) for _, p in footage.pictures['wrist']] == [0, 20, 40, 60, 80]
    assert footage.measured[0][1].tolist() == [0.5] * 9
    assert footage.commanded[0][1].tolist() == [0.6] * 8


def test_film_shows_both_cameras_side_by_side_over_time(bag, tmp_path):
    from PIL import Image

    path, contract = bag
    assert film(path, contract, [SPAN], tmp_path / 'film.gif') == 10
    with Image.open(tmp_path / 'film.gif') as image:
        assert image.n_frames == 10
        assert image.size == (2 * 2 * (128 + 4), 34 + 2 * 128)
        image.seek(9)
        left, right = (image.convert('RGB').getpixel((x, 150)) for x in (60, 60 + 264))
    assert left == right
    assert abs(left[0] - 180) < 12


def test_plot_tells_the_largest_distance_between_command_and_measurement(bag, tmp_path):
    path, contract = bag
    assert plot(path, contract, SPAN, tmp_path / 'joints.png') == pytest.approx(0.1)
    assert (tmp_path / 'joints.png').stat().st_size > 10_000


def test_span_without_joints_is_refused(bag, tmp_path):
    path, contract = bag
    with pytest.raises(ValueError, match='holds no commands'):
        plot(path, contract, replace(SPAN, start_ns=3 * SECOND, end_ns=4 * SECOND),
             tmp_path / 'joints.png')
