# SPDX-License-Identifier: Apache-2.0
"""Products that end in more than the plain one, against it and against exact sums."""

import pytest
import torch
from cases import error, poisoned, random_weight
from test_product import on, quantized, wanted

from quantvla_ros.kernels import reference
from quantvla_ros.kernels.cuda import pack
from quantvla_ros.kernels.cuda.launch import Turned, run_product
from quantvla_ros.kernels.cuda.launch_attention import Turn, run_turn
from quantvla_ros.kernels.cuda.launch_fused import run_pair, run_raw, run_turned
from quantvla_ros.kernels.cuda.tiles import Tile


@pytest.mark.parametrize(('bits', 'group'), [(8, 0), (4, 0), (4, 128)])
def test_pair_with_rows_in_eights_is_activated_and_multiplied(bits, group, device):
    first, second = (random_weight(bits, 72, 256, group) for _ in 'gu')
    q, scale = quantized(18, 256, device)
    biases = [torch.randn(72), None]
    moved = pack.interleaved(*(pack.to_device(w, device) for w in (first, second)))
    both = pack.pair_of_biases(*biases, 72).to(device)
    out = poisoned(18, 72, device=device)
    run_pair(on(device, q, scale, moved), moved, out, 'silu', both,
             tile=Tile(16, 32, 64, 2, 4, 1))
    y = reference.ACTIVATIONS['silu'](wanted(q, scale, first) + biases[0].double())
    assert error(out, y * wanted(q, scale, second)) < 1e-6


def test_halves_of_different_bits_make_no_pair(device):
    halves = [pack.to_device(random_weight(bits, 16, 128), device) for bits in (8, 4)]
    with pytest.raises(ValueError, match='same bits and group'):
        pack.interleaved(*halves)
    odd = pack.to_device(random_weight(8, 12, 128), device)
    with pytest.raises(ValueError, match='rows come in eights; 12 do not'):
        pack.interleaved(odd, odd)


@pytest.mark.parametrize(('bits', 'group'), [(8, 0), (4, 0), (4, 128)])
def test_raw_sums_of_all_splits_give_the_product(bits, group, device):
    weight = random_weight(bits, 70, 512, group)
    moved = pack.to_device(weight, device)
    q, scale = quantized(5, 512, device)
    kind = torch.float32 if group else torch.int32
    out = torch.full((4, 5, 70), -(1 << 30), dtype=kind, device=device)
    run_raw(on(device, q, scale, moved), moved, out, Tile(16, 32, 64, 2, 4, 4))
    seen = out.double().sum(0).cpu() * scale.double()
    if not group:
        seen = seen * weight.scales.double().T
    assert error(seen, wanted(q, scale, weight)) < (1e-6 if group else 1e-12)


@pytest.mark.parametrize(('bits', 'tile'), [
    (8, Tile(16, 32, 64, 2, 4, 1)), (4, Tile(32, 128, 64, 2, 4, 1, 1))])
def test_queries_and_keys_are_turned_and_cached_in_the_epilogue(bits, tile, device, workspace):
    heads, groups, width, rows, start = 3, 2, 16, 5, 4
    count = (heads + 2 * groups) * width
    weight = random_weight(bits, count, 128)
    plain = pack.to_device(weight, device)
    q, scale = quantized(rows, 128, device)
    tokens = on(device, q, scale, plain)
    table = torch.rand(2, 16, width // 2, device=device)
    turn = Turn(heads, groups, width, *table)
    length = torch.tensor([start], dtype=torch.int32, device=device)
    y = poisoned(rows, count, device=device)
    run_product(tokens, plain, y, workspace, tile=tile)
    expected = [poisoned(rows, heads * width, device=device),
                *(torch.zeros(16, groups * width, device=device) for _ in 'kv')]
    run_turn(y, turn, *expected, length)
    seen = [poisoned(rows, heads * width, device=device),
            *(torch.zeros(16, groups * width, device=device) for _ in 'kv')]
    run_turned(tokens, pack.paired(plain, width), seen[0], Turned(
        *table, *seen[1:], heads * width, (heads + groups) * width, length), tile=tile)
    for ours, theirs in zip(seen, expected, strict=True):
        assert error(ours, theirs) < 1e-6
