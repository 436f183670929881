# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM set a flag and nothing else; whoever waits looks at it.

An executable installs it before its slow imports, so that a signal during start-up ends it
cleanly too. A second signal is the same request: a launch file's Ctrl-C often sends two.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Set once, never cleared."""

    def __init__(self) -> None:
        self._set = threading.Event()

    def install(self) -> None:
        """Take over SIGINT and SIGTERM of this process; call it from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    @staticmethod
    def ignore() -> None:
        """Ignore further signals: call it last, for the interpreter's own end is not ours.

        While it ends, Python gives signals their deadly default back, except ignored ones.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self._set.set()

    def set(self) -> None:
        """Ask for the end, as a signal does."""
        self._set.set()

    def __bool__(self) -> bool:
        return self._set.is_set()


STOP = StopRequest()
