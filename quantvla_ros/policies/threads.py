# SPDX-License-Identifier: Apache-2.0
"""How many threads a policy computes with: torch's and those of the kernels."""

from __future__ import annotations

import torch

from quantvla_ros.kernels import dispatch


def take_threads(count: int) -> None:
    """Compute with so many threads from now on, 0 for the library's own choice.

    Torch counts for each calling thread: who loads and who serves must both say it, else sums
    come in another order and are other bits. The threads of the kernels are started here and
    have the caller's priority.
    """
    dispatch.library()
    if count:
        torch.set_num_threads(count)
        dispatch.set_threads(count)
