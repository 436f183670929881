# SPDX-License-Identifier: Apache-2.0
"""Policies that never come back: while they load, or after a few chunks."""

import threading

from fault_policies import SweepPolicy


class StuckPolicy:
    """Never loads."""

    def __init__(self, contract, settings):
        print('loading for ever', flush=True)
        threading.Event().wait()


class StuckLaterPolicy(SweepPolicy):
    """Makes a few chunks, then hangs for ever."""

    count = 0

    def prepare(self, observation):
        StuckLaterPolicy.count += 1
        if StuckLaterPolicy.count > 6:
            threading.Event().wait()
        return observation
