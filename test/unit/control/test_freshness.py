# SPDX-License-Identifier: Apache-2.0
"""Every way in which an input can be too bad to act on is noticed, named and forgotten again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.control.clock import ManualClock
from quantvla_ros.control.freshness import Freshness, InputBounds, frame_digest


class Inputs:
    """A camera at 30 Hz and joints at 100 Hz on a clock moved by hand."""

    def __init__(self, **more):
        self.clock = ManualClock(now_ns=100 * 10**9)
        bounds = {
            'camera': InputBounds(0.2, 0.2, max_frozen_s=0.5),
            'joints': InputBounds(0.1, 0.1),
        }
        self.freshness = Freshness(bounds, self.clock, **more)
        self.frame = 0

    def arrive(self, name, stamp_ns=None, digest=None):
        stamp_ns = self.clock.now_ns() if stamp_ns is None else stamp_ns
        self.freshness.arrived(name, stamp_ns, digest)

    def flow(self, seconds, names=('camera', 'joints'), same=False, check=True, age_s=0.0):
        """Let time pass with messages every 10 ms; return the last check."""
        faults = []
        for _ in range(round(seconds / 0.01)):
            self.clock.advance(0.01)
            self.frame += not same
            for name in names:
                stamp_ns = self.clock.now_ns() - round(age_s * 1e9)
                self.arrive(name, stamp_ns, digest=self.frame if name == 'camera' else None)
            if check:
                faults = self.freshness.check()
        return faults

    def kinds(self, **more):
        return {(fault.input, fault.kind) for fault in self.freshness.check(**more)}


def test_flowing_inputs_have_no_faults():
    assert Inputs().flow(2.0) == []


def test_inputs_that_never_spoke_are_faulty_from_the_start():
    assert Inputs().kinds() == {('camera', 'silent'), ('joints', 'silent')}


def test_silent_camera_is_named_and_recovers():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.flow(0.25, names=('joints',))
    assert ('camera', 'silent') in inputs.kinds()
    assert inputs.flow(0.05) == []


def test_silence_is_measured_on_the_steady_clock():
    inputs = Inputs(clock_jump_s=0.0)
    inputs.flow(1.0)
    inputs.clock.advance(0.3)
    inputs.clock.jump(-0.3)  # header time stands still while the camera is silent
    assert inputs.kinds() == {('camera', 'silent'), ('joints', 'silent')}


def test_age_is_measured_by_header_stamp():
    inputs = Inputs()
    faults = inputs.flow(1.0, age_s=0.15)
    assert [(f.input, f.kind) for f in faults] == [('joints', 'stale')]
    assert '0.150 s ago, at most 0.1 s' in faults[0].sentence


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.6))
def test_camera_is_stale_exactly_beyond_its_age(age_s):
    inputs = Inputs()
    inputs.flow(0.3, names=('joints',))
    inputs.arrive('camera', inputs.clock.now_ns() - round(age_s * 1e9), digest=1)
    assert (('camera', 'stale') in inputs.kinds()) == (round(age_s * 1e9) / 1e9 > 0.2)


def test_frozen_camera_is_named_while_the_arm_moves_and_recovers():
    inputs = Inputs()
    inputs.flow(1.0)
    faults = inputs.flow(0.6, same=True)
    assert [(f.input, f.kind) for f in faults] == [('camera', 'frozen')]
    assert 'at most 0.5 s' in faults[0].sentence
    assert inputs.flow(0.02) == []


def test_same_content_before_a_still_arm_is_no_fault():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.flow(3.0, same=True, check=False)
    assert inputs.kinds(moving=False) == set()


def test_frozen_time_counts_from_when_the_arm_began_to_move():
    inputs = Inputs()
    inputs.flow(3.0, same=True, check=False)
    inputs.kinds(moving=False)
    assert inputs.flow(0.4, same=True) == []
    assert [f.kind for f in inputs.flow(0.2, same=True)] == ['frozen']


def test_input_without_digest_may_repeat_itself():
    assert Inputs().flow(2.0) == []  # joints pass no digest


def test_stamp_going_back_is_named_and_recovers():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.arrive('camera', inputs.clock.now_ns() - 50_000_000, digest=-1)
    assert inputs.kinds() == {('camera', 'backwards')}
    assert inputs.flow(0.15) == []


def test_a_bad_message_between_two_checks_is_not_missed():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.arrive('camera', inputs.clock.now_ns() - 50_000_000, digest=-1)
    inputs.flow(0.05, check=False)  # good ones again before anybody looked
    assert inputs.kinds() == {('camera', 'backwards')}


def test_stamp_from_the_future_is_named_until_a_good_one_comes():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.arrive('camera', inputs.clock.now_ns() + 500_000_000, digest=-1)
    assert inputs.kinds() == {('camera', 'future')}
    inputs.clock.advance(0.15)
    inputs.arrive('joints')
    assert ('camera', 'future') in inputs.kinds()


def test_small_clock_difference_between_machines_is_no_fault():
    assert Inputs().flow(1.0, age_s=-0.015) == []


def test_zero_stamp_is_named_and_recovers():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.arrive('joints', 0)
    assert ('joints', 'zero_stamp') in inputs.kinds()
    assert inputs.flow(0.15) == []


def test_unusable_message_is_named_until_a_good_one_comes():
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.freshness.broken('camera', 'wrong_size', 'frame is 64x48; expected 640x480')
    faults = inputs.flow(0.15, names=('joints',))
    assert [(f.input, f.kind) for f in faults] == [('camera', 'wrong_size')]
    assert faults[0].sentence == 'camera: frame is 64x48; expected 640x480'
    assert inputs.flow(0.15) == []


def test_unusable_first_message_is_named_beside_the_silence():
    inputs = Inputs()
    inputs.freshness.broken('camera', 'wrong_encoding', 'encoding is 16UC1')
    assert ('camera', 'wrong_encoding') in inputs.kinds()
    assert ('camera', 'silent') in inputs.kinds()


def test_unusable_messages_do_not_pass_for_signs_of_life():
    inputs = Inputs()
    inputs.flow(1.0)
    for _ in range(30):
        inputs.flow(0.01, names=('joints',))
        inputs.freshness.broken('camera', 'wrong_size', 'small')
    assert ('camera', 'silent') in inputs.kinds()


@pytest.mark.parametrize('seconds', [-3.0, -0.2, 0.2, 3.0])
def test_clock_jump_is_its_own_fault_and_passes(seconds):
    inputs = Inputs()
    inputs.flow(1.0)
    inputs.clock.jump(seconds)
    faults = inputs.freshness.check()
    assert (faults[0].input, faults[0].kind) == ('clock', 'clock_jump')
    assert f'{seconds:+.3f} s' in faults[0].sentence
    assert inputs.flow(0.5) == []


def test_clock_that_is_slewed_is_no_jump():
    inputs = Inputs()
    for _ in range(300):
        inputs.clock.jump(0.0005)
        assert inputs.flow(0.01) == []


def test_clock_jump_check_can_be_switched_off_for_simulated_time():
    inputs = Inputs(clock_jump_s=0.0)
    inputs.flow(1.0)
    inputs.clock.jump(0.5)
    assert not any(kind == 'clock_jump' for _, kind in inputs.kinds())


def test_ages_are_told_and_infinite_before_the_first_message():
    inputs = Inputs()
    inputs.arrive('joints')
    inputs.clock.advance(0.03)
    assert inputs.freshness.ages_s() == {'camera': float('inf'), 'joints': pytest.approx(0.03)}


@pytest.mark.parametrize('wrong', [(0, 1, 1), (1, 0, 1), (1, 1, -1), (float('nan'), 1, 1)])
def test_impossible_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match='expected'):
        InputBounds(*wrong)


def test_impossible_clock_bound_is_refused():
    with pytest.raises(ValueError, match='clock_jump_s'):
        Freshness({}, ManualClock(), clock_jump_s=-1.0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_digest_changes_with_any_single_byte(seed, height, width):
    rng = np.random.default_rng(seed)
    frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = frame_digest(frame)
    assert frame_digest(frame.copy()) == before
    flat = frame.reshape(-1)
    flat[rng.integers(flat.size)] ^= np.uint8(rng.integers(1, 256))
    assert frame_digest(frame) != before


def test_digest_reads_views_that_are_not_contiguous():
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    assert frame_digest(frame[::-1]) == frame_digest(frame[::-1].copy())
