# SPDX-License-Identifier: Apache-2.0
"""The C++ under the address and undefined-behaviour sanitizers."""

import os

import pytest
from kernel_driver import compile_driver, run_and_compare

from quantvla_ros.kernels import native
from quantvla_ros.kernels.cpu import build

FLAGS = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-O1', '-g0']


@pytest.mark.parametrize('path', list(native.PATHS))
def test_no_access_out_of_bounds_and_no_undefined_behaviour(path, tmp_path):
    reason = native.why_not(path)
    if reason:
        pytest.skip(f'{path}: {reason}')
    cxx = build.compiler()
    if cxx is None:
        pytest.skip(f'{path}: no C++ compiler')
    driver = compile_driver(path, cxx, tmp_path / path, FLAGS)
    # the pool and the workspace live as long as the process, so leaks are not looked for
    env = {**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=0', 'LD_PRELOAD': ''}
    run_and_compare([str(driver)], env)
