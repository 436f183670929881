# SPDX-License-Identifier: Apache-2.0
"""GPTQ against a brute-force reference, and against nearest rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantvla_ros.quant.pack import absmax_scale
from quantvla_ros.quant.rounding import (
    expected_error,
    gptq,
    gptq_searched,
    layer_error,
    round_nearest,
    row_output_errors,
)
from quantvla_ros.quant.scheme import PerGroup, PerRow, PerTensor, qmax


def problem(seed, rows, k, tokens=64):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64)
    x = torch.randn(tokens, k, generator=g, dtype=torch.float64) @ mix
    w = torch.randn(rows, k, generator=g, dtype=torch.float64)
    return w, x.T @ x / tokens


def brute_force(weight, hessian, bits, scale, damp):
    """Fix column after column; re-solve the free columns by least squares every time."""
    h = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, fixed = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        code = (w[:, j] / scale).round().clamp(-qmax(bits), qmax(bits))
        fixed[:, j] = code * scale
        d = fixed[:, : j + 1] - weight[:, : j + 1]
        free = h[j + 1 :, j + 1 :]
        if len(free):
            w[:, j + 1 :] = weight[:, j + 1 :] - d @ h[: j + 1, j + 1 :] @ torch.linalg.inv(free)
    return fixed


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    k=st.integers(2, 24),
    bits=st.sampled_from([3, 4, 8]),
)
def test_gptq_equals_brute_force_least_squares(seed, rows, k, bits):
    w, h = problem(seed, rows, k)
    ours = gptq(w, h, bits, PerRow(), search=False)
    scale = absmax_scale(w.float(), bits, PerRow())[:, 0].double()
    reference = brute_force(w, h, bits, scale, 0.01)
    agree = (ours.dequantized().double() - reference).abs() < 1e-4 * scale[:, None]
    assert float(agree.double().mean()) > 0.99  # a tie of a rounding may fall either way
    assert layer_error(w, ours.dequantized(), h) <= 1.02 * layer_error(w, reference, h)


def test_blocks_of_columns_change_nothing(monkeypatch):
    w, h = problem(1, 5, 96, tokens=256)
    whole = gptq(w, h, 4, PerGroup(32))
    monkeypatch.setattr('quantvla_ros.quant.rounding.GPTQ_BLOCK', 16)
    cut = gptq(w, h, 4, PerGroup(32))
    torch.testing.assert_close(whole.scale, cut.scale)
    assert float((whole.codes == cut.codes).double().mean()) > 0.995


@pytest.mark.parametrize('granularity', [PerRow(), PerGroup(16)])
@pytest.mark.parametrize('bits', [3, 4])
def test_gptq_beats_nearest_on_the_layers_own_error(bits, granularity):
    for seed in range(5):
        w, h = problem(seed, 16, 64, tokens=256)
        nearest = round_nearest(w, bits, granularity, search=True)
        better = gptq(w, h, bits, granularity)
        assert layer_error(w, better.dequantized(), h) < layer_error(w, nearest.dequantized(), h)


def test_act_order_is_undone_in_the_result():
    w, h = problem(3, 4, 32, tokens=128)
    ordered = gptq(w, h, 8, PerRow(), act_order=True)
    assert float((ordered.dequantized().double() - w).abs().max()) < 0.3


def test_an_input_that_never_fires_is_rounded_to_nearest():
    w, h = problem(2, 4, 8)
    h[5, :] = h[:, 5] = 0
    rounded = gptq(w, h, 4, PerRow(), search=False)
    scale = absmax_scale(w.float(), 4, PerRow())[:, 0]
    assert torch.equal(rounded.codes[:, 5].float(), (w[:, 5].float() / scale).round())


def test_each_row_keeps_the_clip_with_the_least_output_error():
    w, h = problem(5, 12, 64, tokens=256)
    w[:6, 3] *= 6  # an outlier that is worth clipping or not
    clips = (1.0, 0.8, 0.6)
    alone = torch.stack([
        row_output_errors(w, gptq_searched(w, h, 3, [clip]).dequantized(), h) for clip in clips
    ])
    found = row_output_errors(w, gptq_searched(w, h, 3, clips).dequantized(), h)
    torch.testing.assert_close(found, alone.amin(0))
    assert len(set(alone.argmin(0).tolist())) > 1


def test_noise_of_tokens_adds_its_own_error_to_the_expected_one():
    w, h = problem(6, 8, 32, tokens=4000)
    g = torch.Generator().manual_seed(1)
    noise = 0.3 * float(h.diagonal().mean())
    n = noise**0.5 * torch.randn(20_000, 32, generator=g, dtype=torch.float64)
    found = float((n @ w.T).pow(2).sum(1).mean())
    assert found == pytest.approx(expected_error(w, h, noise, 16), rel=0.03)


@pytest.mark.parametrize('bits', [4, 8])
def test_the_expected_error_is_near_what_gptq_leaves(bits):
    w, h = problem(7, 32, 64, tokens=1000)
    found = layer_error(w, gptq(w, h, bits, PerRow(), search=False, damp=0).dequantized(), h)
    assert found == pytest.approx(expected_error(w, h, 0.0, bits, damp=0.0), rel=0.25)


@pytest.mark.parametrize(
    'call',
    [
        lambda w, h: gptq(w, h, 4, PerTensor()),
        lambda w, h: gptq(w, h, 4, PerGroup(4), act_order=True),
        lambda w, h: gptq(w, h, 4, PerGroup(3)),
    ],
)
def test_granularities_that_cannot_work_are_refused(call):
    with pytest.raises(ValueError):
        call(*problem(0, 2, 8))
