# SPDX-License-Identifier: Apache-2.0
"""The C interface of the kernel libraries (cpu/abi.h), through ctypes. Knows no policy.

Owns finding, loading and naming the libraries. Refuses nothing silently: a library that is not
there or does not load leaves a sentence that `dispatch` shows.
"""

from __future__ import annotations

import ctypes
import os
import platform
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache, lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / 'cpu'
AVX512 = frozenset({'avx512f', 'avx512bw', 'avx512vl', 'avx512dq', 'avx512_vnni', 'fma'})
# path -> (machine, flags of /proc/cpuinfo that it needs); best first
PATHS: dict[str, tuple[str, frozenset[str]]] = {
    'amx': ('x86_64', AVX512 | {'amx_tile', 'amx_int8'}),
    'avx512vnni': ('x86_64', AVX512),
    'avx2vnni': ('x86_64', frozenset({'avx2', 'fma', 'avx_vnni'})),
    'avx512vl': ('x86_64', frozenset({'avx2', 'fma', 'avx512f', 'avx512vl', 'avx512_vnni'})),
    'avx2': ('x86_64', frozenset({'avx2', 'fma'})),
    'i8mm': ('aarch64', frozenset({'asimddp', 'i8mm'})),
    'dotprod': ('aarch64', frozenset({'asimddp'})),
    'scalar': ('', frozenset()),
}
STATUS = {
    1: 'out of memory for the scratch space of this call',
    2: 'a size is too large for this kernel',
    3: 'shapes or options that this kernel does not serve',
}


class Call(ctypes.Structure):
    """struct qv_call of abi.h, field by field."""

    _fields_ = [
        ('kind', c_int32), ('dtype', c_int32), ('layer', c_void_p), ('rows', c_int64),
        ('x', c_void_p), ('ldx', c_int64), ('y', c_void_p), ('ldy', c_int64),
        ('factor', c_void_p), ('residual', c_void_p), ('gate', c_void_p),
        ('norm_multiply', c_void_p), ('norm_add', c_void_p), ('norm_eps', c_float),
        ('act_scale', c_float),
        ('k', c_void_p), ('v', c_void_p), ('ldk', c_int64), ('ldv', c_int64), ('keys', c_int64),
        ('cos', c_void_p), ('sin', c_void_p), ('batch', c_int32), ('heads', c_int32),
        ('kv_heads', c_int32), ('head_dim', c_int32), ('scale', c_float), ('cells', c_void_p),
        ('window', c_int32), ('stride', c_int32), ('pad', c_int32), ('height', c_int32),
        ('width', c_int32), ('channels', c_int32), ('groups', c_int32), ('activation', c_int32),
    ]


def library_path(name: str) -> Path:
    """Where the library of a path lies once it is built."""
    return FOLDER / f'libquantvla_{name}.so'


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that this machine reports (Linux: /proc/cpuinfo)."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(':')
        if key.strip() in ('flags', 'Features'):
            return frozenset(value.split())
    return frozenset()


def why_not(name: str) -> str:
    """Return why a path cannot run here, or an empty string when it can."""
    machine, needed = PATHS[name]
    if machine and machine != platform.machine():
        return f'made for {machine}, this machine is {platform.machine()}'
    missing = sorted(needed - cpu_flags())
    if missing:
        return f'the processor lacks {", ".join(missing)}'
    if not library_path(name).exists():
        return f'{library_path(name).name} is not built'
    return ''


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    signatures: dict[str, tuple[object, list]] = {
        'qv_layer_new': (c_void_p, [c_int64, c_int64, c_int32, c_int32, c_int32]),
        'qv_layer_part': (c_int32, [c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p,
                                    c_void_p]),
        'qv_layer_finish': (c_int32, [c_void_p, c_int32, c_void_p, c_void_p]),
        'qv_layer_diagonal': (c_int32, [c_void_p, c_void_p]),
        'qv_layer_bytes': (c_int64, [c_void_p]),
        'qv_layer_watch': (None, [c_void_p]),
        'qv_layer_seen': (None, [c_void_p, POINTER(c_double)]),
        'qv_layer_free': (None, [c_void_p]),
        'qv_cells': (c_int64, [c_int64, c_int32, c_int32, c_int32]),
        'qv_run': (c_int32, [POINTER(Call), c_int64]),
        'qv_linear': (c_int32, [c_void_p, c_int64, c_void_p, c_void_p, c_int32, c_float,
                                c_void_p, c_void_p]),
        'qv_call_bytes': (c_int64, []),
        'qv_ready': (c_int32, []),
        'qv_set_threads': (c_int32, [c_int32]),
        'qv_threads': (c_int32, []),
        'qv_name': (c_char_p, []),
        'qv_peak': (c_double, []),
        'qv_read_rate': (c_double, [c_void_p, c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def load(name: str) -> ctypes.CDLL:
    """Load the library of a path. Raises OSError with a sentence when that cannot be done."""
    reason = why_not(name)
    if reason:
        raise OSError(f'kernel path {name!r}: {reason}')
    loaded = ctypes.CDLL(os.fspath(library_path(name)), mode=ctypes.RTLD_LOCAL)
    try:
        library = _declare(loaded)
        if library.qv_call_bytes() != ctypes.sizeof(Call):
            raise AttributeError('a call has another size')
    except AttributeError as error:  # built from older sources
        raise OSError(f'kernel path {name!r}: its library is of another version ({error}); build '
                      'it again') from error
    if not library.qv_ready():
        raise OSError(f'kernel path {name!r}: the system does not let this process use it')
    library.qv_set_threads(default_threads())
    return library


def default_threads() -> int:
    """One core is left to the control timer where there are more than two."""
    cores = len(os.sched_getaffinity(0))
    return cores if cores <= 2 else min(cores - 1, 16)


def check(status: int) -> None:
    """Raise what a status of the C interface means."""
    if status == 1:
        raise MemoryError(STATUS[1])
    if status:
        raise ValueError(STATUS.get(status, f'status {status}'))
