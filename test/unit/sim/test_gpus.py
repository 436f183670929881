# SPDX-License-Identifier: Apache-2.0
"""Rendering processes are spread over the GPUs, and a user's own choice stands."""

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
