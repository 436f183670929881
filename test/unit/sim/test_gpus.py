# SPDX-License-Identifier: Apache-2.0
"""Processes are spread over the GPUs, and a user's own choice stands."""

import os

import pytest

from quantvla_ros.sim import gpus


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(gpus.os, 'listdir', lambda _: ['nvidia0', 'nvidia1', 'nvidiactl', 'null'])
    monkeypatch.delenv(gpus.EGL_DEVICE, raising=False)


@pytest.mark.usefixtures('two_gpus')
def test_processes_are_spread_over_all_gpus():
    seen = []
    for index in range(4):
        with gpus.renders_on(index):
            seen.append(os.environ[gpus.EGL_DEVICE])
    assert seen == ['0', '1', '0', '1']
    assert gpus.EGL_DEVICE not in os.environ


@pytest.mark.usefixtures('two_gpus')
def test_a_gpu_that_the_user_chose_is_kept(monkeypatch):
    monkeypatch.setenv(gpus.EGL_DEVICE, '1')
    with gpus.renders_on(0):
        assert os.environ[gpus.EGL_DEVICE] == '1'
    assert os.environ[gpus.EGL_DEVICE] == '1'


def test_nothing_is_set_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(gpus.os, 'listdir', lambda _: ['null', 'nvidiactl'])
    monkeypatch.delenv(gpus.EGL_DEVICE, raising=False)
    with gpus.renders_on(3):
        assert gpus.EGL_DEVICE not in os.environ


def test_each_computes_on_a_gpu_of_its_own_among_those_allowed(monkeypatch):
    monkeypatch.setenv(gpus.CUDA_DEVICES, '4,6')
    assert gpus.visible_gpus() == ['4', '6']
    found = gpus.side_by_side(os.getenv, [gpus.CUDA_DEVICES] * 3)
    assert found == ['4', '6', '4']
    assert os.environ[gpus.CUDA_DEVICES] == '4,6'


@pytest.mark.usefixtures('two_gpus')
def test_all_gpus_may_compute_where_nobody_chose(monkeypatch):
    monkeypatch.delenv(gpus.CUDA_DEVICES, raising=False)
    assert gpus.visible_gpus() == ['0', '1']


def test_what_one_of_several_raises_is_raised(monkeypatch):
    monkeypatch.setenv(gpus.CUDA_DEVICES, '')
    assert gpus.visible_gpus() == []
    with pytest.raises(ValueError, match='invalid literal'):
        gpus.side_by_side(int, ['1', 'one'])
