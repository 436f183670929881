# SPDX-License-Identifier: Apache-2.0
"""Programs: a recorded sequence gives what its steps give one by one."""

import pytest
import torch
from kernel_cases import far, packed

from quantvla_ros.kernels import dispatch, reference
from quantvla_ros.kernels.program import Norm, Program


@pytest.mark.parametrize('heads, kv_heads, queries, keys, batch, dim', [
    (6, 2, 16, 149, 1, 64), (8, 2, 149, 149, 1, 64), (6, 6, 64, 64, 2, 64), (2, 1, 3, 1, 3, 32)])
@pytest.mark.parametrize('rotated', [True, False])
def test_attention_agrees_with_torch(heads, kv_heads, queries, keys, batch, dim, rotated):
    q = torch.randn(batch * queries, heads * dim)
    both = torch.randn(batch * keys, 2 * kv_heads * dim)
    k, v = both.split(kv_heads * dim, 1)
    angle = torch.rand(max(queries, keys), dim // 2) * 6
    rotary = (angle.cos(), angle.sin()) if rotated else None
    y = torch.full_like(q, torch.nan)
    program = Program()
    program.attention(q, k, v, y, heads=heads, kv_heads=kv_heads, batch=batch, rotary=rotary)
    program.run()
    truth = reference.attention(
        q.view(batch, queries, heads, dim), k.reshape(batch, keys, kv_heads, dim),
        v.reshape(batch, keys, kv_heads, dim), *(rotary or ()))
    assert far(y, truth.reshape(y.shape)) < 2e-6


def test_attention_is_stable_for_large_scores():
    q, k, v = torch.randn(4, 64) * 300, torch.randn(40, 64) * 300, torch.randn(40, 64)
    y = torch.empty(4, 64)
    program = Program()
    program.attention(q, k, v, y, heads=1, kv_heads=1)
    program.run()
    truth = reference.attention(*(t.view(1, -1, 1, 64).double() for t in (q, k, v)))
    assert far(y, truth.view(4, 64)) < 1e-4


def block(program, x, layers, norm):
    qkv, hidden = torch.empty(16, 3 * 64), torch.empty(16, 64)
    program.linear(layers[0], x, qkv, norm=norm)
    program.attention(qkv[:, :64], qkv[:, 64:128], qkv[:, 128:], hidden, heads=1, kv_heads=1)
    program.linear(layers[1], hidden, x, residual=x, gate=torch.ones(64) / 2)


def test_a_program_equals_its_reference_form(monkeypatch):
    weights_of = [packed(192, 64, 8), packed(64, 64, 8)]
    norm = Norm(1e-6, torch.rand(64), torch.rand(64))
    start = torch.randn(16, 64)
    x = start.clone()
    program = Program()
    for _ in range(3):
        block(program, x, [dispatch.prepare(w) for w in weights_of], norm)
    program.run()
    y = start.clone()
    plain = Program()
    plain._library = None
    for _ in range(3):
        block(plain, y, [dispatch.prepare(w) for w in weights_of], norm)
    plain.run()
    # a value near a tie may round to the other integer, because the norm sums in another order
    assert far(x, y) < 2e-2 and far(x, y) < far(x, start) / 20


def test_a_normed_layer_equals_norm_then_layer_but_for_ties():
    weight = packed(50, 300, 8)
    norm = Norm(1e-6, torch.rand(300), torch.randn(300))
    x, y = torch.randn(7, 300) * 5, torch.empty(7, 50)
    program = Program()
    program.linear(dispatch.prepare(weight), x, y, norm=norm)
    program.run()
    truth = reference.linear(reference.normalize(x, norm.eps, norm.multiply, norm.add), weight)
    near = (y - truth).abs() < 1e-4 * truth.abs().max()
    assert far(y, truth) < 1e-2 and near.float().mean() > 0.9


def test_layers_that_quantize_the_same_tokens_share_that_and_others_do_not():
    x, diagonal = torch.randn(9, 128), torch.rand(128) + 0.5
    made = [dispatch.prepare(packed(20, 128, 4), diagonal=diagonal),
            dispatch.prepare(packed(30, 128, 8), diagonal=diagonal.clone()),  # the same tokens
            dispatch.prepare(packed(30, 128, 8)),  # no diagonal
            dispatch.prepare(packed(30, 128, 8), act_bits=4),  # other bits
            dispatch.prepare(packed(30, 128, 8, 64), act_bits=4)]  # other groups
    whole = torch.empty(9, sum(layer.n for layer in made))
    outs = whole.split([layer.n for layer in made], 1)
    program = Program()
    for layer, y in zip(made, outs, strict=True):
        program.linear(layer, x, y)
    program.run()
    for layer, y in zip(made, outs, strict=True):
        assert torch.equal(y, layer(x))


def test_tokens_that_were_written_in_between_are_quantized_again():
    first, second = (dispatch.prepare(packed(128, 128, 8)) for _ in range(2))
    x, y = torch.randn(9, 128), torch.empty(9, 128)
    truth = second(first(x))
    program = Program()
    program.linear(first, x, x)
    program.linear(second, x, y)
    program.run()
    assert torch.equal(y, truth)


def test_a_factor_multiplies_before_gate_and_residual(monkeypatch):
    layer = dispatch.prepare(packed(70, 64, 8))
    x, factor, gate = torch.randn(5, 64), torch.randn(5, 70), torch.randn(70)
    residual, y = torch.randn(5, 70), torch.empty(5, 70)
    program = Program()
    program.linear(layer, x, y, factor=factor, gate=gate, residual=residual)
    program.run()
    assert far(y, layer(x) * factor * gate + residual) < 1e-6
    native_y = y.clone()
    program._library = None
    program.run()
    assert far(y, native_y) < 1e-6


def test_gathered_keys_serve_several_attentions():
    q = [torch.randn(5, 128) for _ in range(2)]
    k, v, y, truth = (torch.randn(33, 64), torch.randn(33, 64), torch.empty(5, 128),
                      torch.empty(5, 128))
    cells = Program.cells(33, 1, 64)
    gather = Program()
    gather.gather(k, v, cells, kv_heads=1)
    gather.run()
    for queries in q:
        for out, given in ((y, cells if cells.numel() else None), (truth, None)):
            program = Program()
            program.attention(queries, k, v, out, heads=2, kv_heads=1, cells=given)
            program.run()
        assert torch.equal(y, truth)


@pytest.mark.parametrize('call, words', [
    (dict(factor=torch.zeros(4, 40)[:, :20]), 'row distance'),
    (dict(x=torch.zeros(4, 63)), 'x is'),
    (dict(x=torch.zeros(4, 64).half()), 'x is'),
    (dict(y=torch.zeros(5, 20)), 'rows'),
    (dict(gate=torch.zeros(19)), 'gate'),
    (dict(residual=torch.zeros(4, 40)[:, :20]), 'row distance'),
    (dict(norm=Norm(1e-6, torch.zeros(63))), 'norm.multiply'),
])
def test_a_step_that_does_not_fit_is_refused_when_it_is_recorded(call, words):
    good = dict(x=torch.zeros(4, 64), y=torch.zeros(4, 20))
    with pytest.raises(ValueError, match=words):
        Program().linear(dispatch.prepare(packed(20, 64, 4)), **{**good, **call})
