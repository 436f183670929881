# SPDX-License-Identifier: Apache-2.0
"""The Arm paths, cross-compiled and run under user-mode emulation."""

import platform
import shutil

import pytest
from kernel_driver import compiled, run_and_compare

CXX = 'aarch64-linux-gnu-g++'
PATHS = ['dotprod', 'i8mm', 'scalar']


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    with compiled(PATHS, CXX, tmp_path_factory.mktemp('arm'), ['-static']) as driver_of:
        yield driver_of


@pytest.mark.parametrize('path', PATHS)
def test_the_arm_path_agrees_with_the_reference(path, request):
    if platform.machine() == 'aarch64':
        pytest.skip(f'{path}: this machine is aarch64, test_paths.py runs it without emulation')
    emulator = shutil.which('qemu-aarch64') or shutil.which('qemu-aarch64-static')
    if not shutil.which(CXX) or not emulator:
        pytest.skip(f'{path}: needs {CXX} and qemu-aarch64 '
                    '(Debian: apt install g++-aarch64-linux-gnu qemu-user)')
    driver = request.getfixturevalue('driver')(path)
    run_and_compare([emulator, '-cpu', 'max', str(driver)])
