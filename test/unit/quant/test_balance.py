# SPDX-License-Identifier: Apache-2.0
"""Alpha and beta: the published ratio, least squares, and folds that cost and lose nothing."""

import math

import pytest
import torch

from quantvla_ros.quant.balance import (
    Fold,
    alpha_fold,
    beta_fold,
    keeps_helping,
    output_statistics,
    temperature_statistics,
    to_band,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_both_fits_find_a_pure_change_of_temperature():
    truth = torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64)
    found = temperature_statistics(3)
    for call in range(5):
        teacher = normal(3, 200, seed=call)
        found.add(teacher, teacher / truth[:, None] + 7.0)  # softmax ignores the shift
    torch.testing.assert_close(found.ratio(), truth)
    torch.testing.assert_close(found.least_squares(), truth)


def test_noise_raises_the_spread_but_not_the_least_squares_factor():
    found = temperature_statistics(1)
    for call in range(20):
        teacher = normal(1, 500, seed=call)
        found.add(teacher, teacher + normal(1, 500, seed=1000 + call))
    assert float(found.ratio()) == pytest.approx(1 / math.sqrt(2), rel=0.05)
    assert float(found.least_squares()) == pytest.approx(0.5, rel=0.1)


def test_least_squares_never_raises_the_error_it_was_fitted_on():
    teacher, student = normal(4, 300), normal(4, 300) + 0.5 * normal(4, 300, seed=9)
    found = temperature_statistics(4)
    found.add(teacher, student)
    t, s = (x - x.mean(-1, keepdim=True) for x in (teacher, student))
    fitted = (t - found.least_squares()[:, None] * s).pow(2).sum(-1)
    assert bool((fitted <= (t - s).pow(2).sum(-1)).all())


def test_output_balance_keeps_the_mean_of_the_values():
    found = output_statistics()
    found.add(torch.full((1, 10), 3.0), torch.full((1, 10), 2.0))
    assert float(found.ratio()) == pytest.approx(1.5)


def test_band_and_clip_work_in_the_log_domain():
    factors = torch.tensor([1.02, 1 / 1.02, 1.2, 9.0, 0.01, float('nan'), 0.0])
    banded = to_band(factors)
    expected = [1.0, 1.0, 1.2, math.exp(0.4), math.exp(-0.4), 1.0, math.exp(-0.4)]
    torch.testing.assert_close(banded, torch.tensor(expected, dtype=torch.float64), rtol=1e-6,
                               atol=0)


def test_folding_alpha_into_q_scales_the_logits_of_its_head_exactly():
    heads, dim = 3, 8
    weight, bias = normal(24, 16), normal(24)
    x, keys = normal(5, 16, seed=2), normal(5, 24, seed=3)
    alpha = torch.tensor([0.7, 1.0, 1.4], dtype=torch.float64)
    fold = alpha_fold(alpha, dim)

    def logits(w, b):
        q = (x @ w.T + b).reshape(5, heads, dim).transpose(0, 1)
        return q @ keys.reshape(5, heads, dim).permute(1, 2, 0)

    folded = logits(fold.scale(weight), fold.scale(bias))
    torch.testing.assert_close(folded, alpha[:, None, None] * logits(weight, bias))


def test_a_fold_leaves_the_base_untouched():
    base = normal(6, 2).abs()
    kept = base.clone()
    beta_fold(1.3, 6).scale(base)
    assert torch.equal(base, kept)


@pytest.mark.parametrize('value', [0.0, -1.0, float('nan'), float('inf')])
def test_a_fold_that_is_not_finite_and_positive_is_refused(value):
    with pytest.raises(ValueError, match='finite and positive'):
        Fold(torch.tensor([1.0, value]))


def test_a_factor_is_kept_only_with_confidence():
    before = 1.0 + 0.1 * normal(64)
    assert keeps_helping(before, before - 0.05)
    assert not keeps_helping(before, before + 0.05)
    assert not keeps_helping(before, before + 0.1 * normal(64, seed=5))
    assert not keeps_helping(before[:1], before[:1] - 1)
