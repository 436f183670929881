# SPDX-License-Identifier: Apache-2.0
"""One kernel of each kind is compiled for chips that are not here, and its machine code read."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch

from quantvla_ros.kernels.cuda import launch_overlapped, overlapped, resources, tiles
from quantvla_ros.kernels.cuda.launch import Turned
from quantvla_ros.kernels.cuda.tiles import Chip, Problem, Tile

HOPPER, ORIN = resources.chip(90), resources.chip(87)
KINDS = [
    (90, resources.product_case(8, 0, 50, 1024, 4096, False, HOPPER, pdl=True)),
    (90, resources.product_case(4, 0, 968, 2048, 16384, False, HOPPER)),
    (90, resources.product_case(4, 128, 50, 1024, 4096, False, HOPPER)),
    (90, resources.fused_case(8, 50, 8192, 1024, 'pair', HOPPER, pdl=True)),
    (90, resources.fused_case(4, 50, 2560, 1024, 'turned', HOPPER, pdl=True)),
    (90, resources.fused_case(4, 50, 1024, 4096, 'raw', HOPPER)),
    (90, resources.fused_case(8, 968, 32768, 2048, 'pair', HOPPER,
                              tile=Tile(256, 128, 128, 3, 8, 1, 1))),
    (90, resources.token_case(2048, 127, True)),
    (90, resources.token_case(16384, 127, True)),
    (90, resources.token_case(1024, 127, False, parts=4, rows=50)),
    (90, resources.attend_case(50, 1018, 8, 1, 256, HOPPER)),
    (90, resources.join_case(8, 256, 8, 127, True)),
    (90, resources.turn_case(16, 8, 128, True)),
    (90, resources.euler_case()),
    (87, resources.product_case(8, 0, 50, 1024, 4096, False, ORIN)),
    (87, resources.product_case(4, 0, 50, 4096, 1024, True, ORIN)),
    (87, resources.attend_case(50, 1018, 8, 1, 256, ORIN)),
]

if overlapped.HERE:
    KINDS += [(90, resources.overlapped_case(4, *shape, Tile(*tile, 2), follows=follows, pdl=pdl))
              for *shape, tile, follows, pdl in (
                  (560, 2048, 6144, (64, 64, 128, 3, 4, 1), '', False),
                  (968, 32768, 2048, (128, 128, 64, 4, 8, 1), 'pair', False),
                  (50, 2560, 1024, (64, 64, 128, 4, 4, 1), 'turned', True),
                  (49, 1536, 6144, (64, 64, 128, 6, 4, 4), 'raw', True))]

# an H100 ran this split fastest all the same: 8.1 us, the next one 13.5
KNOWN = {(90, 'attend 50x1018 8/1x256 64/64 k8'): 'keeps 16 bytes of each thread in memory'}


@pytest.mark.parametrize(('chip', 'case'), KINDS, ids=lambda v: getattr(v, 'name', str(v)))
def test_kernel_compiles_and_fits_its_chip(chip, case):
    used = resources.usage(case, chip)
    assert resources.problem_with(used) == KNOWN.get((chip, case.name), '')
    assert 0 < used.registers <= 255
    if case.name.startswith('w'):  # integers on the matrix units, loaded ahead of their use
        assert used.matrix == ('wgmma.s32.s8' if chip == 90 else 'mma.s32.s8')
        assert used.copies >= 8


def test_four_nibbles_are_unpacked_at_once():
    kernel = resources.compiled(resources.product_case(4, 0, 50, 1024, 4096, False, HOPPER), 90)
    assert kernel.asm['ptx'].count('0xF0F0F0F0') >= 2


@pytest.mark.skipif(not overlapped.HERE, reason='needs the Gluon of Triton 3.6')
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('follows', ['', 'pair'])
def test_overlapped_products_wait_for_nothing(bits, follows):
    tile = Tile(128, 64, 64, 4, 4, 1, tiles.OVERLAPPED)
    kernel = resources.compiled(
        resources.overlapped_case(bits, 560, 2048, 6144, tile, follows=follows, pdl=True), 90)
    ptx = kernel.asm['ptx']
    assert resources.waits(ptx) == ''
    # with 8 bits a step is begun before the one ahead has ended, with 4 both halves together
    waits = re.findall(r'wgmma.wait_group.sync.aligned (\d+)', ptx)
    assert waits == [{8: '1', 4: '0'}[bits], '0']


def test_a_register_that_is_multiplied_is_not_to_be_written():
    product = 'IGMMA.64x64x32.S8.S8 R24, R88, gdesc[UR8], R24, gsb0'
    wait = 'WARPGROUP.DEPBAR.LE gsb0, 0x0'
    bad = ['LDSM.16.M88.4 R84, [R5+UR8+0x8000]', 'LDSM.16.M88.4 R86, [R5+UR8+0x8000]',
           '@P0 IMAD.WIDE.U32 R90, R2, 0x4, R6', 'LOP3.LUT R91, R4, 0xf0f0f0f0, RZ, 0xc0, !PT',
           'STS.128 [R88], R4', 'LOP3.LUT R92, R4, 0xf0, RZ, 0xc0, !PT']
    assert resources.rewritten([product, *bad, wait]) == bad[1:4]
    assert resources.rewritten([product, wait, *bad]) == []
    others = 'WARPGROUP.DEPBAR.LE gsb0, 0x1'  # one may go on
    assert resources.rewritten([product, others, bad[3]]) == [bad[3]]
    used = resources.usage(resources.euler_case(), 90)
    told = resources.problem_with(dataclasses.replace(used, rewritten=3))
    assert told == 'writes 3 registers that may still be multiplied'


def test_overlapped_is_for_hopper():
    tile = Tile(128, 64, 128, 4, 4, 1, tiles.OVERLAPPED)
    many = Problem(8, 560, 2048, 2048)
    assert tiles.fit(tile, many, HOPPER) == tile
    for problem, chip in ((many, ORIN), (many, Chip('sm_100', 148)),
                          (Problem(8, 560, 2048, 2048, 128, 128), HOPPER),
                          (Problem(8, 560, 2048, 2048, follows='gated'), HOPPER)):
        assert tiles.fit(tile, problem, chip).bulk < tiles.OVERLAPPED


@pytest.mark.skipif(not overlapped.HERE, reason='needs the Gluon of Triton 3.6')
@pytest.mark.parametrize(('head', 'fits'), [(256, True), (128, True), (96, False), (64, False)])
def test_overlapped_turns_tiles_that_lie_in_one_head(head, fits):
    angle, cache = torch.zeros(4, head // 2), torch.zeros(4, head)
    turn = Turned(angle, angle, cache, cache, 4 * head, 5 * head)
    assert launch_overlapped.can(Tile(64, 128, 128, 3, 4, 1, tiles.OVERLAPPED), turn) == fits


def test_what_does_not_fit_is_told():
    case = resources.product_case(8, 0, 968, 2048, 4096, False, ORIN,
                                  tile=Tile(128, 128, 256, 4, 8, 1))
    used = resources.usage(case, 87)
    assert 'bytes of shared memory; the chip has' in resources.problem_with(used)
    spilled = dataclasses.replace(used, shared=0, stack=8)
    assert 'keeps 8 bytes of each thread in memory' in resources.problem_with(spilled)


@pytest.mark.parametrize('chip', ['sm_80', 'sm_86', 'sm_87', 'sm_90', 'sm_999'])
@pytest.mark.parametrize('bits', [4, 8])
def test_every_chosen_tile_can_run(chip, bits):
    for m in (1, 10, 49, 50, 560, 968):
        for n, kp in ((256, 1024), (16384, 2048), (1152, 1152), (2048, 16384), (1152, 4352)):
            for group, pack in ((0, 256 if kp % 256 == 0 else 128), (64, 128)):
                problem = Problem(bits, m, n, kp, group, pack if bits == 4 else group or pack)
                tile = tiles.choose(problem, Chip(chip, 100))
                assert problem.row_bytes % tile.bk == 0
                assert tiles.widest(problem) % tile.bk == 0
                assert tiles.shared_bytes(tile, problem) <= Chip(chip, 100).shared
                assert 1 <= tile.split <= problem.row_bytes // tile.bk
                assert tile.bn in (64, 128)  # rows are padded to 128, and read without a mask


def test_rule_leaves_no_half_of_a_chip_idle():
    for bits in (4, 8):
        for m, n, kp in ((512, 1152, 1152), (512, 1152, 4352), (560, 2048, 2048)):
            problem = Problem(bits, m, n, kp, 0, 256 if kp % 256 == 0 else 128)
            tile = tiles.by_rule(problem, HOPPER)
            assert tiles.programs_of(tile, problem) * tile.split >= HOPPER.processors / 2
    large = tiles.by_rule(Problem(8, 968, 16384, 2048), HOPPER)
    assert (large.bm, large.bn, large.split) == (128, 128, 1)
    assert tiles.by_rule(Problem(8, 512, 1152, 1152), ORIN).bn == 128  # 16 processors are full


def test_nearest_stored_tile_is_taken_and_a_far_one_is_not():
    table = {'sm_90': {'tiles': [
        {'kind': 'w8a8', 'm': 50, 'n': 4096, 'k': 1024, 'tile': [64, 128, 64, 2, 4, 1]},
        {'kind': 'w8a8', 'm': 968, 'n': 4096, 'k': 1024, 'tile': [128, 128, 64, 2, 4, 1]}]}}
    near = tiles.choose(Problem(8, 49, 2048, 1024), HOPPER, table)
    assert near == Tile(64, 128, 64, 2, 4, 1)
    far = Problem(8, 1, 256, 16384)
    assert tiles.choose(far, HOPPER, table) == tiles.fit(tiles.by_rule(far, HOPPER), far, HOPPER)
    other = tiles.choose(Problem(8, 49, 2048, 1024), ORIN, table)
    assert other != near  # tiles of one chip say nothing about another


def test_stored_tiles_are_well_formed():
    for name, entry in tiles.stored().items():
        assert name.startswith('sm_') and entry['source']
        for row in entry['tiles']:
            bits, group, follows = re.fullmatch(
                r'w(\d)a8(?:g(\d+))?-?(\w*)', row['kind']).groups()
            bits, group = int(bits), int(group or 0)
            pack = 2 * group if group else 256 if row['k'] % 256 == 0 else 128
            problem = Problem(bits, row['m'], row['n'], row['k'], group, pack, follows)
            tile = Tile(*row['tile'])
            assert tiles.fit(tile, problem, Chip(name, 132)) == tile


def test_candidates_are_few_and_all_of_them_run():
    for bits in (4, 8):
        for m in (10, 50, 968):
            problem = Problem(bits, m, 4096, 1024, 0, 256)
            found = tiles.candidates(problem, HOPPER)
            assert 4 <= len(found) <= 32  # each costs a compilation
            assert all(tiles.fit(tile, problem, HOPPER) == tile for tile in found)
            assert json.dumps([dataclasses.astuple(tile) for tile in found])


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    with pytest.raises(ValueError, match='unset TRITON_INTERPRET'):
        resources.compiled(SimpleNamespace(), 90)
