# SPDX-License-Identifier: Apache-2.0
"""Units, order, gripper and statistics, both ways; real-time chunking by its published weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.bench.parity_case import CASES, COMMANDED, MEASURED, SEED
from quantvla_ros.contract import Gripper
from quantvla_ros.policies import flow, rtc
from quantvla_ros.policies.agreement import read_agreement
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.door import Door
from quantvla_ros.policies.normalize import affine, groot_affine

STATS = {'min': [-1.0, 0.0], 'max': [1.0, 4.0], 'q01': [-0.9, 0.1], 'q99': [0.9, 3.9],
         'mean': [0.1, 2.0], 'std': [0.5, 1.5]}


NO_GRIPPER = Gripper()


def door(kind, model=None, gripper=NO_GRIPPER):
    model = {'action': {'kind': kind, 'units': 'deg', 'joints': list(COMMANDED[::-1])},
             'state': {'units': 'deg'}, **(model or {})}
    contract = replace(CASES['pi05_lerobot'].contract(), model=model, gripper=gripper)
    stats = {name: np.linspace(low, low + 3, 8) for name, low in
             (('min', -4.0), ('max', 2.0), ('q01', -3.9), ('q99', 1.9), ('mean', -1.0),
              ('std', 0.5))}
    action = affine('quantiles', stats, 'test', 'lerobot')
    return Door(contract, read_agreement(contract), (), None, action)


@pytest.mark.parametrize('kind', ['absolute', 'delta', 'velocity'])
def test_targets_pass_the_door_and_come_back(kind):
    gripper = Gripper('joint', COMMANDED[-1], 0.04, 0.0)
    model = {'gripper': {'open': 1.0, 'closed': -1.0}}
    there = door(kind, model, gripper)
    rng = np.random.default_rng(0)
    targets = rng.uniform(-0.5, 0.5, (10, 8))
    targets[:, -1] = rng.uniform(0.0, 0.04, 10)
    measured = rng.uniform(-1, 1, 9)
    chunk = there.chunk(there.normalise(targets, measured), measured, 0)
    assert np.allclose(chunk.positions, targets, atol=2e-5)
    assert chunk.joint_names == COMMANDED


def test_a_gripper_value_beyond_its_range_stops_at_the_range():
    there = door('absolute', {'gripper': {'open': 1.0, 'closed': -1.0}},
                 Gripper('joint', COMMANDED[-1], 0.04, 0.0))
    wild = np.full((10, 8), 50.0)
    assert there.chunk(wild, np.zeros(9), 0).positions[:, -1].max() <= 0.04


def test_the_state_reaches_the_checkpoint_in_its_own_units():
    assert np.allclose(door('absolute').state(np.full(9, np.pi)), 180.0)


def test_statistics_of_another_size_are_refused_with_both_sizes(folders):
    case = replace(CASES['pi05_lerobot'], commanded=7)
    with pytest.raises(ValueError, match='names 7 joints.*have 8 numbers'):
        case.ours(folders('pi05_lerobot'))


def test_a_slot_that_the_checkpoint_lacks_is_refused(folders):
    case = replace(CASES['pi05_lerobot'], model={'cameras': {'top': 'agentview'}})
    with pytest.raises(ValueError, match='base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb'):
        case.ours(folders('pi05_lerobot'))


def test_a_frame_of_another_size_is_refused(folders):
    case = CASES['pi05_lerobot']
    policy = make_policy('pi05', case.contract(),
                         PolicySettings(model=str(folders('pi05_lerobot'))))
    with pytest.raises(ValueError, match='reads 28x28'):
        policy.prepare(replace(case, image=32).observation())


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=2), st.sampled_from(
    ['quantiles', 'mean_std', 'min_max', 'identity']), st.sampled_from(['lerobot', 'openpi']))
def test_normalising_and_back_gives_the_same_numbers(values, mode, guard):
    map_ = affine(mode, STATS, 'test', guard)
    assert np.allclose(map_.to_robot(map_.to_model(values)), values, atol=1e-5)


def test_numbers_without_spread_follow_the_rules_of_groot():
    flat = {**STATS, 'min': [-1.0, 2.0], 'max': [1.0, 2.0], 'q01': [-1.0, 2.0],
            'q99': [1.0, 2.0]}
    low_high = groot_affine('min_max', flat, 'test')
    assert low_high.to_model(np.array([0.5, 7.0])).tolist() == [0.5, 0.0]
    assert low_high.to_robot(np.array([0.5, 0.3])).tolist() == [0.5, 2.0]
    clipped = groot_affine('quantiles', flat, 'test')
    assert clipped.to_model(np.array([3.0, 0.25])).tolist() == [1.0, 0.25]
    assert clipped.to_robot(np.array([0.5, 0.3])).tolist() == [0.5, 2.0]


def test_the_published_weights_of_real_time_chunking():
    linear = rtc.schedule_weights('linear', 4, 10, 16)
    assert linear[:10].round(3).tolist() == [1, 1, 1, 1, .857, .714, .571, .429, .286, .143]
    falling = rtc.schedule_weights('exp', 4, 10, 16)
    assert falling[4:10].round(3).tolist() == [.677, .433, .256, .133, .055, .013]
    assert rtc.schedule_weights('zeros', 4, 10, 16).sum() == 4
    assert rtc.schedule_weights('ones', 4, 10, 16).sum() == 10
    assert not linear[10:].any()
    with pytest.raises(ValueError, match='known are'):
        rtc.schedule_weights('cosine', 1, 2, 3)


def test_guidance_is_the_published_closed_form():
    """v' = v - g w (prev - (x - t v)), time running from 1 to 0, g as published."""
    generator = torch.Generator().manual_seed(0)
    x, prev, weight = (torch.randn(1, 6, 3, generator=generator) for _ in range(3))
    w = torch.from_numpy(rtc.schedule_weights('exp', 2, 5, 6)).float()
    v = lambda z, t: torch.tanh(z * weight) + t  # noqa: E731
    steps, expected = 10, x.clone()
    for step in range(steps):
        t = 1.0 - step / steps
        plain = v(expected, t)
        tau = 1 - t
        g = 10.0 if tau == 0 else min(10.0, (t / tau) * ((t * t + tau * tau) / (t * t)))
        guided = plain - g * w[:, None] * (prev - (expected - t * plain))
        expected = expected - guided / steps
    ours = flow.denoise(lambda z, step: -v(z, 1.0 - step / steps), x, steps,
                        flow.PrefixGuidance(prev, w))
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize('name', ['pi05_lerobot', 'pi0_lerobot', 'groot_n15_isaac',
                                  'smolvla_lerobot'])
def test_a_prefix_pulls_the_chunk_of_every_flow_policy(name, folders):
    case = CASES[name]
    policy = make_policy(case.policy, case.contract(),
                         PolicySettings(model=str(folders(name))))
    context = policy.prepare(case.observation())
    free, other = policy.denoise(context, SEED), policy.denoise(context, SEED + 1)
    guided = policy.denoise(context, SEED + 1, free)
    error = lambda chunk: np.abs(chunk.positions - free.positions)[:3].mean()  # noqa: E731
    assert error(guided) < 0.5 * error(other)
    again = policy.denoise(context, SEED + 1, free)
    assert np.array_equal(guided.positions, again.positions)
    assert free.joint_names == COMMANDED
    assert len(MEASURED) == 9
