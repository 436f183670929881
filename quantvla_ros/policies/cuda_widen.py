# SPDX-License-Identifier: Apache-2.0
"""Widens the 4-bit weights of the next layer while this one runs, for the layers of a prefix.

Two buffers take turns; a stream of its own fills one while the products read the other. Costs
twice the largest layer at 8 bits of memory. Whether it pays is measured per chip (tiles.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from quantvla_ros.kernels.cuda import tiles
from quantvla_ros.kernels.cuda.widen import room, run_widen, wide_view
from quantvla_ros.policies.cuda_layers import CachedAttention, GatedMlp, Mlp, SelfAttention
from quantvla_ros.policies.cuda_parts import IntegerProjection, Machine

Block = tuple[SelfAttention | CachedAttention, Mlp | GatedMlp | None]


class Widener:
    """stages: the 4-bit projections of each layer, in the order in which the layers run."""

    def __init__(self, machine: Machine, stages: Sequence[Sequence[IntegerProjection]]) -> None:
        self.stages = stages
        self.device = machine.device
        self.stream = torch.cuda.Stream(machine.device) if machine.device.type == 'cuda' else None
        self._ready: list[torch.cuda.Event] = []
        for turn in range(2):
            mine = stages[turn::2]
            most = max((sum(room(p.weight) for p in stage) for stage in mine), default=0)
            buffer = machine.scratch(f'wide {turn}', most, dtype=torch.int8)
            for stage in mine:
                start = 0
                for projection in stage:
                    end = start + room(projection.weight)
                    projection.wide = wide_view(projection.weight, buffer[start:end])
                    start = end

    def start(self) -> None:
        """Before the first layer."""
        self._ready = []
        self._widen(0)

    def enter(self, stage: int) -> None:
        """Before a layer: its weights are wide now; begin with those of the next one."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[stage])
        if stage + 1 < len(self.stages):
            self._widen(stage + 1)

    def _widen(self, stage: int) -> None:
        if self.stream is None:
            for projection in self.stages[stage]:
                self._one(projection)
            return
        # the layer before this one has read its buffer to the end
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for projection in self.stages[stage]:
                self._one(projection)
            self._ready.append(self.stream.record_event())

    @staticmethod
    def _one(projection: IntegerProjection) -> None:
        assert projection.wide is not None
        run_widen(projection.weight, projection.wide)


def widener(machine: Machine, blocks: Sequence[Block]) -> Widener | None:
    """Let the blocks of a prefix run from wide weights, where that pays; None where not."""
    stages = [[p for part in block if part is not None for p in part.projections()
               if isinstance(p, IntegerProjection) and p.weight.bits == 4] for block in blocks]
    if not any(stages) or 'widen' not in tiles.ways(machine.chip):
        return None
    made = Widener(machine, stages)
    for stage, (attention, _) in enumerate(blocks):
        attention.ahead = partial(made.enter, stage)
    return made
