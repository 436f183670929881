# SPDX-License-Identifier: Apache-2.0
"""A whole chunk of the shipped policy's float form as one CUDA graph, for one batch size.

Ten denoising steps are over a thousand small kernels; launched one by one they keep the processor
busy for longer than the GPU. Recorded once and replayed, they compute what the same calls would.
For evaluation and training, where many simulated robots ask at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class RecordedChunks:
    """compute(*inputs), recorded on the inputs' device; the inputs given first fix all shapes.

    On a CPU it is called as it is.
    """

    def __init__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._compute = compute
        self._graph = None
        if inputs[0].device.type != 'cuda':
            return
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # libraries choose and allocate before the recording
                compute(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._found = compute(*self._inputs)
        self._graph = graph

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return what compute gives for these inputs; the next call overwrites it on a GPU."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        if self._graph is None:
            return self._compute(*self._inputs)
        self._graph.replay()
        return self._found
