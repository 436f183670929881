# SPDX-License-Identifier: Apache-2.0
"""Every path against the reference: integers bit for bit, floats to 1e-6, and bad input."""

import os
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import EXACT, far, packed, shapes, summed

from quantvla_ros.kernels import reference, weights
from quantvla_ros.kernels.layer import Options, ReferenceLayer, Seen, make_native

GENERATED = settings(max_examples=30, deadline=None,
                     suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(library, weight, bias=None, up=None, up_bias=None, **options):
    return make_native(library, weight, bias, Options(**options), up, up_bias)


@GENERATED
@given(shape=shapes(), act_bits=st.sampled_from([3, 4, 8]))
def test_integer_sums_are_exact(library, shape, act_bits):
    tokens, rows, columns, bits, group = shape
    weight = packed(rows, columns, bits, group, scale=1.0)
    top = int(reference.TOP[act_bits])
    x = torch.randint(-top, top + 1, (tokens, columns)).float()
    x[0] = top
    sums = reference.accumulate(x.to(torch.int8), weight).sum(-1)
    if int(sums.abs().max()) < EXACT:
        y = make(library, weight, act_bits=act_bits)(x, act_scale=1.0)
        assert torch.equal(y.long(), sums)


def test_the_longest_sum_that_is_served_does_not_overflow(library):
    columns = weights.MAX_COLUMNS
    weight = weights.pack(torch.full((3, columns), 127), torch.ones(3), 8)
    x = torch.full((1, columns), 127.0)
    y = make(library, weight)(x, act_scale=1.0)
    assert y.tolist() == [[float(torch.tensor(127.0 * 127.0 * columns))] * 3]


@GENERATED
@given(shape=shapes(), act_bits=st.sampled_from([3, 4, 8]), data=st.data())
def test_floats_agree_with_the_reference(library, shape, act_bits, data):
    tokens, rows, columns, bits, group = shape
    gated = data.draw(st.booleans())
    hadamard = 64 if columns % 64 == 0 and data.draw(st.booleans()) else 0
    activation = data.draw(st.sampled_from(['none', 'silu', 'gelu_tanh']))
    weight = packed(rows, columns, bits, group, scale=0.1)
    up = packed(rows, columns, data.draw(st.sampled_from([4, 8])), group) if gated else None
    bias = torch.randn(rows)
    x = torch.randn(tokens, columns)
    diagonal = torch.rand(columns) + 0.5 if data.draw(st.booleans()) else None
    options = dict(act_bits=act_bits, hadamard=hadamard, activation=activation,
                   diagonal=diagonal)
    call = dict(gate=torch.randn(rows), residual=torch.randn(tokens, rows))
    y = make(library, weight, bias, up, bias if gated else None, **options)(x, **call)
    truth = reference.linear(x, weight, bias, up=up, up_bias=bias if gated else None,
                             **options, **call)
    tokens_seen = reference.transform_tokens(x, diagonal, hadamard)
    size = summed(tokens_seen, weight, bias, act_bits)
    if gated:
        size = size * summed(tokens_seen, up, bias, act_bits)
    size = size * call['gate'].abs() + call['residual'].abs()
    assert ((y - truth).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize('group', [0, 32, 64, 128])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_blocks_of_many_tokens_and_long_rows_are_exact(library, bits, group):
    """Cut in every way that a path knows: blocks, tall and flat tiles, pieces of the columns."""
    columns = 2176 if not group else 1152
    weight = packed(70, columns, bits, group)
    whole = weights.pack(weights.unpack(weight), torch.ones(70, 1), bits)
    for tokens in (16, 33, 97):
        x = torch.randint(-7, 8, (tokens, columns)).float()
        x[:, 0] = 7
        sums = reference.accumulate(x.to(torch.int8), whole).sum(-1)
        assert int(sums.abs().max()) < EXACT
        y = make(library, whole, act_bits=4)(x, act_scale=1.0)
        assert torch.equal(y.long(), sums)
        y = make(library, weight, act_bits=4)(x, act_scale=1.0)
        assert far(y, reference.linear(x, weight, act_bits=4, act_scale=1.0)) < 1e-6


def test_rows_of_five_widths_come_from_one_call(library):
    order = torch.randperm(200)
    cuts = [(16, 0, 10), (8, 10, 80), (4, 80, 150), (2, 150, 190)]
    weight = weights.mix([(packed(b - a, 128, bits), order[a:b]) for bits, a, b in cuts], 200)
    x, bias = torch.randn(9, 128), torch.randn(200)
    y = make(library, weight, bias)(x)
    assert far(y, reference.linear(x, weight, bias)) < 1e-6
    assert torch.equal(y[:, order[190:]], bias[order[190:]].expand(9, -1))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(library, dtype):
    weight = packed(70, 96, 4, 32, scale=0.01)
    x, residual = torch.randn(50, 96).to(dtype), torch.randn(50, 70).to(dtype)
    for act_bits in (8, 4):  # many halves lie exactly between two integers
        y = make(library, weight, act_bits=act_bits)(x, residual=residual)
        truth = reference.linear(x, weight, act_bits=act_bits, residual=residual)
        assert y.dtype == dtype
        assert far(y, truth) <= torch.finfo(dtype).eps


def test_every_half_value_survives_the_way_in_and_out(library):
    weight = weights.keep(torch.eye(1))
    bits = torch.arange(0, 65536, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[:, None]
        x = x[torch.isfinite(x)][:, None]
        assert torch.equal(make(library, weight)(x), x)


def test_a_token_that_is_not_finite_is_nan_and_alone(library):
    for weight in (packed(40, 64, 4), weights.mix(
            [(packed(20, 64, 4), torch.arange(20)), (packed(10, 64, 16), torch.arange(20, 30))],
            40)):
        x = torch.randn(4, 64)
        clean = make(library, weight)(x)
        x[1, 3], x[2, 63] = torch.nan, -torch.inf
        for scale in (None, 0.1):
            y = make(library, weight)(x, act_scale=scale)
            assert torch.isnan(y[1:3]).all() and torch.isfinite(y[[0, 3]]).all()
        assert torch.equal(make(library, weight)(x)[[0, 3]], clean[[0, 3]])


def test_zero_and_denormal_tokens_give_the_bias(library):
    bias = torch.randn(20)
    x = torch.zeros(3, 64)
    x[1] = 1e-42
    y = make(library, packed(20, 64, 4), bias)(x)
    assert torch.equal(y, bias.expand(3, -1))


def test_no_tokens_give_no_tokens(library):
    layer = make(library, packed(20, 64, 4))
    assert layer(torch.empty(0, 64)).shape == (0, 20)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 20)


def test_leading_dimensions_and_strides_do_not_matter(library):
    layer = make(library, packed(20, 64, 4, 32))
    wide = torch.randn(3, 5, 128)
    x = wide[..., ::2]
    assert torch.equal(layer(x), layer(x.contiguous().view(15, 64)).view(3, 5, 20))
    assert torch.equal(layer(x[0, 0]), layer(x)[0, 0])


def test_a_misaligned_input_is_read_as_it_is(library):
    layer = make(library, packed(20, 64, 4))
    store = torch.randn(65)
    assert torch.equal(layer(store[1:]), layer(store[1:].clone()))


@pytest.mark.parametrize('call, words', [
    (dict(x=torch.zeros(2, 64, dtype=torch.float64)), 'float64'),
    (dict(x=torch.zeros(2, 64, dtype=torch.int8)), 'int8'),
    (dict(x=torch.zeros(2, 63)), r'expected \(..., 64\)'),
    (dict(x=torch.tensor(1.0)), r'expected \(..., 64\)'),
    (dict(x=torch.zeros(2, 64), residual=torch.zeros(3, 20)), 'residual'),
    (dict(x=torch.zeros(2, 64), residual=torch.zeros(2, 20).half()), 'residual'),
    (dict(x=torch.zeros(2, 64), gate=torch.zeros(21)), 'gate'),
    (dict(x=torch.zeros(2, 64), act_scale=float('nan')), 'act_scale'),
    (dict(x=torch.zeros(2, 64), act_scale=-1.0), 'act_scale'),
])
def test_a_wrong_call_is_refused_with_a_sentence(library, call, words):
    layer = make(library, packed(20, 64, 4))
    with pytest.raises(ValueError, match=words):
        layer(**call)


@pytest.mark.parametrize('threads', [2, 5])  # five: more than this machine may have cores
def test_several_threads_give_the_same_bits_as_one(library, threads):
    layer = make(library, packed(300, 256, 4, 128))
    for tokens in (1, 7, 130):
        x = torch.randn(tokens, 256)
        alone = layer(x)
        library.qv_set_threads(threads)
        together = [layer(x) for _ in range(5)]
        library.qv_set_threads(1)
        assert all(torch.equal(y, alone) for y in together)


def test_the_padding_of_a_token_stays_out_of_the_next_threads_line(library):
    """Lines are padded farther where K is a multiple of 512, and once that was the neighbour's."""
    layer = make(library, packed(64, 512, 8), hadamard=64)
    x = torch.randn(200, 512)
    alone = layer(x)
    library.qv_set_threads(2)
    together = [layer(x) for _ in range(60)]
    library.qv_set_threads(1)
    assert all(torch.equal(y, alone) for y in together)


def test_threads_that_wait_for_a_call_cost_nothing(library):
    library.qv_set_threads(3)
    layer = make(library, packed(90, 128, 4))
    layer(torch.randn(33, 128))
    began = time.process_time()
    time.sleep(0.1)
    used = time.process_time() - began
    library.qv_set_threads(1)
    assert used < 0.02  # they spin for a moment first


def test_a_watched_layer_tells_what_its_tokens_were(library):
    diagonal = torch.linspace(0.5, 2.0, 128)
    layers = [make(library, packed(20, 128, 4), diagonal=diagonal, hadamard=64),
              ReferenceLayer(packed(20, 128, 4), None,
                             Options(diagonal=diagonal, hadamard=64), None, None)]
    x = torch.randn(9, 128)
    x[4, 7] = torch.nan
    for layer in layers:
        layer(x)
        assert layer.seen() == Seen()
        layer.watch()
        layer(x)
        layer(x[:2], act_scale=0.001)
    amax = reference.transform_tokens(x, diagonal, 64).abs().amax(-1)
    amax = torch.cat([amax[amax.isfinite()], amax[:2]])
    for seen in [layer.seen() for layer in layers]:
        assert (seen.tokens, seen.broken, seen.clipped) == (10, 1, 2)
        assert seen.largest == pytest.approx(float(amax.max()), rel=1e-6)
        assert seen.mean == pytest.approx(float(amax.mean()), rel=1e-6)
    assert all(layer.seen() == Seen() for layer in layers)


def test_two_callers_take_turns(library):
    library.qv_set_threads(2)
    layers = [make(library, packed(90, 128, bits)) for bits in (4, 8)]
    x = torch.randn(33, 128)
    truth = [layer(x) for layer in layers]
    wrong = []

    def call(index):
        for _ in range(40):
            if not torch.equal(layers[index](x), truth[index]):
                wrong.append(index)

    callers = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    library.qv_set_threads(1)
    assert wrong == []


def test_a_forked_child_makes_threads_of_its_own(library):
    library.qv_set_threads(2)
    layer = make(library, packed(90, 128, 4))
    x = torch.randn(33, 128)
    truth = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), truth) else 1)
    _, status = os.waitpid(child, 0)
    library.qv_set_threads(1)
    assert status == 0
