# SPDX-License-Identifier: Apache-2.0
"""The interpreter's collector of cycles, kept away from a moving arm.

A collection walks through all objects with the interpreter held: with torch loaded that is 0.1 s
and more, in which no control tick runs. What lasts is frozen, and nothing is collected while many
objects are made. Knows nothing of what the objects are.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


class Collector:
    """The collector of this process. All calls but paused() belong to the executor's thread."""

    def __init__(self) -> None:
        # Kept here, since gc.get_freeze_count() counts by walking through all that is frozen: it
        # held the interpreter for 30 ms in every swap.
        self._frozen = False

    def freeze(self) -> None:
        """Collect now, and never again walk through what is left, until unfreeze."""
        gc.collect()
        gc.freeze()
        self._frozen = True

    def unfreeze(self) -> None:
        """Let everything be collected again."""
        self._frozen = False
        gc.unfreeze()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Collect nothing while many objects are made, then freeze them where the rest is frozen.

        What is made must hold no cycles, so that dropping the last reference frees it.
        """
        was_on = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if self._frozen:  # not after an unfreeze: garbage would stay for ever
                gc.freeze()
            if was_on:
                gc.enable()


COLLECTOR = Collector()
