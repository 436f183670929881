# SPDX-License-Identifier: Apache-2.0
"""Which GPU draws and which one computes for whom: processes are spread over all there are."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

EGL_DEVICE = 'MUJOCO_EGL_DEVICE_ID'  # read by mujoco in the process that renders
CUDA_DEVICES = 'CUDA_VISIBLE_DEVICES'  # read by CUDA when a process first uses it

Item = TypeVar('Item')
Found = TypeVar('Found')


def gpu_count() -> int:
    """How many NVIDIA GPUs this machine shows."""
    return sum(name.startswith('nvidia') and name[6:].isdigit() for name in os.listdir('/dev'))


def visible_gpus() -> list[str]:
    """Name the GPUs that this process may compute on, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get(CUDA_DEVICES)
    if chosen is None:
        return [str(index) for index in range(gpu_count())]
    return [name.strip() for name in chosen.split(',') if name.strip()]


@contextmanager
def _with_variable(name: str, value: str) -> Iterator[None]:
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


@contextmanager
def renders_on(index: int) -> Iterator[None]:
    """Let a process that is started meanwhile render on GPU number index, counted around.

    What the user has set is kept, and nothing is set where there is no GPU.
    """
    gpus = gpu_count()
    if not gpus or EGL_DEVICE in os.environ:
        yield
        return
    with _with_variable(EGL_DEVICE, str(index % gpus)):
        yield


@contextmanager
def computes_on(index: int) -> Iterator[None]:
    """Let a process that is started meanwhile compute on one visible GPU, counted around."""
    gpus = visible_gpus()
    if not gpus:
        yield
        return
    with _with_variable(CUDA_DEVICES, gpus[index % len(gpus)]):
        yield


def side_by_side(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """Return work(item) of every item, all at once, each in a process with a GPU of its own.

    What one of them raises is raised here when all have ended.
    """
    context, pools, futures = mp.get_context('spawn'), [], []
    for index, item in enumerate(items):
        with computes_on(index):
            pool = ProcessPoolExecutor(1, context)
            futures.append(pool.submit(work, item))  # starts the process
        pools.append(pool)
    for pool in pools:
        pool.shutdown(wait=True)
    return [future.result() for future in futures]
