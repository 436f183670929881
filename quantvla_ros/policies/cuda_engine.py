# SPDX-License-Identifier: Apache-2.0
"""Serves a plan: fixed inputs, one graph for the prefix and one for the whole denoising loop.

Built on the first observation, which a node computes while it warms up: kernels are compiled,
memory is planned and frozen, both graphs captured on a stream of their own, so that another
policy may serve from its graphs meanwhile. On a CPU the same launches run interpreted, without
graphs. An error of the device ends the engine: a CUDA context that has failed does not recover.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantvla_ros.kernels.cuda.tiles import NOWHERE, Early
from quantvla_ros.policies.base import DeviceError
from quantvla_ros.policies.cuda_groot import GrootPlan
from quantvla_ros.policies.cuda_parts import early_for
from quantvla_ros.policies.cuda_pi import Inputs, PiPlan
from quantvla_ros.policies.cuda_source import ModelSource
from quantvla_ros.policies.flow import PrefixGuidance
from quantvla_ros.policies.groot_n15 import IMAGE

Plan = PiPlan | GrootPlan
# words of a prompt that a plan leaves room for, where the checkpoint does not say
WORDS = {'pi05': 200, 'pi0': 48, 'groot_n15': 96}
# what cuBLAS may hold for each stream: two buffers of 1 MiB, where Hopper's default is 32 MiB
LITTLE = ('CUBLAS_WORKSPACE_CONFIG', ':1024:2')


@dataclass(frozen=True, eq=False)
class Scene:
    """One observation on the host: what a prefix is made from, again if need be."""

    images: Tensor  # uint8 (V, 3, S, S)
    words: Tensor  # int64 (T,)
    state: Tensor  # float32 (state,)


def make_plan(
    family: str, source: Any, config: Any, *, steps: int, cameras: int, words: int,
    early: Early = NOWHERE,
) -> Plan:
    """Plan a family for so many cameras and words. Raises ValueError for an unknown family."""
    capacity = cameras * config.vision.tokens + words
    if source.device.type == 'cuda' and source.kind != 'float':
        os.environ.setdefault(*LITTLE)  # read at its first product, of which there are few
    if family == 'groot_n15':
        return GrootPlan(source, config, steps=steps, cameras=cameras, capacity=capacity,
                         early=early)
    if family not in WORDS:
        raise ValueError(f'{family!r} has no plan for the GPU; known are {", ".join(WORDS)}')
    return PiPlan(source, config, steps=steps, cameras=cameras, capacity=capacity, early=early,
                  adaptive=family == 'pi05')


class Graphs:
    """The two graphs of a plan. Capturing warms up: nothing is compiled when they replay."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.prefix: Callable[[], None] = plan.prefix
        self.denoise: Callable[[], None] = plan.denoise
        self.stream = None
        if device.type != 'cuda':
            return
        self.stream = torch.cuda.Stream(device)
        # weights and inputs are still being written on the stream of who built them
        self.stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.empty_cache()  # what building left is of no use to the graphs
        with torch.cuda.stream(self.stream):
            plan.prefix()
            plan.denoise()
            plan.machine.freeze()
            self.stream.synchronize()
            pool = torch.cuda.graph_pool_handle()
            self.prefix = self._captured(plan.prefix, pool)
            self.denoise = self._captured(plan.denoise, pool)
            self.stream.synchronize()

    def _captured(self, run: Callable[[], None], pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do on the device meanwhile does not end the capture
        with torch.cuda.graph(graph, pool=pool, stream=self.stream,
                              capture_error_mode='thread_local'):
            run()
        return graph.replay

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Use the stream of the graphs, and wait for it at the end."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()


class CudaEngine:
    """Scenes -> chunks. One thread at a time calls it."""

    def __init__(
        self,
        family: str,
        model: Any,
        conditions: Sequence[Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        words: int = 0,
    ) -> None:
        self.family, self.model = family, model
        self.device, self.dtype = device, dtype
        self.conditions = conditions
        self.words = words or WORDS[family]
        self.graphs: Graphs | None = None
        self._current: Scene | None = None
        self._failure = ''

    @torch.inference_mode()
    def prefix(self, images: Tensor, words: Sequence[int], state: Tensor) -> Scene:
        """Encode one observation; the scene serves any number of chunks."""
        scene = Scene(images, torch.tensor(words, dtype=torch.int64), state)
        with self._guarded():
            if self.graphs is None:
                self._build(len(images))
            self._encode(scene)
        return scene

    @torch.inference_mode()
    def chunk(
        self, scene: Scene, noise: Tensor, guidance: PrefixGuidance | None = None
    ) -> Tensor:
        """noise (1, horizon, action) -> the chunk of the same shape, on the host."""
        with self._guarded():
            if self._current is not scene:
                self._encode(scene)
            graphs = self._ready()
            i = graphs.plan.inputs
            with graphs.running():
                i.x.copy_(noise[0])
                i.weight.zero_()
                if guidance is not None:
                    i.target.copy_(guidance.target[0])
                    i.weight.copy_(guidance.weights)
                graphs.denoise()
            return i.x.to('cpu', copy=True)[None]

    def _ready(self) -> Graphs:
        if self.graphs is None:
            raise RuntimeError('no observation has been encoded yet')
        return self.graphs

    def _build(self, cameras: int) -> None:
        source = ModelSource(self.model, self.device, self.dtype, self.conditions)
        try:
            plan = make_plan(self.family, source, self.model.config,
                             steps=len(self.conditions), cameras=cameras, words=self.words,
                             early=early_for(source.kind, self.device, self.family))
            self.graphs = Graphs(plan, self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise ValueError(
                f'the GPU has too little memory for this precision: {error}') from error

    def _encode(self, scene: Scene) -> None:
        graphs = self._ready()
        i, tokens = graphs.plan.inputs, self.model.config.vision.tokens
        if scene.images.shape != i.images.shape:
            raise ValueError(f'images are {tuple(scene.images.shape)}; the plan was made for '
                             f'{tuple(i.images.shape)}')
        places, rows, order = self._places(scene, len(scene.images) * tokens, i)
        with graphs.running():
            i.images.copy_(scene.images)
            i.words.zero_()
            i.words[rows].copy_(self.model.embedding(places))
            i.order.copy_(order)
            i.length.fill_(int(rows.stop))
            i.state.zero_()
            known = min(len(scene.state), len(i.state))  # pi0.5 reads none: it is in the words
            i.state[:known].copy_(scene.state[:known])
            graphs.prefix()
        self._current = scene

    def _places(self, scene: Scene, patches: int, i: Inputs) -> tuple[Tensor, slice, Tensor]:
        """Words to look up, the rows where they go, and which patch stands in each row."""
        order = torch.full((len(i.words),), -1)
        if self.family == 'groot_n15':
            image = scene.words == IMAGE
            if int(image.sum()) != patches:
                raise ValueError(f'{int(image.sum())} places for {patches} patches of images')
            rows = slice(0, len(scene.words))
            if rows.stop <= len(order):
                order[rows][image] = torch.arange(patches)
        else:
            rows = slice(patches, patches + len(scene.words))
        if rows.stop > len(order):
            raise ValueError(f'the prompt takes {rows.stop} tokens with its images; the plan '
                             f'has room for {len(order)}')
        return scene.words.clamp(min=0), rows, order

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn an error of the device into a DeviceError, once and for all later calls."""
        if self._failure:
            raise DeviceError(self._failure)
        try:
            yield
        except RuntimeError as error:
            if self.device.type != 'cuda' or 'CUDA' not in str(error):
                raise
            first = str(error).strip().splitlines()[0]
            self._failure = (f'the GPU failed ({first}); nothing can run on it in this process '
                             'any more: restart the node')
            raise DeviceError(self._failure) from error
