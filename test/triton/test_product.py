# SPDX-License-Identifier: Apache-2.0
"""The integer product of the GPU kernels against exact sums and the float64 reference."""

import pytest
import torch
from cases import error, poisoned, random_weight

from quantvla_ros.kernels import reference, weights
from quantvla_ros.kernels.cuda import pack, product
from quantvla_ros.kernels.cuda.launch import Epilogue, Tokens, run_product
from quantvla_ros.kernels.cuda.tiles import OVERLAPPED, Tile

FORMS = [(8, 0), (8, 128), (4, 0), (4, 128), (4, 32), (2, 0)]


def quantized(rows, columns, device):
    """Random tokens as the kernels read them: padded with zeros."""
    q, scale = reference.quantize_activations(torch.randn(rows, columns))
    return q, scale


def on(device, q, scale, weight):
    width = weight.padded[1]
    data = torch.nn.functional.pad(q, (0, width - q.shape[1])).to(device)
    return Tokens(data, scale.flatten().to(device))


def wanted(q, scale, weight):
    sums = reference.accumulate(q, weight).double()
    return (sums * weight.scales.double()).sum(-1) * scale.double()


@pytest.mark.parametrize(('bits', 'group'), FORMS)
@pytest.mark.parametrize('bulk', [0, 1])
@pytest.mark.parametrize('split', [1, 3])
def test_product_equals_exact_sums(bits, group, split, bulk, device, workspace):
    weight = random_weight(bits, 70, 384, group)
    moved = pack.to_device(weight, device)
    q, scale = quantized(5, 384, device)
    out = poisoned(5, 70, device=device)
    tile = Tile(16, 32, 32 if group == 32 else 64, 2, 4, split, bulk)
    run_product(on(device, q, scale, moved), moved, out, workspace, tile=tile)
    # without groups the sums are exact and only two scales are rounded
    assert error(out, wanted(q, scale, weight)) < (1e-6 if group else 3e-7)


@pytest.mark.parametrize('bits', [4, 8])
def test_a_tile_of_overlapped_steps_gives_the_same_where_they_cannot_overlap(
    bits, device, workspace
):
    weight = random_weight(bits, 70, 384)
    moved = pack.to_device(weight, device)
    q, scale = quantized(5, 384, device)
    out = poisoned(5, 70, device=device)
    run_product(on(device, q, scale, moved), moved, out, workspace,
                tile=Tile(16, 64, 64, 3, 4, 1, OVERLAPPED))
    assert error(out, wanted(q, scale, weight)) < 3e-7


@pytest.mark.parametrize('columns', [72, 200, 1152])
@pytest.mark.parametrize('bits', [4, 8])
def test_columns_that_fill_no_block_are_padded(columns, bits, device, workspace):
    weight = random_weight(bits, 33, columns)
    moved = pack.to_device(weight, device)
    q, scale = quantized(3, columns, device)
    out = poisoned(3, 33, device=device)
    run_product(on(device, q, scale, moved), moved, out, workspace)
    assert error(out, wanted(q, scale, weight)) < 3e-7


@pytest.mark.parametrize(('split', 'bulk'), [(1, 0), (2, 1)])
@pytest.mark.parametrize('act', ['silu', 'gelu_tanh'])
def test_gated_pair_with_every_part_of_the_epilogue(split, bulk, act, device, workspace):
    first, second = random_weight(4, 64, 256), random_weight(4, 64, 256)
    q, scale = quantized(18, 256, device)
    bias, up_bias, gate = torch.randn(64), torch.randn(64), torch.randn(64)
    residual = torch.randn(18, 64)
    moved = pack.to_device(first, device)
    epilogue = Epilogue(bias.to(device), act, pack.to_device(second, device),
                        up_bias.to(device), gate.to(device), residual.to(device))
    out = poisoned(18, 64, device=device)
    run_product(on(device, q, scale, moved), moved, out, workspace, epilogue,
                tile=Tile(16, 32, 64, 2, 4, split, bulk))
    y = reference.ACTIVATIONS[act](wanted(q, scale, first) + bias.double())
    y = y * (wanted(q, scale, second) + up_bias.double()) * gate.double() + residual.double()
    assert error(out, y) < 1e-6


def test_sum_may_be_added_to_its_own_place(device, workspace):
    weight = random_weight(8, 48, 256)
    moved = pack.to_device(weight, device)
    q, scale = quantized(4, 256, device)
    x = torch.randn(4, 48)
    place = x.clone().to(device)
    run_product(on(device, q, scale, moved), moved, place, workspace,
                Epilogue(residual=place), tile=Tile(16, 32, 64, 2, 4, 2))
    assert error(place, wanted(q, scale, weight) + x.double()) < 1e-6


def test_split_products_leave_their_counters_at_zero(device, workspace):
    weight = random_weight(8, 64, 512)
    moved = pack.to_device(weight, device)
    tokens = on(device, *quantized(4, 512, device), moved)
    tile = Tile(16, 32, 64, 2, 4, 4)
    outs = [poisoned(4, 64, device=device) for _ in range(3)]
    for out in outs:
        run_product(tokens, moved, out, workspace, tile=tile)
    assert int(workspace.count.abs().sum()) == 0
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])


def test_output_rows_may_lie_in_a_wider_buffer(device, workspace):
    weight = random_weight(8, 32, 128)
    moved = pack.to_device(weight, device)
    q, scale = quantized(3, 128, device)
    wide = torch.zeros(3, 80, device=device)
    run_product(on(device, q, scale, moved), moved, wide[:, 16:48], workspace)
    assert error(wide[:, 16:48], wanted(q, scale, weight)) < 3e-7
    assert float(wide[:, :16].abs().sum() + wide[:, 48:].abs().sum()) == 0.0


def test_frozen_workspace_refuses_to_move(workspace):
    workspace.reserve(64, 2)
    before = workspace.partial.data_ptr()
    workspace.freeze()
    workspace.reserve(10, 1)
    assert workspace.partial.data_ptr() == before
    with pytest.raises(RuntimeError, match='more workspace than was planned'):
        workspace.reserve(65, 1)


def test_nibbles_come_back():
    codes = torch.randint(-8, 8, (6, 512), dtype=torch.int8)
    for block in (64, 128, 256):
        assert torch.equal(pack.from_nibbles(pack.nibbles(codes, block), block), codes)


OPERATIONS = {
    'shl.b32': lambda a, b: (a << b) & 0xFFFFFFFF, 'and.b32': lambda a, b: a & b,
    'add.f32': lambda a, b: a + b, 'ex2.approx.ftz.f32': lambda a: 2.0**a,
    'rcp.approx.ftz.f32': lambda a: 1.0 / a,
}


def carried_out(text, operands):
    """What lines of machine code, which the interpreter passes over, leave in their operands."""
    values = dict(operands)
    for line in text.strip('{} ').split(';'):
        operation, _, names = line.strip().partition(' ')
        if operation in OPERATIONS:
            target, *sources = names.split(', ')
            values[target] = OPERATIONS[operation](*(
                values[name] if name in values else
                1.0 if name == '0f3F800000' else int(name, 0) for name in sources))
    return values


def test_machine_code_says_what_the_words_beside_it_say():
    packed = torch.randint(0, 256, (64,), dtype=torch.uint8)
    codes = pack.from_nibbles(packed.view(torch.int8).view(1, -1), 128)[0]
    words = [int.from_bytes(bytes(four), 'little') for four in packed.view(-1, 4).tolist()]
    found = [carried_out(product.NIBBLES.value, {'$2': word}) for word in words]
    for name, wanted in (('$0', codes[:64]), ('$1', codes[64:])):
        seen = b''.join(values[name].to_bytes(4, 'little') for values in found)
        assert torch.equal(torch.frombuffer(bytearray(seen), dtype=torch.int8), wanted * 16)
    share = carried_out(product.SHARE.value, {'$1': 1.5})['$0']
    assert share == pytest.approx(1 / (1 + 2**1.5), rel=1e-12)


def test_mixed_rows_become_one_weight(device, workspace):
    wide, narrow = random_weight(8, 10, 128), random_weight(4, 6, 128)
    order = torch.randperm(18)
    mixed = weights.mix([(wide, order[:10]), (narrow, order[10:16])], 18)
    moved = pack.to_device(mixed, device)
    q, scale = quantized(3, 128, device)
    out = poisoned(3, 18, device=device)
    run_product(on(device, q, scale, moved), moved, out, workspace)
    dense = weights.dequantize(mixed).double()
    assert error(out, (q.double() * scale.double()) @ dense.T) < 1e-6
    with pytest.raises(ValueError, match='16 bits'):
        pack.to_device(weights.keep(torch.randn(4, 64)), device)


def test_stacked_weights_give_the_rows_of_each(device, workspace):
    parts = [random_weight(4, 128, 256), random_weight(4, 40, 256)]
    stacked = pack.stack_rows([pack.to_device(w, device) for w in parts])
    q, scale = quantized(2, 256, device)
    out = poisoned(2, 168, device=device)
    run_product(on(device, q, scale, stacked), stacked, out, workspace)
    assert error(out, torch.cat([wanted(q, scale, w) for w in parts], 1)) < 3e-7
    with pytest.raises(ValueError, match='whole blocks'):
        pack.stack_rows([pack.to_device(w, device) for w in reversed(parts)])
