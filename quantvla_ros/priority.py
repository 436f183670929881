# SPDX-License-Identifier: Apache-2.0
"""How threads and processes step back behind others, or ask to come first.

Linux shares a core among sessions first where it groups them (autogroup, on by default): inside
a session of its own the lowest priority still gets as much of a core as a whole session that
commands an arm. Whoever steps back must step back as a session too. Elsewhere nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

AUTOGROUP = Path('/proc/self/autogroup')
TRIES = 100  # of a wish that the kernel puts off


def set_thread_nice(nice: int) -> None:
    """Lower the priority of the calling thread and of those that it starts from now on."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def set_session_nice(nice: int, autogroup: Path = AUTOGROUP) -> bool:
    """Set the share of this session; False where it cannot be set, or is somebody else's.

    Only the process that leads the session does it: in a terminal it is the user's. Unlike a
    thread, a session may rise again.
    """
    if os.getsid(0) != os.getpid():
        return False
    for _ in range(TRIES):
        try:
            autogroup.write_text(str(nice))
            return True
        except BlockingIOError:  # the kernel takes one such wish in a tenth of a second
            time.sleep(0.05)
        except OSError:
            break
    return False


def set_thread_realtime(priority: int) -> bool:
    """Ask for SCHED_FIFO for the calling thread alone; most systems grant it only by rtprio.

    What it starts runs as usual. 0 gives it back. False where it is refused.
    """
    try:
        policy = os.SCHED_FIFO if priority else os.SCHED_OTHER
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except (OSError, AttributeError):
        return False
    return True
