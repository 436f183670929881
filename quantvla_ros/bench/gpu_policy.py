# SPDX-License-Identifier: Apache-2.0
"""A full-size pi0.5 with random weights as a policy, for `quantvla bench gpu --only ros`.

Every chunk is computed in full and then thrown away: the arm holds its pose but for the mark that
numbers the chunk (see ros_policy.py), because random weights must not move a robot. `model` says
'PRECISION SECONDS LOG'; the seconds are not used. PRECISION may start with 'tiny-': tiny sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantvla_ros.action import ActionChunk
from quantvla_ros.bench.gpu_chunk import CAMERAS, WORDS_SAID, Setting, network
from quantvla_ros.bench.gpu_source import Precision, RandomSource
from quantvla_ros.bench.gpu_time import Bench, Deadline
from quantvla_ros.bench.ros_policy import ConstantTime
from quantvla_ros.contract import Contract
from quantvla_ros.kernels.cuda import interpreted
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.cuda_engine import Graphs, make_plan
from quantvla_ros.policies.cuda_parts import early_for


class RandomPi05(ConstantTime):
    """Computes what pi0.5 computes, holds the arm, logs when it began and ended."""

    def __init__(self, contract: Contract, settings: PolicySettings) -> None:
        kind, _, log = settings.model.split(' ', 2)
        super().__init__(contract, PolicySettings(model=f'sleep 0 {log}'))
        tiny = kind.startswith('tiny-')
        device = torch.device(settings.device)
        if interpreted.active():
            interpreted.enter()
        self._bench = Bench(device, tiny, True, Deadline(600))
        model = network(Setting('pi05', contract.action.horizon, 10), self._bench)
        source = RandomSource('pi05', Precision(kind.removeprefix('tiny-')), device,
                              self._bench.dtype, model)
        with torch.inference_mode():
            plan = make_plan('pi05', source, model.config, steps=2 if tiny else 10,
                             cameras=len(contract.cameras) if tiny else CAMERAS['pi05'],
                             words=4 if tiny else WORDS_SAID['pi05'],
                             early=early_for(source.kind, device, 'pi05'))
            plan.inputs.words.normal_()
            plan.inputs.length.fill_(plan.capacity)
            self._graphs = Graphs(plan, device)

    @torch.inference_mode()
    def prepare(self, observation: Observation) -> tuple[int, float, Observation]:
        """Encode the pictures."""
        noted = super().prepare(observation)
        i = self._graphs.plan.inputs
        side = i.images.shape[-1]
        frames = np.stack([image[:side, :side] for image in observation.images.values()])
        with self._graphs.running():
            # a camera that the robot lacks stays black, and is computed as the others are
            i.images[:len(frames)].copy_(torch.from_numpy(frames.transpose(0, 3, 1, 2).copy()))
            self._graphs.prefix()
        return noted

    @torch.inference_mode()
    def denoise(self, context: Any, seed: int, prefix: ActionChunk | None = None) -> ActionChunk:
        """Denoise, wait for the result, and hold."""
        i = self._graphs.plan.inputs
        with self._graphs.running():
            i.x.normal_()
            self._graphs.denoise()
        if not bool(torch.isfinite(i.x.cpu()).all()):
            raise RuntimeError('the chunk is not finite')
        return super().denoise(context, seed, prefix)
