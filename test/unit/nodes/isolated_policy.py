# SPDX-License-Identifier: Apache-2.0
"""A policy that tells of the process it runs in, and breaks as its precision says."""

import contextlib
import os
import threading
from types import SimpleNamespace

import numpy as np
import torch

from quantvla_ros.action import ActionChunk
from quantvla_ros.policies.base import DeviceError, Prospect

ERRORS = {
    'refuses': ValueError('no word is known'), 'misses': FileNotFoundError('no weights'),
    'breaks': RuntimeError('a bug'), 'loses': DeviceError('the device is lost'),
}


def priority():
    """Of this thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class IsolatedPolicy:
    """Answers with process, priority of its load and of its service, and what it was given."""

    calibrated = 'monday'

    def __init__(self, contract, settings):
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.contract, self.precision = contract, settings.precision
        self.loaded_at = priority()
        self.calibration = SimpleNamespace(
            activations={'layer': np.array([0.5, 1.0, 2.0])}, logits={})
        if settings.precision == 'unreadable':
            raise ValueError('precision unreadable is unknown')
        if settings.precision == 'endless':
            threading.Event().wait()

    @classmethod
    def look_ahead(cls, contract, settings):
        return Prospect(1000)

    @contextlib.contextmanager
    def watching(self, turn):
        yield SimpleNamespace(inputs={'layer': 2.0 + turn}, spreads={}, partial=frozenset('x'))

    def prepare(self, observation):
        if self.precision in ERRORS:
            raise ERRORS[self.precision]
        if self.precision == 'dies':
            os._exit(3)
        if self.precision == 'hangs':
            threading.Event().wait()
        return observation

    def denoise(self, context, seed, prefix=None):
        if self.precision == 'counts':
            return ActionChunk(('threads',), np.array([[torch.get_num_threads()]]), 1, 0.1)
        told = [os.getpid(), self.loaded_at, priority(), seed, *context.joint_positions,
                context.images['front'].sum(), context.vectors['force'].sum(),
                np.nan if prefix is None else prefix.positions.sum()]
        names = tuple('abcdefghij')[:len(told)]
        return ActionChunk(names, np.array([told]), context.stamp_ns, 0.1)

    def reset(self):
        pass
