# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels where they are not built yet, and names each path that cannot run here."""

import pytest
import torch

from quantvla_ros.kernels import native
from quantvla_ros.kernels.cpu import build


def pytest_configure(config):
    built = [native.library_path(name) for name in native.PATHS]
    if not any(path.exists() for path in built) and build.compiler():
        build.build()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def one_thread_of_torch():
    """The networks here are so small that a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(native.PATHS))
def library(request):
    """Each path of this machine in turn; the others are skipped by name with the reason."""
    reason = native.why_not(request.param)
    if reason:
        pytest.skip(f'{request.param}: {reason}')
    loaded = native.load(request.param)
    loaded.qv_set_threads(1)
    return loaded
