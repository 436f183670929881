# SPDX-License-Identifier: Apache-2.0
"""The denoising loop on flows whose answer is known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.policies import flow


def toward(goal):
    """The exact velocity of a flow whose every chunk is `goal`: v = (goal - x) / (1 - t)."""

    def velocity(x, step, steps=10):
        return (goal - x) / (1.0 - step / steps)

    return velocity


def test_straight_flow_arrives():
    goal = torch.randn(2, 16, 8, dtype=torch.float64)
    x = flow.denoise(toward(goal), torch.randn(2, 16, 8, dtype=torch.float64), 10)
    assert torch.allclose(x, goal)


def test_frozen_prefix_steps_arrive_at_the_prefix():
    goal = torch.zeros(1, 16, 8, dtype=torch.float64)
    target = torch.full((1, 16, 8), 2.0, dtype=torch.float64)
    weights = torch.from_numpy(flow.prefix_weights(4, 8, 16))
    start = torch.randn(1, 16, 8, dtype=torch.float64)
    x = flow.denoise(toward(goal), start, 10, flow.PrefixGuidance(target, weights))
    free = flow.denoise(toward(goal), start, 10)
    distance = (x - target).abs().mean((0, 2))
    assert (distance[:4] < 0.6).all(), 'frozen steps follow the prefix'
    assert torch.equal(x[:, 8:], free[:, 8:]), 'steps behind the prefix are free'
    assert (distance[4:8].diff() > 0).all(), 'the pull fades over the overlap'


def test_guidance_equals_the_form_with_time_running_backwards():
    """v' = v - g w (prev - (x - t v)), g = min(b, t/(1-t) (t^2+(1-t)^2)/t^2), t from 1 to 0."""
    steps, torch_kind = 10, {'dtype': torch.float64}
    matrix = torch.randn(8, 8, **torch_kind) * 0.3
    start, previous = torch.randn(1, 16, 8, **torch_kind), torch.randn(1, 16, 8, **torch_kind)
    weights = torch.from_numpy(flow.prefix_weights(3, 9, 16))

    x = start
    for step in range(steps):
        t = 1.0 - step / steps
        v = -(torch.tanh(x @ matrix) + t)  # noise minus chunk
        g = 10.0 if t == 1.0 else min(10.0, t / (1 - t) * (t**2 + (1 - t) ** 2) / t**2)
        v = v - g * weights[:, None] * (previous - (x - t * v))
        x = x - v / steps

    def forward(x, step):
        return torch.tanh(x @ matrix) + (1.0 - step / steps)

    ours = flow.denoise(forward, start, steps, flow.PrefixGuidance(previous, weights))
    assert torch.allclose(ours, x, atol=1e-12)


@given(time=st.floats(0, 0.999), steps=st.integers(1, 20))
def test_guidance_never_overshoots_the_target(time, steps):
    assert 0 < flow.guidance_weight(time, steps, 10.0) / steps <= 1.0


def test_prefix_weights_are_one_then_fall_then_zero():
    weights = flow.prefix_weights(4, 10, 16)
    expected = [1, 1, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0, 0, 0, 0, 0, 0]
    assert np.allclose(weights, expected)


@given(frozen=st.integers(0, 20), overlap=st.integers(0, 20), steps=st.integers(1, 20))
def test_prefix_weights_stay_between_zero_and_one_and_never_rise(frozen, overlap, steps):
    weights = flow.prefix_weights(frozen, overlap, steps)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (np.diff(weights) <= 0).all()
    assert (weights[overlap:] == 0).all()


def test_noise_is_what_its_documentation_says():
    generator = np.random.Generator(np.random.Philox(key=7))
    assert np.array_equal(flow.noise(7, (16, 8)), generator.standard_normal((16, 8)).astype('f4'))
    assert not np.array_equal(flow.noise(7, (16, 8)), flow.noise(8, (16, 8)))


@pytest.mark.parametrize('seed', [-1, 2**64])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match='seed is'):
        flow.noise(seed, (2,))


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match='at least one denoising step'):
        flow.flow_times(0)
