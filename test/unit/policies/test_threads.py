# SPDX-License-Identifier: Apache-2.0
"""threads.py: torch's threads always, those of the CPU's kernels where they are used."""

import pytest
import torch

from quantvla_ros.policies import threads


@pytest.fixture
def kernels(monkeypatch):
    """What was asked of the CPU's kernels; torch has its number of threads back afterwards."""
    asked, before = [], torch.get_num_threads()
    monkeypatch.setattr(threads.dispatch, 'library', lambda: asked.append('library'))
    monkeypatch.setattr(threads.dispatch, 'set_threads', asked.append)
    yield asked
    torch.set_num_threads(before)


def test_on_the_cpu_kernels_and_torch_take_as_many(kernels):
    threads.take_threads(1)
    assert (kernels, torch.get_num_threads()) == (['library', 1], 1)


def test_the_librarys_own_choice_is_left_alone(kernels):
    before = torch.get_num_threads()
    threads.take_threads(0)
    assert (kernels, torch.get_num_threads()) == (['library'], before)


def test_on_a_gpu_nobody_asks_for_the_kernels_of_the_cpu(kernels):
    threads.take_threads(1, 'cuda')
    assert (kernels, torch.get_num_threads()) == ([], 1)
