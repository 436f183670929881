# SPDX-License-Identifier: Apache-2.0
"""The state machine of a swap: what it does with wishes, reports and storms of both."""

import random

import pytest

from quantvla_ros.nodes.swap import NOTHING, Action, Stage, Swap, Wish

OLD, NEW, OTHER = Wish('w8a8'), Wish('w4a8'), Wish('float')


@pytest.fixture
def swap():
    return Swap(OLD, clock=lambda: 0.0)


def step(swap, *, moving=True, hold=False):
    return swap.step(moving=moving, hold=hold)


def wished(swap, wish=NEW, **state):
    swap.request(wish)
    return step(swap, **state)


def test_wish_is_loaded_verified_proved_and_only_then_nothing_is_under_way(swap):
    assert wished(swap) is Action.LOAD
    assert swap.running == OLD
    for event, stage, running in (('verifying', Stage.VERIFYING, OLD),
                                  ('serving', Stage.PROVING, NEW), ('proved', Stage.ACTIVE, NEW)):
        swap.report(event)
        assert step(swap) is None
        assert (swap.stage, swap.running) == (stage, running)
    assert swap.outcome.result == 'active'
    assert swap.settled


def test_wish_for_what_runs_does_nothing(swap):
    assert wished(swap, OLD) is None
    assert swap.counts['requested'] == 0


def test_failed_wish_is_put_back_with_its_cause_and_not_tried_again(swap):
    wished(swap)
    swap.report('failed', 'refused', 'it is damaged')
    assert step(swap) is None
    assert (swap.running, swap.wish) == (OLD, OLD)
    assert swap.outcome.sentence == 'it is damaged'
    assert step(swap) is None


def test_rolled_back_wish_is_put_back(swap):
    wished(swap)
    swap.report('serving')
    swap.report('rolled_back', 'non_finite', 'nan')
    assert step(swap) is None
    assert (swap.running, swap.wish, swap.stage) == (OLD, OLD, Stage.ACTIVE)
    assert (swap.outcome.result, swap.outcome.wish) == ('rolled_back', NEW)


def test_newer_wish_gives_up_the_load_once_and_is_loaded_next(swap):
    wished(swap)
    assert wished(swap, OTHER) is Action.CANCEL
    assert step(swap) is None
    swap.report('failed', 'cancelled', '')
    assert step(swap) is Action.LOAD
    assert swap.target == OTHER
    assert swap.counts['superseded'] == 1


def test_newer_wish_waits_for_the_proof_while_the_arm_moves_and_skips_it_at_rest(swap):
    wished(swap)
    swap.report('serving')
    step(swap)
    assert wished(swap, OTHER) is None
    assert step(swap, moving=False) is Action.ACCEPT


def test_rolled_back_while_another_wish_waits_goes_on_to_that(swap):
    wished(swap)
    swap.report('serving')
    step(swap)
    swap.request(OTHER)
    swap.report('rolled_back', 'latency', 'slow')
    assert step(swap) is Action.LOAD
    assert swap.target == OTHER


def test_hold_frees_the_running_one_first_and_goes_on_afterwards(swap):
    assert wished(swap, hold=True) is Action.HOLD
    assert swap.held
    swap.report('resting')
    assert step(swap) is Action.LOAD
    assert swap.running == NOTHING, 'nothing runs, and nothing else is told'
    swap.report('serving')
    assert step(swap) is Action.RESUME
    assert (swap.running, swap.held, swap.settled) == (NEW, False, True)


def test_hold_that_fails_loads_the_old_one_again_and_its_cause_stays(swap):
    wished(swap, hold=True)
    swap.report('resting')
    step(swap)
    swap.report('failed', 'refused', 'it is damaged')
    assert step(swap) is Action.LOAD
    assert swap.target == OLD
    swap.report('serving')
    assert step(swap) is Action.RESUME
    assert swap.running == OLD
    assert swap.outcome.sentence == 'it is damaged'


def test_hold_that_cannot_load_the_old_one_either_is_empty_until_another_wish(swap):
    wished(swap, hold=True)
    swap.report('resting')
    step(swap)
    for _ in range(2):
        swap.report('failed', 'memory', 'no memory')
        step(swap)
    assert swap.stage is Stage.EMPTY
    assert swap.held
    assert wished(swap, OLD, hold=True) is Action.LOAD
    swap.report('serving')
    assert step(swap) is None, 'nothing moves by itself after that'
    assert (swap.running, swap.held) == (OLD, False)


def test_newest_calibration_gets_the_name_that_was_found(swap):
    wished(swap, Wish('w8a8', 'newest'))
    swap.report('serving', wish=Wish('w8a8', 'kitchen'))
    swap.report('proved')
    assert step(swap) is None
    assert swap.running == swap.wish == Wish('w8a8', 'kitchen')


@pytest.mark.parametrize('seed', range(60))
def test_every_storm_settles_on_the_last_wish_or_on_what_runs(seed):
    """A loader and an arm drawn at random answer each action; truth and wish meet in the end."""
    draw = random.Random(seed)
    swap, hold = Swap(OLD), draw.random() < 0.3
    truth, answers = OLD, []  # what a policy in the inference thread would be
    for turn in range(400):
        if turn < 200 and draw.random() < 0.2:
            swap.request(draw.choice((OLD, NEW, OTHER)))
        action = swap.step(moving=draw.random() < 0.7, hold=hold)
        if action is Action.LOAD:
            target, bad = swap.target, turn < 200 and draw.random() < 0.2
            answers = ['failed'] if bad else ['verifying', 'serving', 'proved']
            if not bad and truth != NOTHING and draw.random() < 0.2:
                answers[-1] = 'rolled_back'
            before = truth
        elif action is Action.CANCEL:
            answers = ['cancelled'] if 'serving' in answers else answers
        elif action is Action.HOLD:
            truth, answers = NOTHING, ['resting']
        if answers and draw.random() < 0.6:
            event = answers.pop(0)
            if event == 'serving':
                truth = target
                answers = answers if before != NOTHING else []
            if event == 'rolled_back':
                truth = before
            if event == 'cancelled':
                swap.report('failed', 'cancelled', '')
            else:
                swap.report(event, 'kind', 'why')
    swap.step(moving=True, hold=hold)
    assert swap.running == truth, 'what is told is what runs'
    assert swap.settled
    assert not swap.held or swap.stage is Stage.EMPTY
