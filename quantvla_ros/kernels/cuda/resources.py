# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for chips that are not here, and tell what each takes of them.

Needs Triton (its ptxas and cuobjdump come with it) and no GPU. Must not run under the
interpreter. Registers beyond 255 a thread are spilled to memory, and shared memory beyond a
chip's limit does not launch at all: both are visible here, before any card is.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantvla_ros.kernels.cuda import (
    attention,
    fused,
    interpreted,
    launch,
    launch_attention,
    launch_overlapped,
    overlapped,
    product,
    tokens,
)
from quantvla_ros.kernels.cuda.language import triton
from quantvla_ros.kernels.cuda.tiles import FEW, OVERLAPPED, Chip, Problem, Tile, choose

CHIPS = {80: 108, 87: 16, 89: 128, 90: 132}  # capability -> multiprocessors of a usual card
# product shapes of pi0.5: (bits, group, tokens, n, padded k, gated)
PRODUCTS = (
    (8, 0, 50, 4096, 1024, True), (8, 0, 10, 1024, 4096, False), (8, 0, 968, 16384, 2048, True),
    (8, 0, 968, 2048, 16384, False), (4, 0, 50, 4096, 1024, True), (4, 0, 10, 1024, 4096, False),
    (4, 0, 968, 16384, 2048, True), (4, 0, 968, 2048, 16384, False),
    (4, 128, 50, 1024, 4096, False), (4, 128, 968, 2048, 16384, False),
    (8, 128, 50, 1024, 4096, False),
)


BULK = 128  # bytes of a row that Hopper's engine copies at once


@dataclass(frozen=True)
class Case:
    """A kernel with everything that the compiler needs to know of a call."""

    name: str
    kernel: Any
    types: Mapping[str, str]  # of run-time arguments
    constants: Mapping[str, Any]
    warps: int
    stages: int
    fusion: bool = True


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of a program's shared memory, registers of a thread,
    bytes of a thread's stack (spills among them), machine instructions, those of its matrix
    units, bytes of the narrowest copy in its pipeline (0: nothing is loaded ahead), and
    instructions that write a register while the matrix units may still read it."""

    name: str
    chip: int
    shared: int
    registers: int
    stack: int
    instructions: int
    matrix: str
    copies: int
    rewritten: int = 0


def product_case(bits: int, group: int, m: int, n: int, kp: int, gated: bool, chip: Chip,
                 *, tile: Tile | None = None, pdl: bool = False) -> Case:
    """The product with an epilogue as the models use it."""
    pack = 2 * group if group and bits == 4 else group or (256 if kp % 256 == 0 else 128)
    problem = Problem(bits, m, n, kp, group, pack, 'gated' if gated else '')
    t = tile or choose(problem, chip)
    floats = ('sx', 'sw', 'bias', 'up_sw', 'up_bias', 'gate')
    types = {'x': '*i8', 'w': '*i8', 'up': '*i8', **dict.fromkeys(floats, '*fp32'),
             'residual': '*bf16', 'out': '*bf16', 'partial': '*fp32' if group else '*i32',
             'count': '*i32', 'rows_of_w': '*i8',
             **dict.fromkeys(('M', 'N', 'KP', 'NP', 'out_stride'), 'i32')}
    constants = {'BITS': bits, 'GROUP': group, 'PACK': pack, 'UP': gated,
                 'ACT': 'gelu_tanh' if gated else 'none', 'BIAS': False, 'UP_BIAS': False,
                 'GATE': not gated, 'RESIDUAL': not gated, 'BM': t.bm, 'BN': t.bn, 'BK': t.bk,
                 'SPLIT': t.split, 'BULK': bool(t.bulk), 'PDL': pdl,
                 'FETCH': pdl and m <= FEW}
    if t.bulk:
        types |= {'x': f'tensordesc<i8[{t.bm}, {t.bk}]>',
                  **dict.fromkeys(('w', 'up'), f'tensordesc<i8[{t.bn}, {t.bk}]>')}
    name = f'{problem.kind} {m}x{n}x{kp} {t.bm}/{t.bn}/{t.bk} s{t.stages} w{t.warps} k{t.split}'
    return Case(name, product.product, types, constants, t.warps, t.stages)


def token_case(columns: int, top: int, rotate: bool, *, pdl: bool = False,
               parts: int = 0, rows: int = 968) -> Case:
    """Branch, modulated norm, and rotated or plain quantization, or floats."""
    stored = 'i8' if top else 'bf16'
    types = {'x': '*bf16', 'branch': '*i32' if parts else '*bf16',
             'branch_bias': '*bf16', 'gate': '*fp32',
             'total': '*bf16', 'token_scale': '*fp32', 'row_scale': '*fp32',
             'M': 'i32', 'multiply': '*fp32', 'add': '*fp32', 'diagonal': '*fp32',
             'hadamard': '*i8',
             'out': f'*{stored}', 'scale': '*fp32', 'static': '*fp32', 'x_stride': 'i32',
             'K': 'i32', 'KP': 'i32', 'eps': 'fp32'}
    constants = {'PARTS': parts, 'ROWS': bool(parts),
                 'BLOCKS': launch.blocks_of(columns), 'PAIR': False, 'ACT': 'none',
                 'BRANCH': bool(not top or parts), 'BRANCH_BIAS': False,
                 'GATE': not top, 'NORM': 'rms',
                 'MULTIPLY': True, 'ADD': True, 'TOP': top, 'DIAGONAL': rotate,
                 'ROTATE': rotate, 'STATIC': False, 'CAST': triton.language.bfloat16, 'PDL': pdl}
    name = f'tokens {columns} {"float" if not top else "int8"}{" rotated" if rotate else ""}'
    return Case(name, tokens.tokens, types, constants, launch.warps_of(columns, rows), 3, False)


def fused_case(bits: int, m: int, n: int, kp: int, follows: str, chip: Chip,
               *, tile: Tile | None = None, pdl: bool = False) -> Case:
    """A product of fused.py: 'pair', 'turned' (heads of 256, one of keys) or 'raw'."""
    problem = Problem(bits, m, n, kp, 0, 256 if kp % 256 == 0 else 128, follows)
    t = tile or choose(problem, chip)
    turn, raw = 128 if follows == 'turned' else 0, follows == 'raw'
    numbers = ('M', 'N', 'KP', 'NP', 'out_stride', 'k_stride', 'v_stride')
    types = {'x': '*i8', 'w': '*i8', 'out': '*i32' if raw else '*bf16', 'length': '*i32',
             **dict.fromkeys(('sx', 'sw', 'bias', 'cosine', 'sine'), '*fp32'),
             'k_out': '*bf16', 'v_out': '*bf16', 'rows_of_w': '*i8',
             **dict.fromkeys(numbers, 'i32')}
    if t.bulk:
        types |= {'x': f'tensordesc<i8[{t.bm}, {t.bk}]>', 'w': f'tensordesc<i8[{t.bn}, {t.bk}]>'}
    constants = {'BITS': bits, 'GROUP': 0, 'PACK': problem.pack, 'ACT': 'gelu_tanh',
                 'BIAS': False, 'BM': t.bm, 'BN': t.bn, 'BK': t.bk,
                 'SPLIT': t.split if raw else 1, 'BULK': bool(t.bulk), 'RAW': raw, 'TURN': turn,
                 'QUERIES': n - 4 * turn, 'VALUES': n - 2 * turn, 'LENGTH': bool(turn),
                 'PDL': pdl, 'FETCH': pdl and m <= FEW}
    name = f'{problem.kind} {m}x{n}x{kp} {t.bm}/{t.bn}/{t.bk} s{t.stages} w{t.warps} k{t.split}'
    return Case(name, fused.fused, types, constants, t.warps, t.stages)


def overlapped_case(bits: int, m: int, n: int, kp: int, tile: Tile, *, follows: str = '',
                    pdl: bool = False) -> Case:
    """The product whose steps overlap; sm_90 alone."""
    pair, raw, turn = follows == 'pair', follows == 'raw', 128 if follows == 'turned' else 0
    mma, store = launch_overlapped.distributed(tile.bm, tile.bn, tile.warps, pair or turn > 0)
    shared = [(rows, launch_overlapped.shared(rows, tile.bk)) for rows in (tile.bm, tile.bn)]
    x, w = (f'tensordesc<i8[{rows}, {tile.bk}],{layout!r}>' for rows, layout in shared)
    floats, turned = ('sx', 'sw', 'bias', 'gate'), ('k_stride', 'v_stride')
    types = {'x': x, 'w': w, **dict.fromkeys((*floats, 'cosine', 'sine'), '*fp32'),
             'residual': '*bf16', 'out': '*i32' if raw else '*bf16',
             **dict.fromkeys(('k_out', 'v_out'), '*bf16'), 'length': '*i32',
             **dict.fromkeys(('M', 'N', 'KP', 'out_stride', *turned), 'i32')}
    constants = {'BITS': bits, 'PACK': 256 if kp % 256 == 0 else 128, 'PAIR': pair, 'RAW': raw,
                 'ACT': 'gelu_tanh', 'BIAS': not pair, 'GATE': False, 'RESIDUAL': not follows,
                 'SPLIT': tile.split, 'TURN': turn, 'QUERIES': n - 4 * turn,
                 'VALUES': n - 2 * turn, 'LENGTH': turn > 0,
                 'BM': tile.bm, 'BN': tile.bn, 'BK': tile.bk, 'STAGES': tile.stages, 'PDL': pdl,
                 'MMA': mma, 'STORE': store}
    name = (f'w{bits}a8{follows and "-" + follows} {m}x{n}x{kp} {tile.bm}/{tile.bn}/{tile.bk} '
            f's{tile.stages} w{tile.warps} k{tile.split} overlapped')
    return Case(name, overlapped.overlapped, types, constants, tile.warps, tile.stages)


def attend_case(rows: int, keys: int, heads: int, groups: int, width: int, chip: Chip,
                *, causal: bool = False, pdl: bool = False) -> Case:
    """Attention as choose_split cuts it."""
    share = heads // groups
    split = launch_attention.choose_split(rows * share, keys, groups, width, chip)
    numbers = ('rows', 'extra', 'q_stride', 'k_stride', 'v_stride', 'out_stride', 'k_batch',
               'v_batch', 'tokens')
    types = {'q': '*bf16', 'k': '*bf16', 'v': '*bf16', 'out': '*bf16', 'sums': '*fp32',
             'largest': '*fp32', 'length': '*i32', 'factor': 'fp32',
             **dict.fromkeys(numbers, 'i32')}
    constants = {'SHARE': share, 'D': width, 'DP': 1 << (width - 1).bit_length(),
                 'BQ': split.bq, 'BS': split.bs, 'SPLIT': split.parts, 'LENGTH': True,
                 'CAUSAL': causal, 'HEADS': heads, 'PRECISION': 'tf32', 'PDL': pdl}
    name = (f'attend {rows}x{keys} {heads}/{groups}x{width} '
            f'{split.bq}/{split.bs} k{split.parts}')
    return Case(name, attention.attend, types, constants, split.warps, split.stages)


def join_case(heads: int, width: int, parts: int, top: int, rotate: bool,
              rows: int = 50) -> Case:
    """The splits of an attention into tokens."""
    types = {'parts': '*bf16', 'sums': '*fp32', 'largest': '*fp32', 'diagonal': '*fp32',
             'hadamard': '*i8', 'out': '*i8' if top else '*bf16', 'scale': '*fp32',
             'static': '*fp32', 'rows': 'i32', 'K': 'i32', 'KP': 'i32'}
    constants = {'BLOCKS': launch.blocks_of(heads * width), 'D': width, 'HEADS': heads,
                 'SPLIT': parts, 'TOP': top, 'DIAGONAL': rotate, 'ROTATE': rotate,
                 'STATIC': False,
                 'CAST': triton.language.bfloat16, 'PDL': False}
    return Case(f'join {heads}x{width} of {parts}', attention.join, types, constants,
                min(16, 2 * launch.warps_of(heads * width, rows)), 3, False)


def turn_case(heads: int, groups: int, width: int, norm: bool) -> Case:
    """Positions, head norms and the cache."""
    types = {'qkv': '*bf16', 'q_norm': '*fp32', 'k_norm': '*fp32', 'cosine': '*fp32',
             'sine': '*fp32', 'q_out': '*bf16', 'k_out': '*bf16', 'v_out': '*bf16',
             'length': '*i32', 'qkv_stride': 'i32', 'k_stride': 'i32', 'v_stride': 'i32',
             'eps': 'fp32'}
    constants = {'HEADS': heads, 'GROUPS': groups, 'HALF': width // 2,
                 'HP': 1 << (width // 2 - 1).bit_length(),
                 'HEAD_BLOCK': 1 << (max(heads, groups) - 1).bit_length(), 'LENGTH': True,
                 'NORM': norm, 'PDL': False}
    return Case(f'turn {heads}/{groups}x{width}', attention.turn, types, constants, 4, 3)


def euler_case() -> Case:
    """One step of the flow."""
    types = {'x': '*fp32', 'velocity': '*bf16', 'target': '*fp32', 'weight': '*fp32',
             'out': '*bf16', 'size': 'i32', 'width': 'i32', 'time_left': 'fp32',
             'step': 'fp32', 'pull': 'fp32'}
    return Case('euler', tokens.euler, types, {'BLOCK': 1024, 'PDL': False}, 4, 3)


def cases(chip: Chip) -> Iterator[Case]:
    """Every kernel at the shapes of the published policies."""
    for shape in PRODUCTS:
        yield product_case(*shape, chip)
    if chip.hopper and overlapped.HERE:
        for bits, stages in ((8, 6), (4, 3)):
            tile = Tile(128, 128, 128, stages, 8, 1, OVERLAPPED)
            yield overlapped_case(bits, 968, 2048, 16384, tile)
            yield overlapped_case(bits, 968, 32768, 2048, tile, follows='pair')
            yield overlapped_case(bits, 968, 2560, 2048, tile, follows='turned')
    for bits in (8, 4):
        yield fused_case(bits, 50, 8192, 1024, 'pair', chip)
        yield fused_case(bits, 50, 2560, 1024, 'turned', chip)
        yield fused_case(bits, 50, 1024, 4096, 'raw', chip)
        yield fused_case(bits, 968, 32768, 2048, 'pair', chip)
    yield token_case(1024, 127, False, parts=4, rows=50)
    yield token_case(1024, 127, True, parts=4, rows=50)
    for columns in (1024, 2048, 16384):
        yield token_case(columns, 127, False)
        yield token_case(columns, 127, True)
    yield token_case(1024, 0, False)
    yield attend_case(50, 1018, 8, 1, 256, chip)
    yield attend_case(968, 968, 8, 1, 256, chip)
    yield attend_case(49, 560, 32, 32, 48, chip)
    yield attend_case(560, 560, 16, 8, 128, chip, causal=True)
    yield join_case(8, 256, 8, 127, True)
    yield join_case(8, 256, 8, 127, True, rows=968)
    yield join_case(32, 48, 4, 0, False)
    yield turn_case(8, 1, 256, False)
    yield turn_case(16, 8, 128, True)
    yield euler_case()


def compiled(case: Case, capability: int) -> Any:
    """Compile a case for a chip, as a launch with aligned pointers would."""
    from triton.backends.compiler import GPUTarget

    if interpreted.active():
        raise ValueError(f'unset {interpreted.VARIABLE}: interpreted kernels are not compiled')
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, 'constexpr') for name in names}
    constants = {name: case.constants[name] for name in names if name in case.constants}
    wide = [['tt.divisibility', 16]]
    loose = {'M', 'rows', 'extra', 'tokens', 'size', 'width', 'eps'}
    attributes = {(i,): wide for i, name in enumerate(names)
                  if name in case.types and name not in loose
                  and case.types[name][0] in '*i'}
    options = {'num_warps': case.warps, 'enable_fp_fusion': case.fusion}
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as Source
    else:
        from triton.compiler import ASTSource as Source

        options['num_stages'] = case.stages
    source = Source(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def usage(case: Case, capability: int) -> Usage:
    """Compile a case and read what it takes off the machine code."""
    kernel = compiled(case, capability)
    ptx = kernel.asm['ptx']
    kinds = re.findall(r'(wgmma\.mma_async|mma\.sync)\S*?\.(s32\.s8|f32\.bf16|f32\.tf32)', ptx)
    matrix = ' '.join(sorted({f'{kind.split(".")[0]}.{types}' for kind, types in kinds}))
    copies = re.findall(r'cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)', ptx)
    widths = [int(width, 0) for width in copies]
    if 'cp.async.bulk.tensor' in ptx:
        widths.append(BULK)
    registers, stack, lines = _machine_code(kernel.asm['cubin'])
    return Usage(case.name, capability, int(kernel.metadata.shared), registers, stack, len(lines),
                 matrix, min(widths, default=0), len(rewritten(lines)))


def rewritten(lines: Sequence[str]) -> list[str]:
    """Instructions that write what a product from registers may still read.

    Such a product runs on after its instruction; nothing but the wait for it says that it has
    read its registers, and ptxas does not keep others off them.
    """
    busy: set[int] = set()
    found = []
    for line in lines:
        product = re.search(r'GMMA\S* R\d+, R(\d+), gdesc', line)
        if product:
            busy |= set(range(int(product[1]), int(product[1]) + 4))
        elif 'DEPBAR.LE gsb0, 0x0' in line:
            busy.clear()
        elif busy & _written(line):
            found.append(line)
    return found


def _written(line: str) -> set[int]:
    """Registers that an instruction writes, as its text tells."""
    parts = re.match(r'(?:@\S+ )?([A-Z0-9_.]+) (?:U?P\w+, )*R(\d+)\b', line)
    if not parts or parts[1].startswith(('ST', 'RED', 'SYNCS', 'UTMA', 'BAR')):
        return set()  # they read it
    wide = 4 if '.128' in parts[1] or re.match(r'LDSM.*\.4$', parts[1]) else (
        2 if '.64' in parts[1] or 'WIDE' in parts[1] else 1)
    return set(range(int(parts[2]), int(parts[2]) + wide))


def _machine_code(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers and stack of a thread, and instructions, as cuobjdump reads them."""
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), '-res-usage', '-sass', file.name], capture_output=True,
                              text=True, check=True)
    found = re.search(r'REG:(\d+) STACK:(\d+)', done.stdout)
    lines = re.findall(r'/\*[0-9a-f]{4,}\*/\s+([^/\s][^;]*);', done.stdout)
    if not found or not lines:
        raise RuntimeError(f'cuobjdump said: {done.stdout}')
    return int(found[1]), int(found[2]), lines


def waits(ptx: str) -> str:
    """What ptxas says of products that it makes wait for one another; '' where none does."""
    tool = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'ptxas'
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run([str(tool), '-arch=sm_90a', '-v', file.name, '-o', '/dev/null'],
                              capture_output=True, text=True, check=True)
    return '\n'.join(line for line in done.stderr.splitlines() if 'serialized' in line)


def chip(capability: int) -> Chip:
    """A usual card of a capability."""
    return Chip(f'sm_{capability}', CHIPS[capability])


def problem_with(used: Usage) -> str:
    """Say what keeps a kernel from running well on its chip; '' where nothing does."""
    limit = chip(used.chip).shared
    if used.shared > limit:
        return f'takes {used.shared} bytes of shared memory; the chip has {limit}'
    if used.rewritten:
        return f'writes {used.rewritten} registers that may still be multiplied'
    if used.stack > 0:
        return f'keeps {used.stack} bytes of each thread in memory'
    return ''
