# SPDX-License-Identifier: Apache-2.0
"""What enters the linear layers while calibration frames run: running sums, in bounded memory.

Owns the hooks and the statistics; who runs the frames passes a function. Changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantvla_ros.quant.linear import DENOISING_STEP

SAMPLE_TOKENS = 512  # kept whole for searches that need real tokens
TOKENS_PER_CALL = 64  # at most so many of one call, so that the sample spans the frames


@dataclass
class InputStatistics:
    """Running statistics of the inputs of one linear layer.

    absmax (k,): largest magnitude of each channel. gram (k, k) float64: X^T X of all tokens.
    mean_abs (k,): mean magnitude. sample: tokens spread over the calls, of one denoising step or
    of all (step None: layers outside the denoising loop). first: tokens of the first call alone.
    """

    k: int
    tokens: int = 0
    absmax: Tensor = field(init=False)
    magnitude: Tensor = field(init=False)
    gram: Tensor = field(init=False)
    kept: dict[int | None, list[Tensor]] = field(default_factory=dict)
    first: Tensor | None = None

    def __post_init__(self) -> None:
        self.absmax = torch.zeros(self.k)
        self.magnitude = torch.zeros(self.k, dtype=torch.float64)
        self.gram = torch.zeros(self.k, self.k, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add the tokens of one call; (..., k)."""
        x = x.detach().reshape(-1, self.k).float()
        if x.device != self.gram.device:
            self.to(x.device)
        self.tokens += len(x)
        self.absmax = torch.maximum(self.absmax, x.abs().amax(0))
        self.magnitude += x.abs().sum(0).double()
        self.gram += (x.T @ x).double()
        stride = max(1, len(x) // TOKENS_PER_CALL)
        kept = self.kept.setdefault(DENOISING_STEP.get(), [])
        kept.append(x[::stride][:TOKENS_PER_CALL].clone())
        if self.first is None:
            self.first = kept[0].clone()
        if sum(map(len, kept)) > 4 * SAMPLE_TOKENS:
            kept[:] = [spread(torch.cat(kept), SAMPLE_TOKENS)]

    def to(self, device: torch.device | str) -> InputStatistics:
        """Move everything; sums stay where the network runs until they are read."""
        self.absmax, self.magnitude = self.absmax.to(device), self.magnitude.to(device)
        self.gram = self.gram.to(device)
        self.first = None if self.first is None else self.first.to(device)
        self.kept = {step: [t.to(device) for t in kept] for step, kept in self.kept.items()}
        return self

    @property
    def hessian(self) -> Tensor:
        """H = X^T X / tokens, (k, k) float64."""
        return self.gram / max(self.tokens, 1)

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude of each channel, (k,) float32."""
        return (self.magnitude / max(self.tokens, 1)).float()

    @property
    def steps(self) -> tuple[int, ...]:
        """Denoising steps in which the layer ran; empty outside the denoising loop."""
        return tuple(sorted(step for step in self.kept if step is not None))

    def sample(self) -> Tensor:
        """At most SAMPLE_TOKENS tokens, evenly spread over everything seen; (tokens, k)."""
        tokens = [token for kept in self.kept.values() for token in kept]
        return spread(torch.cat(tokens) if tokens else torch.zeros(0, self.k), SAMPLE_TOKENS)

    def step_sample(self, step: int) -> Tensor:
        """Tokens of one denoising step; (tokens, k)."""
        return spread(torch.cat(self.kept[step]), SAMPLE_TOKENS)


def spread(tokens: Tensor, count: int) -> Tensor:
    """At most `count` rows at even distances."""
    if len(tokens) <= count:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, count).round().long()]


Run = Callable[[], None]


def run_watched(
    net: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None], run: Run
) -> None:
    """Run, and hand what enters each named layer to `see`, with its name."""
    handles = []

    def watch(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(name, inputs[0])

        handles.append(net.get_submodule(name).register_forward_pre_hook(hook))

    try:
        for name in names:
            watch(name)
        run()
    finally:
        for handle in handles:
            handle.remove()


def observe(net: nn.Module, names: Iterable[str], run: Run) -> dict[str, InputStatistics]:
    """Run the frames and return what entered each named linear layer.

    Layers that never ran are left out, so that the caller can say which.
    """
    found: dict[str, InputStatistics] = {}

    def see(name: str, x: Tensor) -> None:
        width = int(net.get_submodule(name).in_features)  # type: ignore[arg-type]
        found.setdefault(name, InputStatistics(width)).add(x)

    run_watched(net, names, see, run)
    return found


def same_inputs(seen: Mapping[str, InputStatistics]) -> list[list[str]]:
    """Group layers that read the same tokens, such as q, k and v; known by equal sums."""
    groups: dict[tuple[int, int, bytes, bytes], list[str]] = {}
    for name, found in seen.items():
        sums = found.magnitude.cpu().numpy().tobytes()
        peaks = found.absmax.cpu().numpy().tobytes()
        groups.setdefault((found.k, found.tokens, peaks, sums), []).append(name)
    return list(groups.values())
