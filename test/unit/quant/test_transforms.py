# SPDX-License-Identifier: Apache-2.0
"""Transforms change the numbers a layer rounds, never the function it computes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantvla_ros.quant.transforms import (
    InputTransform,
    block_size,
    duquant_rotation,
    fast_hadamard,
    from_tensors,
    hadamard_matrix,
    smoothing_diagonal,
    snake_permutation,
    svd_hadamard_rotation,
    svd_rotation,
    two_pointer_permutation,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outliers(tokens, k, seed=0):
    x = normal(tokens, k, seed=seed)
    x[:, 3] *= 60.0
    x[:, 7] *= 25.0
    return x


def assert_orthogonal(blocks):
    b = blocks.shape[-1]
    eye = torch.eye(b, dtype=torch.float64)
    product = blocks.reshape(-1, b, b) @ blocks.reshape(-1, b, b).transpose(1, 2)
    torch.testing.assert_close(product, eye.expand_as(product), atol=1e-10, rtol=0)


@pytest.mark.parametrize('n', [1, 2, 8, 64])
def test_hadamard_is_orthogonal_and_the_fast_form_agrees(n):
    h = hadamard_matrix(n)
    assert_orthogonal(h)
    x = normal(5, 3 * n)
    dense = (x.reshape(5, 3, n) @ h).reshape(5, 3 * n)
    torch.testing.assert_close(fast_hadamard(x, n), dense, atol=1e-12, rtol=0)


def test_hadamard_twice_gives_the_input_back():
    x = normal(4, 128)
    torch.testing.assert_close(fast_hadamard(fast_hadamard(x, 64), 64), x, atol=1e-12, rtol=0)


@pytest.mark.parametrize(('k', 'block'), [(384, 64), (720, 16), (896, 64), (9, 1)])
def test_block_size_is_the_largest_power_of_two_that_divides(k, block):
    assert block_size(k) == block


@given(seed=st.integers(0, 1000), tiers=st.integers(1, 16), blocks=st.integers(1, 12))
def test_snake_dealing_is_a_permutation_that_balances_the_blocks(seed, tiers, blocks):
    energy = normal(tiers * blocks, seed=seed).abs()
    perm = snake_permutation(energy, tiers)
    assert sorted(perm.tolist()) == list(range(tiers * blocks))
    sums = energy[perm].reshape(blocks, tiers).sum(1)
    assert float(sums.max() - sums.min()) <= float(energy.max() - energy.min()) + 1e-12


def test_the_published_zigzag_leaves_blocks_unbalanced_and_ours_does_not():
    energy = torch.arange(256, dtype=torch.float64) ** 4
    spread = {}
    for name, perm in (
        ('two_pointer', two_pointer_permutation(energy)),
        ('snake', snake_permutation(energy, 64)),
    ):
        sums = energy[perm].reshape(4, 64).sum(1)
        spread[name] = float(sums.max() / sums.min())
    assert spread['snake'] < 1.1 < 3 < spread['two_pointer']


def test_svd_rotation_concentrates_and_the_hadamard_then_equalises():
    w = normal(96, 128) * torch.linspace(0.1, 4.0, 128, dtype=torch.float64)
    for rotation, equal in ((svd_rotation(w, 64), False), (svd_hadamard_rotation(w, 64), True)):
        assert_orthogonal(rotation)
        norms = InputTransform(blocks=rotation).weight(w).pow(2).sum(0).reshape(2, 64)
        ratio = norms.amax(1) / norms.amin(1)
        assert bool((ratio < 1 + 1e-9).all()) is equal


def test_duquant_rotation_lowers_the_peak():
    x = outliers(200, 64)
    rotation = duquant_rotation(x, 16)
    assert_orthogonal(rotation)
    rotated = InputTransform(blocks=rotation[None]).activations(x)
    assert rotated.abs().max() < 0.5 * x.abs().max()


def test_smoothing_moves_the_outlier_from_activations_to_weights():
    x, w = outliers(200, 32), normal(16, 32, seed=1)
    s = smoothing_diagonal(x.abs().amax(0), w)
    t = InputTransform(diagonal=s)
    ratio = x.abs().amax(0).max() / x.abs().amax(0).median()
    after = t.activations(x).abs().amax(0)
    assert after.max() / after.median() < 0.3 * ratio


def transforms(k, w, x):
    perm = snake_permutation(w.pow(2).mean(0), 16)
    s = smoothing_diagonal(x.abs().amax(0), w)
    return {
        'identity': InputTransform(),
        'smooth': InputTransform(diagonal=s),
        'hadamard': InputTransform(hadamard=16),
        'all': InputTransform(s, perm, 16),
        'svd': InputTransform(s, perm, blocks=svd_hadamard_rotation((w * s)[:, perm], 16)),
        'shared': InputTransform(blocks=duquant_rotation(x, 16)[None]),
        'chain': InputTransform(s, blocks=duquant_rotation(x, 16)[None]).followed_by(
            InputTransform(permutation=perm, hadamard=16)
        ),
    }


@pytest.mark.parametrize(
    'name', ['identity', 'smooth', 'hadamard', 'all', 'svd', 'shared', 'chain']
)
def test_a_transform_keeps_the_layer_function(name):
    x, w = outliers(40, 64), normal(24, 64, seed=1)
    t = transforms(64, w, x)[name]
    torch.testing.assert_close(
        t.activations(x) @ t.weight(w).T, x @ w.T, atol=1e-9, rtol=1e-9
    )
    assert t.is_identity is (name == 'identity')
    seen = t.activations(x)
    torch.testing.assert_close(t.gram(x.T @ x), seen.T @ seen, atol=1e-8, rtol=1e-9)
    again = from_tensors(t.tensors(), t.hadamards())
    assert torch.equal(again.activations(x), seen)


def test_a_transform_with_two_rotations_is_refused():
    with pytest.raises(ValueError, match='not both'):
        InputTransform(hadamard=16, blocks=torch.eye(16)[None])


@pytest.mark.parametrize(
    'call',
    [
        lambda: hadamard_matrix(12),
        lambda: fast_hadamard(torch.ones(2, 12), 8),
        lambda: snake_permutation(torch.ones(10), 4),
        lambda: from_tensors({'shear': torch.ones(4)}, [0]),
        lambda: from_tensors({'then.diagonal': torch.ones(4)}, [0]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(call):
    with pytest.raises(ValueError):
        call()
