# SPDX-License-Identifier: Apache-2.0
"""The inference thread, and when a chunk is due; clocks moved by hand."""

import threading
import time

import numpy as np
import pytest

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.control.clock import ManualClock
from quantvla_ros.decode import DecodeError
from quantvla_ros.nodes.handover import Handover
from quantvla_ros.nodes.inference import Inference, InferenceSettings, InferenceThread
from quantvla_ros.nodes.origin import digest
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import DeviceError

PATIENCE_S = 30.0


def seen_at(stamp_ns):
    return Observation({}, {}, ('a',), np.zeros(1), stamp_ns, 'go')


class Script:
    """A policy, builder, guard and player in one: it does what the test says and keeps notes."""

    def __init__(self):
        self.clock = ManualClock(now_ns=10 * NS_PER_S)
        self.raises = None
        self.refusal = self.late = None
        self.gate = threading.Event()
        self.gate.set()
        self.stops, self.merged, self.seeds, self.resets, self.prefixes = [], [], [], 0, []
        self.refusals = []
        self.plan = object()
        self.pictures_ns = 0

    def shown_ns(self):
        return self.pictures_ns

    def build(self):
        return seen_at(self.clock.now_ns())

    def prepare(self, observation):
        self.gate.wait(PATIENCE_S)
        if self.raises is not None:
            raise self.raises
        return observation

    def denoise(self, context, seed, prefix=None):
        self.seeds.append(seed)
        self.prefixes.append(prefix)
        return ActionChunk(('a',), np.zeros((16, 1)), context.stamp_ns, 0.05)

    def reset(self):
        self.resets += 1

    def stop(self, kind, sentence):
        self.stops.append((kind, sentence))

    def admit(self, chunk):
        return self.refusal

    def refused(self, kind, sentence):
        self.refusals.append((kind, sentence))

    def merge(self, chunk, now_ns, prefixed=False):
        if self.late is None:
            self.merged.append((chunk, prefixed))
        return self.late

    def sample(self, now_ns):
        return self.plan

    def remaining(self, start_ns):
        return f'plan from {start_ns}'


@pytest.fixture
def thread():
    made = InferenceThread()
    yield made
    assert made.close(PATIENCE_S)


@pytest.fixture
def script():
    return Script()


def make(thread, script, **changes):
    settings = InferenceSettings(execute=8, step_dt_s=0.05, margin_s=0.1, seed=7, **changes)
    return Inference(
        thread, Handover(script), script, script, script, script.clock, settings)


def settle(thread):
    """Wait until everything handed to the thread is done."""
    assert thread.submit(lambda: None).done.wait(PATIENCE_S)


def test_next_chunk_is_due_early_enough_to_be_ready_when_the_executed_part_ends(thread, script):
    inference = make(thread, script)
    inference.poke(script.clock.now_ns())
    settle(thread)
    script.clock.advance(0.25)
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert len(script.merged) == 1, 'too early'
    script.clock.advance(0.06)  # 8 steps of 0.05 s less the margin of 0.1 s have passed
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert len(script.merged) == 2


def chunks_after(inference, script, thread, *seconds):
    """How many chunks there are in all after each of some steps of the clock."""
    found = []
    for step_s in seconds:
        script.clock.advance(step_s)
        inference.poke(script.clock.now_ns())
        settle(thread)
        found.append(len(script.merged))
    return found


def begins_s(inference, script, thread, *, period_s, until_s=10.0):
    """After how many seconds the second inference begins, with pictures every so often."""
    start_ns, step_ns = script.clock.now_ns(), 20_000_000
    for number in range(20):
        if number * step_ns % round(period_s * NS_PER_S) == 0 and number * 0.02 < until_s:
            script.pictures_ns = script.clock.now_ns()
        inference.poke(script.clock.now_ns())
        settle(thread)
        if len(script.merged) == 2:
            break
        script.clock.advance(0.02)
    return (script.clock.now_ns() - start_ns) / NS_PER_S


@pytest.mark.parametrize(('period_s', 'second_s'), [
    (0.04, 0.28),  # due after 0.3 s, when they would be half a period old
    (0.06, 0.3),
    (0.14, 0.28),
    (0.24, 0.3),  # too early by more than half of the margin
    (0.26, 0.26),
    (10.0, 0.3),  # none come: at the time, with old ones
])
def test_an_inference_that_is_soon_due_begins_with_pictures_that_just_came(
    thread, script, period_s, second_s
):
    assert begins_s(make(thread, script), script, thread, period_s=period_s) == second_s


@pytest.mark.parametrize(('period_s', 'second_s'), [
    (0.16, 0.32),
    (0.18, 0.3),  # longer than half of the margin
])
def test_an_inference_that_is_due_waits_for_pictures_that_are_about_to_come(
    thread, script, period_s, second_s
):
    assert begins_s(make(thread, script), script, thread, period_s=period_s) == second_s


def test_for_pictures_that_do_not_come_it_waits_half_of_the_margin(thread, script):
    inference = make(thread, script)
    assert begins_s(inference, script, thread, period_s=0.16, until_s=0.3) == 0.36


def test_two_threads_poke_and_one_inference_begins(thread, script):
    inference = make(thread, script)
    at_once = threading.Barrier(2)

    def slowly():
        time.sleep(0.05)
        return True

    def poke():
        at_once.wait(PATIENCE_S)
        inference.poke(script.clock.now_ns())

    inference.idle = slowly
    others = [threading.Thread(target=poke) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join(PATIENCE_S)
    settle(thread)
    assert len(script.merged) == 1


def test_pictures_of_a_clock_that_went_back_neither_hurry_nor_hold_up(thread, script):
    inference, found = make(thread, script), []
    for stamp_s, step_s in ((20, 0.28), (15, 0.03), (10, 0.0)):
        script.pictures_ns = stamp_s * NS_PER_S
        inference.poke(script.clock.now_ns())
        settle(thread)
        found.append(len(script.merged))
        script.clock.advance(step_s)
    assert found == [1, 1, 2]


def test_late_pictures_do_not_make_inference_run_without_a_pause(thread, script):
    script.build = lambda: seen_at(script.clock.now_ns() - NS_PER_S // 4)
    inference = make(thread, script)
    assert chunks_after(inference, script, thread, 0.0, 0.25, 0.06) == [1, 1, 2]


def test_pace_is_that_of_the_header_clock_however_long_an_inference_takes(thread, script):
    script.prepare = lambda observation: (time.sleep(0.12), observation)[1]
    inference = make(thread, script)
    inference.latency.add = lambda took_s: None  # as if it had been ready at once
    assert chunks_after(inference, script, thread, 0.0, 0.25, 0.06) == [1, 1, 2]


def test_slower_speed_makes_a_chunk_last_longer(thread, script):
    inference = make(thread, script)
    inference.speed_scale = lambda: 0.5
    inference.poke(script.clock.now_ns())
    settle(thread)
    script.clock.advance(0.6)
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert len(script.merged) == 1
    script.clock.advance(0.15)
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert len(script.merged) == 2


def test_poke_never_starts_a_second_inference_beside_the_first(thread, script):
    script.gate.clear()
    inference = make(thread, script)
    for _ in range(5):
        inference.poke(script.clock.now_ns())
    assert not inference.idle()
    script.gate.set()
    settle(thread)
    assert len(script.merged) == 1


def test_running_inference_is_overdue_after_its_timeout_on_the_steady_clock(thread, script):
    script.gate.clear()
    inference = make(thread, script, timeout_s=2.0)
    inference.poke(script.clock.now_ns())
    submitted = inference._pending.submitted_ns
    assert inference.overdue(submitted + 2 * NS_PER_S) is None
    assert 'has run for 2.50 s; inference.timeout_s allows 2 s' in inference.overdue(
        submitted + 5 * NS_PER_S // 2)
    script.gate.set()
    settle(thread)
    assert inference.overdue(submitted + 99 * NS_PER_S) is None


@pytest.mark.parametrize(('error', 'kind', 'words'), [
    (RuntimeError('fire'), 'policy_raised', 'RuntimeError: fire'),
    (ValueError('unknown word'), 'policy_refused', 'unknown word'),
    (DeviceError('the GPU failed'), 'device_failed', 'the GPU failed'),
    (DecodeError('size', "camera 'x': size is 1x1"), 'size', 'size is 1x1'),
])
def test_what_a_policy_raises_stops_with_its_cause(thread, script, error, kind, words):
    script.raises = error
    inference = make(thread, script)
    inference.poke(script.clock.now_ns())
    settle(thread)
    (found, sentence), = script.stops
    assert found == kind
    assert words in sentence


def test_chunk_of_an_episode_that_is_over_is_thrown_away(thread, script):
    script.gate.clear()
    inference = make(thread, script)
    inference.poke(script.clock.now_ns())
    inference.cancel()
    script.gate.set()
    settle(thread)
    assert script.merged == []
    assert inference.latency.figures().count == 0


def test_error_of_an_episode_that_is_over_stops_nothing(thread, script):
    script.gate.clear()
    script.raises = RuntimeError('late')
    inference = make(thread, script)
    inference.poke(script.clock.now_ns())
    inference.new_episode()
    script.gate.set()
    settle(thread)
    assert script.stops == []


def test_policy_is_reset_at_each_episode_and_seeds_count_up(thread, script):
    inference = make(thread, script)
    for _ in range(2):
        inference.new_episode()
        inference.poke(script.clock.now_ns())
        settle(thread)
    assert script.resets == 2
    assert script.seeds == [7, 8]


def test_a_chunk_comes_with_what_it_was_made_from(thread, script):
    inference = make(thread, script)
    shown = []
    inference.on_chunk = lambda chunk, origin: shown.append((chunk, origin))
    observed_ns = script.clock.now_ns()
    inference.poke(observed_ns)
    settle(thread)
    chunk, origin = shown[0]
    assert (origin.seed, origin.joint_stamp_ns, origin.instruction) == (7, observed_ns, 'go')
    assert origin.chunk_sha256 == digest(chunk.positions)


def test_refused_chunk_is_counted_told_and_tried_again_at_once(thread, script):
    inference = make(thread, script)
    told = []
    inference.on_trouble = told.append
    script.refusal = 'chunk holds nan'
    inference.poke(script.clock.now_ns())
    settle(thread)
    script.refusal = None
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert (inference.refused, inference.chunks) == (1, 1)
    assert told == ['chunk refused: chunk holds nan']


@pytest.mark.parametrize('running', [True, False])
def test_first_chunk_holds_from_now_on_and_later_ones_from_their_observation(
    thread, script, running
):
    script.plan = object() if running else None
    script.gate.clear()
    inference = make(thread, script)
    inference.poke(script.clock.now_ns())
    while thread._jobs.qsize():
        pass
    seen = threading.Event()
    inference.on_chunk = lambda chunk, origin: seen.set()
    observed_ns = script.clock.now_ns()
    script.build = lambda: seen_at(observed_ns)
    script.clock.advance(1.5)
    script.gate.set()
    assert seen.wait(PATIENCE_S)
    stamp_ns = script.merged[0][0].stamp_ns
    assert stamp_ns in ((observed_ns, observed_ns + 1) if running else (script.clock.now_ns(),))


def test_late_chunk_is_noted_with_the_guard(thread, script):
    inference = make(thread, script)
    script.late = 'chunk is late'
    inference.poke(script.clock.now_ns())
    settle(thread)
    assert script.refusals == [('not_merged', 'chunk is late')]


def test_prefix_goes_to_the_policy_and_the_merge_only_when_asked_for(thread, script):
    for prefix in (False, True):
        inference = make(thread, script, prefix=prefix)
        inference.poke(script.clock.now_ns())
        settle(thread)
    assert script.prefixes == [None, f'plan from {10 * NS_PER_S}']
    assert [prefixed for _, prefixed in script.merged] == [False, True]


def test_stuck_thread_is_left_behind():
    gate, thread = threading.Event(), InferenceThread()
    thread.submit(lambda: gate.wait(PATIENCE_S))
    assert not thread.close(0.01)
    gate.set()
    assert thread.close(PATIENCE_S)


def test_job_hands_its_error_to_whoever_waits(thread):
    def work():
        raise KeyError('x')

    job = thread.submit(work)
    assert job.done.wait(PATIENCE_S)
    with pytest.raises(KeyError):
        job.value()


# the control thread --------------------------------------------------------------------------
