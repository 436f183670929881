# SPDX-License-Identifier: Apache-2.0
"""Who makes the next chunk, the way back, and the trial that comes before."""

import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros.action import ActionChunk
from quantvla_ros.control.difference import difference
from quantvla_ros.control.limits import JointLimiter
from quantvla_ros.nodes.beside import Beside, Trial, Unfit
from quantvla_ros.nodes.handover import Handover, Kept
from quantvla_ros.nodes.room import available_bytes, room_problem

PATIENCE_S = 30.0
URDF = '<robot name="r"><link name="a"/>' + ''.join(
    f'<joint name="{n}" type="{t}"><parent link="a"/><child link="a"/>'
    '<limit lower="-1" upper="1" velocity="1" effort="1"/></joint>'
    for n, t in (('turn', 'revolute'), ('slide', 'prismatic'), ('grip', 'prismatic'))
) + '</robot>'
NAMES = ('turn', 'slide', 'grip')


@pytest.fixture
def limiter():
    return JointLimiter.from_description(
        NAMES, URDF, {}, lead_rad=0.5, lead_m=0.1, snap_joints=('grip',), allow_unlimited=False)


class Answers:
    """A policy that answers with one position of all joints."""

    def __init__(self, position=0.0):
        self.position, self.resets = np.asarray(position), 0

    def prepare(self, observation):
        return observation

    def denoise(self, context, seed, prefix=None):
        positions = np.zeros((4, 3)) + self.position
        return ActionChunk(NAMES, positions, 1, 0.1)

    def reset(self):
        self.resets += 1


def kept(position=0.0):
    policy = Answers(position)
    return Kept(SimpleNamespace(), 3, None, policy.denoise(None, 3))


def trial(limiter, slow_s=10.0):
    return Trial(limiter, limiter.by_kind(0.1, 0.01), warmup=2, slow_s=slow_s)


def test_difference_is_told_by_joint_in_its_own_unit(limiter):
    found = difference(kept().chunk, kept([0.05, -0.005, 0.04]).chunk, limiter)
    np.testing.assert_allclose(found.worst, [0.05, 0.005, 0.04])
    assert found.jumps == 4
    assert found.problem(limiter.by_kind(0.1, 0.01)) == ''
    assert "differs by 0.0500 at joint 'turn'" in found.problem(limiter.by_kind(0.04, 0.01))
    assert "joint 'slide'" in found.problem(limiter.by_kind(0.1, 0.004))


def test_another_width_is_no_answer():
    with pytest.raises(ValueError, match='it answers for 1 joints over 4 steps'):
        difference(kept().chunk, ActionChunk(('turn',), np.zeros((4, 1)), 1, 0.1), None)


@pytest.mark.parametrize(('position', 'kind'), [
    (np.nan, 'non_finite'), (np.inf, 'non_finite'), ([0.2, 0, 0], 'difference'),
    ([0, 0.02, 0], 'difference'),
])
def test_trial_refuses_what_may_not_command(limiter, position, kind):
    with pytest.raises(Unfit) as caught:
        trial(limiter).judge(Answers(position), kept())
    assert caught.value.kind == kind


def test_trial_refuses_what_is_too_slow_and_forgets_its_episode(limiter):
    policy = Answers()
    trial(limiter).judge(policy, kept())
    assert policy.resets == 1
    with pytest.raises(Unfit, match='executed for'):
        trial(limiter, slow_s=0.0).judge(policy, kept())


def test_gripper_that_decides_otherwise_is_no_reason(limiter):
    trial(limiter).judge(Answers([0, 0, 0.04]), kept())


class Notes:
    """Keeps reports and what was freed."""

    def __init__(self):
        self.events, self.freed = [], []

    def report(self, event, *rest, **more):
        self.events.append((event, *rest))

    def free(self, box):
        self.freed.append(box.pop())


@pytest.fixture
def notes():
    return Notes()


def test_old_policy_is_kept_for_the_stated_number_of_good_chunks(notes):
    old, new = Answers(), Answers()
    handover = Handover(old, notes.report, notes.free)
    handover.take_over([new], 2)
    assert handover.running is new
    handover.good(0.1)
    assert handover.proving
    handover.good(0.1)
    assert not handover.proving
    assert notes.freed == [old]
    assert [event[0] for event in notes.events] == ['serving', 'proved']


def test_bad_chunk_leads_back_once(notes):
    old, new = Answers(), Answers()
    handover = Handover(old, notes.report, notes.free)
    assert not handover.back('raised', 'x'), 'no way back before a swap'
    handover.take_over([new], 2)
    assert handover.back('raised', 'fire')
    assert handover.running is old
    assert notes.freed == [new]
    assert notes.events[-1] == ('rolled_back', 'raised', 'fire')
    assert not handover.back('raised', 'again')


def test_slow_chunk_leads_back(notes):
    handover = Handover(Answers(), notes.report, notes.free, slow_s=0.3)
    handover.take_over([Answers()], 2)
    handover.good(0.31)
    assert notes.events[-1][:2] == ('rolled_back', 'latency')


@pytest.fixture
def beside(notes):
    done = threading.Event()

    def report(event, *rest, **more):
        notes.report(event, *rest)
        if event == 'failed':
            done.set()

    made = Beside(report, kept, lambda text: None)
    made.done = done
    yield made
    assert made.close(PATIENCE_S)


def test_loader_hands_over_what_stood_its_trial_and_frees_without_a_collection(
    beside, notes, limiter
):
    policy = Answers(0.01)
    alive, offered = weakref.ref(policy), threading.Event()
    boxes = []
    makers = [policy]
    del policy
    gc.disable()
    try:
        beside.load(makers.pop, trial(limiter), lambda box: (boxes.append(box), offered.set()))
        assert offered.wait(PATIENCE_S)
        assert notes.events == [('verifying',)]
        assert alive() is boxes[0][0]
        beside.free(boxes.pop())
        assert beside.close(PATIENCE_S)
        assert alive() is None, 'the last reference is gone'
    finally:
        gc.enable()


@pytest.mark.parametrize(('error', 'kind', 'words'), [
    (ValueError('no such artifact'), 'refused', 'no such artifact'),
    (FileNotFoundError('gone'), 'refused', 'gone'), (MemoryError(), 'memory', 'memory ran out'),
    (KeyError('layer 7'), 'raised', "KeyError: 'layer 7'"),
])
def test_load_that_fails_says_why(beside, notes, limiter, error, kind, words):
    def make():
        raise error

    beside.load(make, trial(limiter), lambda box: pytest.fail('nothing to offer'))
    assert beside.done.wait(PATIENCE_S)
    event, found, sentence = notes.events[-1]
    assert (event, found) == ('failed', kind)
    assert words in sentence


def test_cancelled_load_offers_nothing(beside, notes, limiter):
    gate = threading.Event()

    def make():
        gate.wait(PATIENCE_S)
        return Answers()

    beside.load(make, trial(limiter), lambda box: pytest.fail('nothing to offer'))
    beside.cancel()
    gate.set()
    assert beside.done.wait(PATIENCE_S)
    assert notes.events[-1][:2] == ('failed', 'cancelled')


def test_room_is_that_of_the_machine_or_of_the_container_whichever_is_less(tmp_path):
    meminfo = tmp_path / 'meminfo'
    meminfo.write_text('MemTotal: 9000 kB\nMemAvailable: 4000 kB\n')
    assert available_bytes(meminfo, tmp_path) == 4_096_000
    (tmp_path / 'memory.max').write_text('max\n')
    (tmp_path / 'memory.current').write_text('1000000\n')
    assert available_bytes(meminfo, tmp_path) == 4_096_000
    (tmp_path / 'memory.max').write_text('3000000\n')
    (tmp_path / 'memory.stat').write_text('anon 5\ninactive_file 500000\n')
    assert available_bytes(meminfo, tmp_path) == 2_500_000


def test_want_of_room_is_told_with_figures_and_the_way_out():
    assert room_problem('w4a8', 10_000_000, 30_000_000, 20_000_000) == ''
    text = room_problem('w4a8', 10_000_001, 30_000_000, 20_000_000)
    for part in ('about 10 MB', '30 MB are available', '20 MB stay free', 'swap.mode to hold'):
        assert part in text
