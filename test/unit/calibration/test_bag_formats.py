# SPDX-License-Identifier: Apache-2.0
"""What recorders really leave: splits, files without index, old metadata, namespaces, pieces."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from bag_maker import (
    CONTRACT,
    DATA,
    STORE,
    Scene,
    jpeg,
    make,
    picture,
    record,
    script,
    storage_file,
    write,
)
from mcap_surgery import without_chunks, without_end, without_message_index
from rosbags.rosbag2 import CompressionMode, StoragePlugin

from quantvla_ros.calibration.bags import ReadOptions, observations
from quantvla_ros.calibration.frames import FrameSettings, frames_digest, frames_of
from quantvla_ros.contract import parse_contract

STORAGES = list(StoragePlugin)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    return record(tmp_path_factory.mktemp('plain') / 'bag')


def seen(path, contract=CONTRACT, **options):
    return list(observations(path, contract, ReadOptions(**options)))


def digest_of(path, contract=CONTRACT, **options):
    return frames_digest([seen(path, contract, **options)])


@pytest.mark.parametrize('storage', STORAGES, ids=lambda v: v.name.lower())
def test_single_file_needs_no_directory(plain, tmp_path, storage):
    file = storage_file(record(tmp_path / 'bag', storage=storage))
    assert digest_of(file) == digest_of(plain)


@pytest.mark.parametrize('storage', STORAGES, ids=lambda v: v.name.lower())
@pytest.mark.parametrize('mode', [CompressionMode.FILE, CompressionMode.MESSAGE],
                         ids=lambda v: v.name.lower())
def test_single_compressed_file_needs_no_metadata(plain, tmp_path, storage, mode):
    file = storage_file(record(tmp_path / 'bag', storage=storage, mode=mode))
    assert digest_of(file) == digest_of(plain)


@pytest.mark.parametrize('cut', [
    without_chunks,
    lambda data: without_chunks(data, summary=False),
    without_message_index,
], ids=['fastwrite', 'no summary', 'no message index'])
def test_files_without_a_message_index_are_scanned_whole(plain, tmp_path, cut):
    file = tmp_path / 'fast.mcap'
    file.write_bytes(cut(storage_file(plain).read_bytes()))
    assert digest_of(file) == digest_of(plain)


def test_bag_of_a_killed_recorder_is_refused_and_told_and_usable_on_request(plain, tmp_path):
    """Neither metadata.yaml nor an index nor an end, as after a kill."""
    bag = tmp_path / 'bag'
    bag.mkdir()
    (bag / 'bag_0.mcap').write_bytes(without_end(storage_file(plain).read_bytes()))
    with pytest.raises(ValueError, match=r'cut off.*502 messages over 10\.0 s.*100 of /front/im'):
        frames_of(bag, CONTRACT)
    assert digest_of(bag, partial=True) == digest_of(plain)
    found = frames_of(bag, CONTRACT, FrameSettings(20, 5, read=ReadOptions(partial=True)))
    assert 'no end' in found.facts['damage'][0]
    assert not found.facts['closed']


def split(tmp_path, storage, parts=3):
    """Write one scene as a bag of several files, joined under one metadata.yaml."""
    messages, bag = list(script()), tmp_path / 'split'
    bag.mkdir()
    size = -(-len(messages) // parts)
    for i in range(parts):
        part = write(tmp_path / f'split_{i + 8}', messages[i * size : (i + 1) * size],
                     storage=storage)
        file = storage_file(part)
        shutil.move(file, bag / file.name)
        metadata = part / 'metadata.yaml'
    data = yaml.safe_load(metadata.read_text())
    data['rosbag2_bagfile_information']['relative_file_paths'] = [
        f'split_{i + 8}{file.suffix}' for i in range(parts)]
    (bag / 'metadata.yaml').write_text(yaml.safe_dump(data))
    return bag


@pytest.mark.parametrize('storage', STORAGES, ids=lambda v: v.name.lower())
def test_several_files_are_read_in_their_order(plain, tmp_path, storage):
    bag = split(tmp_path, storage)
    assert digest_of(bag) == digest_of(plain)
    (bag / 'metadata.yaml').unlink()  # 10 comes behind 9, not before
    assert digest_of(bag) == digest_of(plain)


def test_missing_file_of_several_is_named(tmp_path):
    bag = split(tmp_path, StoragePlugin.MCAP)
    (bag / 'split_9.mcap').unlink()
    with pytest.raises(ValueError, match=r'lacks split_9\.mcap'):
        frames_of(bag, CONTRACT)


QOS = {'history': 3, 'depth': 0, 'reliability': 1, 'durability': 2,
       'deadline': {'sec': 9223372036, 'nsec': 854775807},
       'lifespan': {'sec': 9223372036, 'nsec': 854775807}, 'liveliness': 1,
       'liveliness_lease_duration': {'sec': 9223372036, 'nsec': 854775807},
       'avoid_ros_namespace_conventions': False}
WORDS = {**QOS, 'history': 'unknown', 'reliability': 'reliable', 'durability': 'volatile',
         'liveliness': 'automatic'}


@pytest.mark.parametrize('version', [4, 5, 6, 7, 8, 9])
def test_metadata_of_every_version_is_read(plain, tmp_path, version):
    """As rosbag2 writes it: offers as a string of YAML before 9, as a list of words from 9 on."""
    bag = tmp_path / 'stock'
    bag.mkdir()
    shutil.copy(storage_file(plain), bag / 'stock_0.mcap')
    data = yaml.safe_load((plain / 'metadata.yaml').read_text())
    info = data['rosbag2_bagfile_information']
    info.update(version=version, relative_file_paths=['stock_0.mcap'], compression_format='',
                compression_mode='')
    for topic in info['topics_with_message_count']:
        topic['topic_metadata']['offered_qos_profiles'] = (
            [WORDS] if version > 8 else yaml.safe_dump([QOS]))
        if version < 7:
            topic['topic_metadata'].pop('type_description_hash')
    for key, since in (('files', 5), ('custom_data', 6), ('ros_distro', 8)):
        if version < since:
            info.pop(key, None)
    (bag / 'metadata.yaml').write_text(yaml.safe_dump(data))
    assert digest_of(bag) == digest_of(plain)


@pytest.mark.parametrize('words, sentence', [
    ('rosbag2_bagfile_information: [', 'metadata.yaml is damaged.*reindex'),
    ('rosbag2_bagfile_information: {version: 9}', "damaged.*'relative_file_paths'"),
    ('{rosbag2_bagfile_information: {relative_file_paths: [bag.mcap], storage_identifier: mcap, '
     'compression_mode: FILE, compression_format: lz9}}', "compressed by 'lz9'"),
    ('{rosbag2_bagfile_information: {relative_file_paths: [], storage_identifier: mcap}}',
     'lacks any file'),
])
def test_damaged_metadata_is_refused_with_a_way_out(plain, tmp_path, words, sentence):
    bag = shutil.copytree(plain, tmp_path / 'bag')
    (bag / 'metadata.yaml').write_text(words)
    with pytest.raises(ValueError, match=sentence):
        frames_of(bag, CONTRACT)


def test_metadata_cannot_point_out_of_the_bag(plain, tmp_path):
    bag = shutil.copytree(plain, tmp_path / 'bag')
    text = (bag / 'metadata.yaml').read_text()
    (bag / 'metadata.yaml').write_text(text.replace('- bag.mcap', f'- {plain}/../bag/other.mcap'))
    with pytest.raises(ValueError, match=r'lacks other\.mcap'):
        frames_of(bag, CONTRACT)


def test_namespace_of_the_only_robot_is_found(plain, tmp_path):
    bag = record(tmp_path / 'bag', Scene(space='/lab/left'))
    assert digest_of(bag) == digest_of(plain)


def test_two_robots_in_a_bag_need_a_namespace(plain, tmp_path):
    both = sorted(((stamp, space, topic, message) for space in ('/left', '/right')
                   for topic, stamp, message in script()), key=lambda item: item[:3])
    bag = write(tmp_path / 'bag', [(f'{space}/{topic}'.lstrip('/'), stamp, message)
                                   for stamp, space, topic, message in both])
    with pytest.raises(ValueError, match='2 robots, under /left, /right'):
        frames_of(bag, CONTRACT)
    assert digest_of(bag, namespace='right') == digest_of(plain)


def test_only_topics_of_the_contract_are_read(plain, tmp_path):
    lidar = make('std_msgs/msg/String', data='x' * 1000)
    extra = [('lidar', stamp, lidar) for _, stamp, _ in script(Scene(frames=20))]
    messages = sorted([*script(), *extra], key=lambda item: item[1])
    assert digest_of(write(tmp_path / 'bag', messages)) == digest_of(plain)


def test_reading_leaves_the_bag_as_it_was(tmp_path):
    for storage in STORAGES:
        bag = record(tmp_path / storage.name, storage=storage)
        before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in bag.iterdir()}
        frames_of(bag, CONTRACT, FrameSettings(20, 5))
        assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in bag.iterdir()} == before


def test_compressed_pictures_are_decoded_as_live(tmp_path):
    cameras = {name: {**part, 'type': 'sensor_msgs/msg/CompressedImage', 'encoding': 'jpeg'}
               for name, part in DATA['cameras'].items()}
    contract = parse_contract({**DATA, 'cameras': cameras})
    messages = [(topic, stamp, jpeg(i, stamp) if 'image' in topic else message)
                for i, (topic, stamp, message) in enumerate(script())]
    found = seen(write(tmp_path / 'bag', messages), contract)
    assert len(found) == 100
    assert found[0].images['front'].shape == (8, 8, 3)


def test_instructions_change_where_the_bag_says_so(plain):
    found = seen(plain)
    assert [one.instruction for one in found] == ['pick'] * 50 + ['place'] * 50


def test_moments_before_the_first_instruction_are_not_used(tmp_path):
    messages = [(t, stamp + (2 * 10**9 if t == 'instruction' else 0), m)
                for t, stamp, m in script(Scene(instructions=('pick',)))]
    bag = write(tmp_path / 'bag', sorted(messages, key=lambda item: item[1]))
    found = frames_of(bag, CONTRACT, FrameSettings(20, 5))
    assert found.rejected['before the first instruction'] == 20
    assert set(found.facts['instructions']['fit']) == {'pick'}


def test_bag_without_instruction_uses_the_default_of_the_contract(tmp_path):
    bag = record(tmp_path / 'bag', Scene(without=('instruction',)))
    assert {one.instruction for one in seen(bag)} == {'stay'}
    silent = replace(CONTRACT, instruction='')
    with pytest.raises(ValueError, match="no topic 'instruction' and the contract no default"):
        seen(bag, silent)


def test_pictures_and_joints_are_paired_by_stamp_within_their_age(tmp_path):
    """Joints stop for half a second: the moments after 0.1 s of it are not used, and counted."""
    messages = [item for item in script()
                if item[0] != 'joint_states' or not 3.0 <= (item[1] - 17 * 10**17) / 1e9 < 3.5]
    found = frames_of(write(tmp_path / 'bag', messages), CONTRACT, FrameSettings(20, 5))
    assert found.rejected == {'joint states: older than max_age_s beside the others': 4}
    for one in (*found.fit, *found.held_out):
        assert one.spread_ns() <= 0.1 * 10**9


def test_message_that_is_no_message_is_counted_and_passed(tmp_path, monkeypatch):
    broken = STORE.serialize_cdr

    def serialize(message, kind):
        data = bytes(broken(message, kind))
        return data[:20] if kind.endswith('Image') and message.header.stamp.sec % 5 == 0 else data

    monkeypatch.setattr(STORE, 'serialize_cdr', serialize)
    bag = record(tmp_path / 'bag')
    found = frames_of(bag, CONTRACT, FrameSettings(20, 5))
    assert found.rejected['/front/image: a message that cannot be decoded'] == 20


def test_picture_of_the_contract_is_the_one_that_was_sent(plain):
    first = seen(plain)[0]
    assert first.image_stamps_ns['front'] == 17 * 10**17
    sent = picture(0, 0).data.reshape(12, 16, 3)
    assert abs(int(sent.mean()) - int(first.images['front'].mean())) <= 1


def test_vector_that_falls_silent_is_not_paired_with_later_pictures(tmp_path):
    contract = parse_contract({**DATA, 'vectors': {'force': {'topic': 'force', 'size': 1}}})
    layout = make('std_msgs/msg/MultiArrayLayout', dim=[], data_offset=0)
    force = [('force', stamp, make('std_msgs/msg/Float64MultiArray', layout=layout,
                                   data=np.array([1.5])))
             for topic, stamp, _ in script() if topic == 'joint_states' and stamp < 17e17 + 5e9]
    messages = sorted([*script(), *force], key=lambda item: item[1])
    bag = write(tmp_path / 'bag', messages)
    found = frames_of(bag, contract, FrameSettings(20, 5))
    assert found.rejected == {"vector 'force': older than max_age_s beside the others": 48}
    assert found.fit[0].vectors['force'].tolist() == [1.5]


def test_a_slow_machine_may_pair_what_is_further_apart(tmp_path):
    """As the node's parameters freshness.joints_max_age_s and camera_max_age_s allow it live."""
    messages = [item for item in script()
                if item[0] != 'joint_states' or not 3.0 <= (item[1] - 17 * 10**17) / 1e9 < 3.5]
    bag = write(tmp_path / 'bag', messages)
    assert len(seen(bag)) == 96
    assert len(seen(bag, joints_max_age_s=0.5)) == 100
    assert len(seen(bag, joints_max_age_s=0.03, camera_max_age_s=0.5)) == 95
