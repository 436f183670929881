# SPDX-License-Identifier: Apache-2.0
"""A sweep in several precisions, each of which behaves or breaks in a way of its own.

The model folder holds one artifact for each quantized precision, so that what is missing, damaged
or kept out by the gate is the real thing.
"""

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fault_policies import SweepPolicy

from quantvla_ros.action import ActionChunk
from quantvla_ros.policies.base import Prospect
from quantvla_ros.quant.artifact import read_artifact, read_provenance

OFFSETS = {'fine': 0.0, 'coarse': 0.01, 'far': 0.6}
LATE = ('raises', 'nan', 'huge', 'slow')  # behave while they are tried, break when they command


class PrecisePolicy(SweepPolicy):
    """Good until it commands; what it then does is told by the name of its precision."""

    gate = threading.Event()  # 'coarse' waits for it, 'broken' before it reads, 'torn' after
    gate.set()
    loads, needs, largest = [], 0, 1.0

    @classmethod
    def look_ahead(cls, contract, settings):
        folder = Path(settings.model) / settings.precision
        if not folder.is_dir():
            return Prospect(cls.needs)
        read_provenance(folder)
        return Prospect(cls.needs, folder)

    def __init__(self, contract, settings):
        super().__init__(contract, settings)
        self.precision = settings.precision
        PrecisePolicy.loads.append(settings.precision)
        if settings.precision not in OFFSETS and settings.precision not in LATE:
            folder = Path(settings.model) / settings.precision
            if settings.precision == 'broken':
                PrecisePolicy.gate.wait(60.0)
            read_artifact(folder)
            if settings.precision == 'torn':
                PrecisePolicy.gate.wait(60.0)
        if settings.precision == 'coarse':
            PrecisePolicy.gate.wait(60.0)
        self.answers = 0
        if settings.precision == 'good':
            self.calibration = SimpleNamespace(
                activations={'layer': np.array([0.5, 1.0, 2.0])}, logits={})

    @contextlib.contextmanager
    def watching(self, turn):
        yield SimpleNamespace(inputs={'layer': PrecisePolicy.largest}, spreads={},
                              partial=frozenset())

    def denoise(self, context, seed, prefix=None):
        self.answers += 1
        chunk = super().denoise(context, seed, prefix)
        positions = chunk.positions + OFFSETS.get(self.precision, 0.0)
        if self.answers > 2:  # the two of its trial are over
            if self.precision == 'raises':
                raise RuntimeError('a kernel met an illegal instruction')
            if self.precision == 'nan':
                positions = np.where(positions > 9.0, positions, np.nan)
            if self.precision == 'huge':
                positions = positions + np.arange(len(positions))[:, None]
            if self.precision == 'slow':
                threading.Event().wait(0.8)
        return ActionChunk(chunk.joint_names, positions, chunk.stamp_ns, chunk.step_dt_s)
