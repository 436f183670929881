# SPDX-License-Identifier: Apache-2.0
"""A policy that sweeps two joints slowly, and breaks in a chosen way when told to."""

import threading

import numpy as np

from quantvla_ros.action import ActionChunk

AMPLITUDE_RAD = 0.2  # so that a start at one end and a chunk at the other is no huge step
PERIOD_S = 8.0


class SweepPolicy:
    """Sweeps by header time. mode is shared by all of its kind, so that a test can reach it."""

    mode = 'good'
    released = threading.Event()
    resets = 0

    def __init__(self, contract, settings):
        self.contract = contract

    def prepare(self, observation):
        if SweepPolicy.mode == 'raise':
            raise RuntimeError('the weights caught fire')
        if SweepPolicy.mode == 'refuse':
            raise ValueError(f'no word of {observation.instruction!r} is known')
        if SweepPolicy.mode == 'hang':
            SweepPolicy.released.wait(60.0)
        return observation

    def denoise(self, context, seed, prefix=None):
        action = self.contract.action
        seconds = context.stamp_ns / 1e9 + np.arange(action.horizon) * action.step_dt_s
        wave = AMPLITUDE_RAD * np.sin(2 * np.pi * seconds / PERIOD_S)
        positions = np.stack([wave, -wave], axis=1)
        joints = action.joints
        if SweepPolicy.mode == 'nan':
            positions[3, 1] = np.nan
        if SweepPolicy.mode == 'width':
            joints, positions = joints[:1], positions[:, :1]
        if SweepPolicy.mode == 'huge':
            positions[4:] += 2.0
        return ActionChunk(joints, positions, context.stamp_ns, action.step_dt_s)

    def reset(self):
        SweepPolicy.resets += 1
