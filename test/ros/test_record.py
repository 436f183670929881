# SPDX-License-Identifier: Apache-2.0
"""What is recorded over DDS comes back byte for byte; a bag is never left half written."""

import errno
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.parameters import yaml_text
from quantvla_ros.nodes.recording import (
    MB,
    RECORD_NODE,
    RESERVE_BYTES,
    Limits,
    Recording,
    RecordingError,
    ReservedFile,
    Topic,
    new_bag,
    recorded_topics,
)
from quantvla_ros.resources import share_path

rosbag2 = pytest.importorskip('rosbags.rosbag2', reason='rosbags is not installed')
FREE = Limits(min_free_bytes=0)
STRING = {'/text': Topic('std_msgs/msg/String')}
IMAGE = {'/image': Topic('sensor_msgs/msg/Image', reliable=False)}


def contents(path):
    with rosbag2.Reader(path) as reader:
        return [(c.topic, stamp, bytes(data)) for c, stamp, data in reader.messages()]


def frames(count, size=921_600):
    return [np.random.default_rng(i).bytes(size) for i in range(count)]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_bytes_come_back_in_order_with_their_stamps(tmp_path):
    recording = Recording(tmp_path / 'bag', IMAGE, FREE)
    data = frames(5)
    for i, frame in enumerate(data):
        assert recording.offer('/image', 100 + i, frame)
    report = recording.stop()
    assert contents(tmp_path / 'bag') == [('/image', 100 + i, f) for i, f in enumerate(data)]
    assert (report.cause, report.messages, report.indexed) == ('', {'/image': 5}, True)
    assert sorted(os.listdir(tmp_path / 'bag')) == ['bag.mcap', 'metadata.yaml']


def test_offered_qos_is_kept_for_replay(tmp_path):
    topics = {'/latched': Topic('std_msgs/msg/String', latched=True), **IMAGE}
    Recording(tmp_path / 'bag', topics, FREE).stop()
    with rosbag2.Reader(tmp_path / 'bag') as reader:
        qos = {c.topic: c.ext.offered_qos_profiles[0] for c in reader.connections}
    assert qos['/latched'].durability.name == 'TRANSIENT_LOCAL'
    assert qos['/image'].durability.name == 'VOLATILE'
    assert qos['/image'].reliability.name == 'BEST_EFFORT'


def test_full_queue_drops_and_counts_and_never_blocks(tmp_path, monkeypatch):
    taken, go = threading.Event(), threading.Event()
    original = Recording._write

    def slow(self, *item):
        taken.set()
        go.wait(20)
        original(self, *item)

    monkeypatch.setattr(Recording, '_write', slow)
    recording = Recording(tmp_path / 'bag', STRING, Limits(queue_bytes=100, min_free_bytes=0))
    assert recording.offer('/text', 1, bytes(60))
    assert taken.wait(20)  # the first is with the disk; the queue is empty again
    assert recording.offer('/text', 2, bytes(60))
    assert not recording.offer('/text', 3, bytes(60))
    go.set()
    report = recording.stop()
    assert report.dropped == {'/text': 1}
    assert [stamp for _, stamp, _ in contents(tmp_path / 'bag')] == [1, 2]


def test_unwritable_folder_is_refused_with_the_way_out(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(RecordingError, match='cannot write a bag at .* folder'):
        Recording(tmp_path / 'file' / 'bag', STRING, FREE)


def test_recording_does_not_start_on_a_nearly_full_disk(tmp_path):
    with pytest.raises(RecordingError, match='less than min_free_mb'):
        Recording(tmp_path / 'bag', STRING, Limits(min_free_bytes=10**18))
    assert not (tmp_path / 'bag').exists()


def test_recording_stops_when_the_free_space_falls_below_the_limit(tmp_path, monkeypatch):
    recording = Recording(tmp_path / 'bag', STRING, FREE)
    recording.offer('/text', 1, bytes(10))
    assert wait_for(lambda: recording.report.messages)
    monkeypatch.setattr(recording, '_limits', Limits(min_free_bytes=10**18))
    assert wait_for(lambda: recording.report.closed)
    assert 'less than min_free_mb' in recording.stop().cause
    assert len(contents(tmp_path / 'bag')) == 1


def test_disk_full_at_the_real_write_costs_the_reserve_and_closes_a_whole_bag(
    tmp_path, monkeypatch
):
    """The disk takes 3 MB, half of the next write, and no more until the reserve is freed."""
    recording = Recording(tmp_path / 'bag', IMAGE, FREE)
    reserve = tmp_path / 'bag' / 'reserve.tmp'
    assert reserve.stat().st_size == RESERVE_BYTES
    put = ReservedFile._put

    def put_until_full(self, data):
        room = 3 * MB - self.tell()
        if not reserve.exists() or len(data) <= room:
            return put(self, data)
        if room > 0:
            return put(self, memoryview(data)[:room])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ReservedFile, '_put', put_until_full)
    data = frames(8)
    for i, frame in enumerate(data):
        recording.offer('/image', i, frame)
    assert wait_for(lambda: recording.report.closed)
    report = recording.stop()
    assert 'disk full' in report.cause
    assert report.indexed
    found = contents(tmp_path / 'bag')
    assert 3 <= len(found) < 8
    assert len(found) == report.messages['/image']
    assert found == [('/image', i, frame) for i, frame in enumerate(data)][: len(found)]


RECORD_UNTIL_IT_STOPS = """
import resource, signal, sys
from pathlib import Path
from quantvla_ros.nodes.recording import Limits, Recording, Topic
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recording = Recording(Path(sys.argv[1]), {'/image': Topic('sensor_msgs/msg/Image')},
                      Limits(min_free_bytes=0))
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
for i in range(60):
    recording.offer('/image', i, bytes([i]) * 921_600)
report = recording.stop()
print(report.cause, report.indexed, sum(report.messages.values()), sep='|')
"""


def test_file_that_may_not_grow_keeps_every_whole_chunk(tmp_path):
    """A file size limit (a FAT stick has one) leaves no room for an index: readers scan it."""
    done = subprocess.run(
        [sys.executable, '-c', RECORD_UNTIL_IT_STOPS, tmp_path / 'bag', str(10 * MB)],
        capture_output=True, text=True, timeout=60, check=True)
    cause, indexed, written = done.stdout.strip().split('|')
    assert 'File too large' in cause
    assert indexed == 'False'
    assert os.listdir(tmp_path / 'bag') == ['bag.mcap']
    found = contents(tmp_path / 'bag' / 'bag.mcap')
    assert 8 <= len(found) <= int(written)
    assert all(data == bytes([stamp]) * 921_600 for _, stamp, data in found)


def test_small_file_system_that_fills_up_leaves_a_whole_bag(tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    script = (f'mount -t tmpfs -o size=30m tmpfs {disk} && "{sys.executable}" -c "$CODE" '
              f'{disk}/bag && cp -r {disk}/bag {tmp_path}/kept')
    done = subprocess.run(
        ['unshare', '--mount', 'sh', '-c', script], capture_output=True, text=True, timeout=60,
        env={**os.environ, 'CODE': RECORD_UNTIL_IT_STOPS})
    if done.returncode and ('permitted' in done.stderr or 'permission' in done.stderr):
        pytest.skip(f'no small file system can be mounted here: {done.stderr.strip()}')
    assert done.returncode == 0, done.stderr
    cause, indexed, written = done.stdout.strip().split('|')
    assert 'No space left' in cause
    assert indexed == 'True'
    found = contents(tmp_path / 'kept')
    assert len(found) == int(written) > 8
    assert all(data == bytes([stamp]) * 921_600 for _, stamp, data in found)


def test_second_recording_gets_a_folder_of_its_own(tmp_path):
    assert new_bag(str(tmp_path / 'bag')) == tmp_path / 'bag'
    (tmp_path / 'bag').mkdir()
    assert new_bag(str(tmp_path / 'bag')) == tmp_path / 'bag_2'


def test_recording_holds_inputs_commands_plan_and_status():
    topics = recorded_topics(load_contract('libero_panda'))
    assert topics['agentview/image_raw'] == 'sensor_msgs/msg/Image'
    assert topics['joint_states'] == 'sensor_msgs/msg/JointState'
    assert topics['arm_controller/commands'] == 'std_msgs/msg/Float64MultiArray'
    assert {'policy_node/chunk', 'policy_node/status', 'instruction'} <= set(topics)


def test_parameter_file_is_the_table():
    assert share_path('config/record_node.yaml').read_text() == yaml_text(RECORD_NODE)
