# SPDX-License-Identifier: Apache-2.0
"""Which GPU draws for whom: processes that render are spread over all there are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

EGL_DEVICE = 'MUJOCO_EGL_DEVICE_ID'  # read by mujoco in the process that renders


def gpu_count() -> int:
    """How many NVIDIA GPUs this machine shows."""
    return sum(name.startswith('nvidia') and name[6:].isdigit() for name in os.listdir('/dev'))


@contextmanager
def renders_on(index: int) -> Iterator[None]:
    """Let a process that is started meanwhile render on GPU number index, counted around.

    What the user has set is kept, and nothing is set where there is no GPU.
    """
    gpus = gpu_count()
    if not gpus or EGL_DEVICE in os.environ:
        yield
        return
    os.environ[EGL_DEVICE] = str(index % gpus)
    try:
        yield
    finally:
        del os.environ[EGL_DEVICE]
