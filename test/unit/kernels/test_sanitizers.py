# SPDX-License-Identifier: Apache-2.0
"""The C++ under the address and undefined-behaviour sanitizers."""

import os

import pytest
from kernel_driver import compiled, run_and_compare

from quantvla_ros.kernels import native
from quantvla_ros.kernels.cpu import build

FLAGS = ['-fsanitize=address,undefined', '-fno-sanitize-recover=all', '-O1', '-g0']


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    here = [path for path in native.PATHS if not native.why_not(path)]
    with compiled(here, build.compiler(), tmp_path_factory.mktemp('checked'), FLAGS) as driver_of:
        yield driver_of


@pytest.mark.parametrize('path', list(native.PATHS))
def test_no_access_out_of_bounds_and_no_undefined_behaviour(path, request):
    reason = native.why_not(path)
    if reason:
        pytest.skip(f'{path}: {reason}')
    if build.compiler() is None:
        pytest.skip(f'{path}: no C++ compiler')
    driver = request.getfixturevalue('driver')(path)
    # the pool and the workspace live as long as the process, so leaks are not looked for
    env = {**os.environ, 'ASAN_OPTIONS': 'detect_leaks=0:abort_on_error=0', 'LD_PRELOAD': ''}
    run_and_compare([str(driver)], env)
