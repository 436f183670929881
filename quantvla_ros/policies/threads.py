# SPDX-License-Identifier: Apache-2.0
"""How many threads a policy computes with: torch's and those of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quantvla_ros.kernels import dispatch


def take_threads(count: int, device: str = 'cpu') -> None:
    """Compute with so many threads from now on, 0 for the library's own choice.

    Torch counts for each calling thread: who loads and who serves must both say it, else sums
    come in another order and are other bits. The threads of the kernels are started here and
    have the caller's priority; on a GPU nobody needs them, or misses them where none are built.
    """
    if count:
        torch.set_num_threads(count)
    if device == 'cpu':
        dispatch.library()
        if count:
            dispatch.set_threads(count)


@contextmanager
def one_thread_of_torch() -> Iterator[None]:
    """Let torch compute with one thread inside: tables made at load, whose bits must not depend
    on the number of threads. A last bit there is a rounding step of the integers behind it.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
