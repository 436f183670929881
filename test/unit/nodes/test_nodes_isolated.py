# SPDX-License-Identifier: Apache-2.0
"""A policy in a process of its own: it answers as at home, and its end is nobody else's."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from isolated_policy import IsolatedPolicy

from quantvla_ros.action import ActionChunk
from quantvla_ros.nodes.isolated import OVERHEAD_BYTES, PolicyServer
from quantvla_ros.nodes.parcel import (
    chunk_of,
    observation_of,
    pack,
    pack_chunk,
    pack_observation,
    receive,
    send,
    unpack,
)
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import POLICIES, DeviceError, PolicyFailedError, PolicySettings

PATIENCE_S = 60.0
PID, LOADED_AT, SERVED_AT = 0, 1, 2
HERE = str(Path(__file__).parent)
NODE = """
import sys, time
sys.path.insert(0, {here!r})
from test_nodes_isolated import POLICIES, PolicyServer, PolicySettings, answer
server = PolicyServer('isolated', None, 'libero_panda')
policy = server.make(PolicySettings())
print(server._popen.pid, int(answer(policy)[0]), flush=True)
time.sleep(600)
"""
POLICIES.setdefault('isolated', 'isolated_policy:IsolatedPolicy')


@pytest.fixture(scope='module')
def server():
    sys.path.insert(0, HERE)
    made = PolicyServer('isolated', None, 'libero_panda')
    yield made
    made.close()
    sys.path.remove(HERE)


def observation():
    drawn = np.random.default_rng(0)
    return Observation(
        images={'front': drawn.integers(0, 256, (6, 8, 3), np.uint8)},
        image_stamps_ns={'front': 2**60 + 1}, joint_names=('shoulder', 'elbow'),
        joint_positions=drawn.normal(size=2), joint_stamp_ns=2**60 + 3, instruction='lift “it”',
        vectors={'force': drawn.normal(size=3)}, vector_stamps_ns={'force': 5})


def answer(policy, seed=7, prefix=None):
    return policy.denoise(policy.prepare(observation()), seed, prefix).positions[0]


def gone(pid):
    """Wait until a process is no more."""
    end = time.monotonic() + PATIENCE_S
    while Path(f'/proc/{pid}').exists():
        state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
        if state == 'Z':
            return
        assert time.monotonic() < end, f'{pid} is still there'
        time.sleep(0.01)


def test_observation_arrives_to_the_last_bit():
    sent = observation()
    got = observation_of(*unpack(b''.join(pack_observation(sent))))
    assert got.images['front'].tobytes() == sent.images['front'].tobytes()
    assert got.joint_positions.tobytes() == sent.joint_positions.tobytes()
    assert got.vectors['force'].tobytes() == sent.vectors['force'].tobytes()
    for name in ('image_stamps_ns', 'vector_stamps_ns', 'joint_names', 'joint_stamp_ns',
                 'instruction'):
        assert getattr(got, name) == getattr(sent, name)


def test_chunk_arrives_to_the_last_bit_also_where_it_is_not_a_number():
    sent = ActionChunk(('a', 'b'), np.array([[np.nan, 1 / 3], [-0.0, np.inf]]), 2**60 + 1, 0.05)
    got = chunk_of(*unpack(b''.join(pack_chunk(sent))))
    assert got.positions.tobytes() == sent.positions.tobytes()
    assert (got.joint_names, got.stamp_ns, got.step_dt_s) == (('a', 'b'), 2**60 + 1, 0.05)
    assert chunk_of(*unpack(b''.join(pack_chunk(None)))) is None


def test_parcels_go_through_a_socket_that_takes_little_at_a_time():
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    near.settimeout(10)  # which makes a call send what fits
    rng = np.random.default_rng(0)
    sent = {'large': rng.integers(0, 256, (64, 4099, 3), dtype=np.uint8),
            'none': np.zeros((0, 3)), 'one': np.array([0.1]), 'turned': rng.random((5, 7)).T}
    with near, far, ThreadPoolExecutor(1) as pool:
        for turn in range(3):
            waiting = pool.submit(receive, far)
            send(near, pack({'turn': turn}, sent))
            head, got = unpack(waiting.result(10))
            assert head == {'turn': turn} and not got['large'].flags.writeable
            for name, array in sent.items():
                assert got[name].dtype == array.dtype and np.array_equal(got[name], array)
        waiting = pool.submit(receive, far)
        near.shutdown(socket.SHUT_RDWR)
        with pytest.raises(EOFError, match='gone'):
            waiting.result(10)


def test_policy_answers_from_another_process_what_it_answers_here(server):
    policy, home = server.make(PolicySettings()), IsolatedPolicy(None, PolicySettings())
    prefix = ActionChunk(('a',), np.array([[1.5]]), 1, 0.1)
    for given in (None, prefix):
        there, here = answer(policy, 7, given), answer(home, 7, given)
        assert there[PID] != os.getpid()
        np.testing.assert_array_equal(there[SERVED_AT + 1:], here[SERVED_AT + 1:])


def test_it_loads_at_the_priority_asked_for_and_serves_above_it(server):
    told = answer(server.make(PolicySettings(), nice=17))
    assert told[LOADED_AT] == 17
    assert told[SERVED_AT] < 10


@pytest.mark.parametrize('threads', [1, 3])
def test_it_serves_with_as_many_threads_as_it_was_loaded_with(server, threads):
    """Sums in another order are other bits, and OpenMP counts for each thread."""
    policy = server.make(PolicySettings(precision='counts', threads=threads))
    assert answer(policy).tolist() == [threads]


def test_what_the_node_must_know_of_a_policy_comes_with_it(server):
    policy = server.make(PolicySettings())
    assert policy.calibrated == 'monday'
    assert policy.calibration.activations['layer'].tolist() == [0.5, 1.0, 2.0]
    with policy.watching(3) as seen:
        answer(policy)
    assert (seen.inputs, seen.spreads, seen.partial) == ({'layer': 5.0}, {}, frozenset('x'))
    assert server.look(PolicySettings()).nbytes == 1000 + OVERHEAD_BYTES


@pytest.mark.parametrize(('precision', 'kind', 'words'), [
    ('refuses', ValueError, 'no word is known'), ('misses', FileNotFoundError, 'no weights'),
    ('breaks', PolicyFailedError, 'RuntimeError: a bug'), ('loses', DeviceError, 'is lost'),
])
def test_error_arrives_as_what_it_was_and_the_policy_goes_on(server, precision, kind, words):
    policy = server.make(PolicySettings(precision=precision))
    for _ in range(2):
        with pytest.raises(kind, match=words):
            policy.prepare(observation())


def test_policy_that_cannot_be_made_is_refused_in_its_own_words(server):
    with pytest.raises(ValueError, match='precision unreadable is unknown'):
        server.make(PolicySettings(precision='unreadable'))


def test_context_that_is_no_longer_there_is_refused(server):
    policy = server.make(PolicySettings())
    first = policy.prepare(observation())
    policy.prepare(observation())
    with pytest.raises(ValueError, match='only the newest context'):
        policy.denoise(first, 0)


def test_process_that_dies_is_told_and_the_next_policy_is_made(server):
    policy = server.make(PolicySettings(precision='dies'))
    for _ in range(2):
        with pytest.raises(PolicyFailedError, match='process of the policy has ended'):
            policy.prepare(observation())
    assert answer(server.make(PolicySettings()))[PID] > 0


def test_process_ends_with_the_last_reference_to_its_policy(server):
    policy = server.make(PolicySettings())
    pid = int(answer(policy)[PID])
    del policy
    assert not Path(f'/proc/{pid}').exists() or gone(pid) is None


@pytest.mark.parametrize('precision', ['hangs', 'endless'])
def test_whoever_waits_for_a_policy_that_hangs_comes_back_when_it_is_closed(precision):
    sys.path.insert(0, HERE)
    server, heard = PolicyServer('isolated', None, 'libero_panda'), []

    def wait():
        try:
            server.make(PolicySettings(precision=precision)).prepare(observation())
        except PolicyFailedError as error:
            heard.append(str(error))

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE_S
    while not (server._made if precision == 'hangs' else server._loading):
        assert time.monotonic() < end
        time.sleep(0.01)
    server.close()
    thread.join(PATIENCE_S)
    sys.path.remove(HERE)
    assert len(heard) == 1
    assert 'has ended' in heard[0]


def test_nothing_is_left_when_the_node_is_killed():
    root = str(Path(__file__).resolve().parents[3])
    node = subprocess.Popen([sys.executable, '-c', NODE.format(here=HERE)], text=True,
                            stdout=subprocess.PIPE, env={**os.environ, 'PYTHONPATH': root})
    pids = [int(word) for word in node.stdout.readline().split()]
    node.send_signal(signal.SIGKILL)
    node.wait()
    node.stdout.close()
    assert len(pids) == 2
    for pid in pids:
        gone(pid)


def test_it_imports_no_torch(server):
    words = ('import sys; import quantvla_ros.nodes.isolated, quantvla_ros.nodes.exchange; '
             'sys.exit("torch" in sys.modules)')
    assert subprocess.run([sys.executable, '-c', words], check=False).returncode == 0
