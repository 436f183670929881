# SPDX-License-Identifier: Apache-2.0
"""The choice of a path: forced, explained, and loud when only the reference is left."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_cases import far, packed

from quantvla_ros.kernels import dispatch, native, reference
from quantvla_ros.kernels.cpu import build

SAY = 'from quantvla_ros.kernels import dispatch; print(dispatch.path_name())'


def say(path):
    return subprocess.run([sys.executable, '-c', SAY], capture_output=True, text=True,
                          env={**os.environ, 'QUANTVLA_KERNEL': path}, timeout=120)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.delenv('QUANTVLA_KERNEL', raising=False)
    dispatch._chosen.cache_clear()
    yield monkeypatch
    dispatch._chosen.cache_clear()


def test_the_environment_forces_a_path():
    assert say('reference').stdout.strip() == 'reference'
    if not native.why_not('scalar'):
        assert say('scalar').stdout.strip() == 'scalar'


def test_an_unknown_or_unusable_path_is_refused_with_the_known_ones(fresh):
    fresh.setenv('QUANTVLA_KERNEL', 'fast')
    with pytest.raises(ValueError, match='avx512vnni.*reference'):
        dispatch.path_name()
    foreign = 'dotprod' if build.platform.machine() == 'x86_64' else 'avx2'
    fresh.setenv('QUANTVLA_KERNEL', foreign)
    with pytest.raises(ValueError, match='made for'):
        dispatch.path_name()


def test_without_libraries_the_reference_serves_and_says_so_once(fresh, tmp_path):
    fresh.setattr(native, 'FOLDER', tmp_path)
    native.load.cache_clear()
    weight, x = packed(8, 64, 4), torch.randn(2, 64)
    with pytest.warns(RuntimeWarning, match='slow reference.*Build them with') as said:
        layer = dispatch.prepare(weight)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.equal(layer(x), reference.linear(x, weight))
    assert 'not built' in dispatch.describe()['kernel path scalar']
    native.load.cache_clear()


def test_a_library_that_does_not_load_is_passed_over(fresh, tmp_path):
    for name in native.PATHS:
        (tmp_path / f'libquantvla_{name}.so').write_bytes(b'not a library')
    fresh.setattr(native, 'FOLDER', tmp_path)
    native.load.cache_clear()
    with pytest.warns(RuntimeWarning, match='slow reference'):
        assert dispatch.path_name() == 'reference'
    native.load.cache_clear()


def test_a_library_of_another_version_is_told_as_such(fresh, tmp_path):
    cxx = build.compiler()
    if cxx is None:
        pytest.skip('needs a C++ compiler')
    library = tmp_path / 'libquantvla_scalar.so'
    source = tmp_path / 'old.cpp'
    source.write_text('extern "C" void qv_layer_new() {}')
    subprocess.run([*cxx.split(), '-shared', '-fPIC', str(source), '-o', str(library)], check=True)
    fresh.setattr(native, 'FOLDER', tmp_path)
    native.load.cache_clear()
    with pytest.raises(OSError, match='another version.*build it again'):
        native.load('scalar')
    native.load.cache_clear()


def test_a_library_whose_calls_have_another_size_is_told_as_such(fresh):
    if native.why_not('scalar'):
        pytest.skip(native.why_not('scalar'))

    class Longer(native.Call):
        _fields_ = [('more', ctypes.c_int64)]

    fresh.setattr(native, 'Call', Longer)
    native.load.cache_clear()
    with pytest.raises(OSError, match='another version.*build it again'):
        native.load('scalar')
    native.load.cache_clear()


def test_without_a_compiler_nothing_is_built_and_a_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(build.shutil, 'which', lambda name: None)
    results = build.build(tmp_path)
    assert results and all('no C++ compiler' in problem for problem in results.values())
    assert list(tmp_path.iterdir()) == []


def test_the_description_names_the_path_and_why_not_the_others(fresh):
    told = dispatch.describe()
    assert dispatch.path_name() in told['kernels']
    assert all(told[f'kernel path {name}'] for name in native.PATHS
               if name != dispatch.path_name())


@pytest.mark.parametrize('options, words', [
    (dict(act_bits=6), 'act_bits is 6'),
    (dict(hadamard=32), 'hadamard is 32'),
    (dict(activation='relu'), 'silu, gelu_tanh'),
    (dict(diagonal=torch.ones(63)), 'diagonal has shape'),
    (dict(diagonal=torch.full((64,), torch.inf)), 'finite'),
    (dict(bias=torch.zeros(9)), 'bias has shape'),
    (dict(up=packed(9, 64, 4)), 'up has shape'),
    (dict(up_bias=torch.zeros(8)), 'without up'),
])
def test_a_layer_that_no_kernel_serves_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        dispatch.prepare(packed(8, 64, 4), **options)


@pytest.mark.parametrize('cores, threads', [(1, 1), (2, 2), (4, 3), (64, 16)])
def test_one_core_is_left_to_the_control_timer_where_there_are_more_than_two(
    monkeypatch, cores, threads
):
    monkeypatch.setattr(native.os, 'sched_getaffinity', lambda pid: set(range(cores)))
    assert native.default_threads() == threads


def test_the_number_of_threads_is_a_parameter_with_bounds():
    before = dispatch.threads()
    dispatch.set_threads(3)
    assert dispatch.threads() == 3 or dispatch.library() is None
    with pytest.raises(ValueError, match='threads is 0'):
        dispatch.set_threads(0)
    dispatch.set_threads(before)


def test_a_compiled_graph_holds_the_layer_as_one_operator():
    layer = dispatch.prepare(packed(33, 64, 4))
    x = torch.randn(3, 64)
    graph = torch.compile(lambda t: torch.relu(layer(t)), backend='aot_eager', fullgraph=True)
    assert torch.equal(graph(x), torch.relu(layer(x)))


def test_a_gated_pair_of_different_widths_equals_the_reference():
    first, second = packed(40, 128, 4, 128), packed(40, 128, 8)
    x = torch.randn(5, 128)
    y = dispatch.prepare(first, activation='silu', up=second)(x)
    assert far(y, reference.linear(x, first, activation='silu', up=second)) < 1e-6


@pytest.mark.parametrize('path', ['avx512vnni', 'amx'])
def test_the_hot_loops_keep_their_sums_in_registers(path):
    tool, library = shutil.which('objdump'), native.library_path(path)
    if not tool or not library.exists():
        pytest.skip(f'{path}: needs objdump and the built library')
    listing = subprocess.run([tool, '-d', '--no-show-raw-insn', str(library)],
                             capture_output=True, text=True, timeout=120).stdout.splitlines()
    dots = [i for i, line in enumerate(listing) if 'vpdpbusd' in line]
    assert len(dots) > 500
    spilled = [listing[i] for first, last in zip(dots, dots[1:], strict=False)
               if last - first < 12 for i in range(first, last)
               if re.search(r'zmm\d+,.*\(%rsp|\(%rsp.*zmm', listing[i])]
    assert spilled == []
