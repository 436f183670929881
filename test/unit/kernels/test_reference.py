# SPDX-License-Identifier: Apache-2.0
"""The rounding rules and the exactness of the reference itself."""

import torch
from kernel_cases import packed

from quantvla_ros.kernels import reference, weights


def test_integer_sums_equal_those_of_python_integers():
    weight = packed(5, 64, 4, 32)
    q = torch.randint(-127, 128, (3, 64), dtype=torch.int8)
    rows, tokens = weights.unpack(weight).tolist(), q.tolist()
    for m in range(3):
        for n in range(5):
            for g in range(2):
                part = slice(32 * g, 32 * g + 32)
                expected = sum(a * b for a, b in zip(tokens[m][part], rows[n][part], strict=True))
                assert int(reference.accumulate(q, weight)[m, n, g]) == expected


def test_rounding_is_half_to_even_and_the_top_is_reached():
    q, scale = reference.quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5, -127.0]]))
    assert q.tolist() == [[127, 0, 2, 2, -2, -127]]
    assert scale.tolist() == [[1.0]]


def test_four_bit_tokens_stay_within_seven():
    q, scale = reference.quantize_activations(torch.tensor([[14.0, -3.0, 1.0]]), 4)
    assert q.tolist() == [[7, -2, 0]]
    assert scale.tolist() == [[2.0]]


def test_a_static_scale_clips_what_is_beyond_it():
    q, _ = reference.quantize_activations(torch.tensor([[1000.0, -1e30, 3.0]]), 8, 1.0)
    assert q.tolist() == [[127, -127, 3]]


def test_a_zero_token_has_scale_one_and_a_token_that_is_not_finite_is_nan():
    q, scale = reference.quantize_activations(
        torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [torch.nan, 1.0]]))
    assert scale[0].item() == 1.0
    assert torch.isnan(scale[1:]).all() and not q.any()


def test_the_block_hadamard_is_orthogonal_and_symmetric():
    matrix = reference.block_hadamard(torch.eye(64), 64)
    assert torch.allclose(matrix @ matrix, torch.eye(64), atol=1e-6)
    assert torch.equal(matrix, matrix.T)
    two = reference.block_hadamard(torch.eye(128), 64)
    assert torch.equal(two, torch.block_diag(matrix, matrix))


def test_the_quantized_layer_is_near_the_float_one():
    weight = packed(32, 256, 8)
    x = torch.randn(10, 256)
    exact = x @ weights.dequantize(weight).T
    error = (reference.linear(x, weight) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02
