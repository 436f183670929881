# SPDX-License-Identifier: Apache-2.0
"""Tests of the GPU kernels: in a process of their own, under Triton's interpreter or on a GPU.

`test/unit/kernels/test_triton_process.py` starts that process; Triton's LLVM and that of the
software renderer, which other tests load, crash in one.
"""

import os

import pytest
import torch

OWN = os.environ.get('QUANTVLA_TRITON_TESTS') == '1'
collect_ignore_glob = [] if OWN else ['test_*.py']


@pytest.fixture(scope='session')
def device():
    """Where kernels run: the CPU under the interpreter, or a GPU without it."""
    from quantvla_ros.kernels.cuda import interpreted

    if not interpreted.active():
        return torch.device('cuda')
    interpreted.enter()
    return torch.device('cpu')


@pytest.fixture(params=['float16', 'bfloat16'])
def half(request, device):
    """A type of two bytes."""
    if request.param == 'bfloat16' and device.type == 'cpu':
        pytest.skip("needs a GPU: Triton's interpreter multiplies bfloat16 as integers")
    return getattr(torch, request.param)


@pytest.fixture
def workspace(device):
    from quantvla_ros.kernels.cuda.launch import Workspace

    return Workspace(device)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)
