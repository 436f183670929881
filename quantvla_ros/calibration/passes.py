# SPDX-License-Identifier: Apache-2.0
"""Run a policy over frames, alone or teacher and student side by side, all denoising steps.

Owns what is looked at while they run: logits of every attention, what leaves its projection,
and how large the inputs of every linear become. Holds one batch of activations of both networks
and one step of logits. Fits nothing and judges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from quantvla_ros.observation import Observation
from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_panda import LiberoVla, Prepared
from quantvla_ros.quant.balance import PairStatistics, output_statistics
from quantvla_ros.quant.matching import logits
from quantvla_ros.quant.sites import AttentionSite

BATCH = 16
Step = Callable[[int], None]  # told how many frames were done


@dataclass(frozen=True)
class Played:
    """What a policy made of some frames.

    chunks: (frames, steps, joints) SI. headings: (denoising steps, frames, steps, joints), the
    chunk that each denoising step was heading for, as differences to the measured position.
    """

    chunks: np.ndarray
    headings: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Frames behind the prefix: what the action head needs of them, and the seed of the first."""

    batches: tuple[Prepared, ...]
    seed: int


def parts_of(observations: Sequence[Observation]) -> Iterator[Sequence[Observation]]:
    """Cut frames into batches."""
    for first in range(0, len(observations), BATCH):
        yield observations[first : first + BATCH]


def encode(
    policy: LiberoVla, observations: Sequence[Observation], seed: int, step: Step | None = None
) -> Encoded:
    """Run the prefix once, for any number of plays."""
    batches = []
    for part in parts_of(observations):
        batches.append(policy.prepare_batch(part))
        if step is not None:
            step(len(part))
    return Encoded(tuple(batches), seed)


def play(policy: LiberoVla, encoded: Encoded, step: Step | None = None) -> Played:
    """Denoise every frame from the noise of its own seed, whatever variant of the policy runs."""
    chunks: list[np.ndarray] = []
    headings: list[np.ndarray] = []
    first = encoded.seed
    for prepared in encoded.batches:
        count = len(prepared.states)
        played = _denoised(policy, prepared, range(first, first + count))
        chunks.append(played.chunks)
        headings.append(played.headings)
        first += count
        if step is not None:
            step(count)
    return Played(np.concatenate(chunks), np.concatenate(headings, 1))


def _denoised(policy: LiberoVla, prepared: Prepared, seeds: Sequence[int]) -> Played:
    times = flow.flow_times(policy.steps)
    headings: list[np.ndarray] = []
    unit = torch.from_numpy(policy.door.statistics.action_std).float()

    def velocity(x: Tensor, step: int) -> Tensor:
        v = policy.velocity(prepared, x, step)
        headings.append(((x + (1 - times[step]) * v) * unit).numpy())
        return v

    with torch.inference_mode():
        chunk = flow.denoise(velocity, start_noise(policy, seeds), policy.steps).numpy()
    found = [policy.door.chunk(*values).positions for values in
             zip(chunk, prepared.states, prepared.stamps_ns, strict=True)]
    return Played(np.stack(found), np.stack(headings))


def start_noise(policy: LiberoVla, seeds: Sequence[int]) -> Tensor:
    """Noise of each frame's seed, (frames, steps, action)."""
    shape = (policy.config.chunk, policy.config.action)
    return torch.from_numpy(np.stack([flow.noise(seed, shape) for seed in seeds]))


# -- side by side --------------------------------------------------------------------------------


@dataclass
class Seen:
    """Sums over the frames that teacher and student ran side by side.

    alphas, betas: by attention. inputs: linear -> a frame's largest |input| of the student, in
    order; spreads: attention -> the largest standard deviation of a head's logits in a frame.
    """

    alphas: dict[str, PairStatistics]
    betas: dict[str, PairStatistics]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    spreads: dict[str, list[Tensor]] = field(default_factory=dict)


def range_of(frames: Sequence[Tensor]) -> Tensor:
    """Smallest, median and largest of one figure over all frames; (3,)."""
    values = torch.cat(list(frames)).float()
    return torch.stack([values.amin(), values.median(), values.amax()])


def compare(
    teacher: LiberoVla,
    student: LiberoVla,
    sites: Sequence[AttentionSite],
    names: Sequence[str],
    observations: Sequence[Observation],
    seed: int,
    step: Step | None = None,
) -> Seen:
    """Run both on the same frames and noise, each along its own way, and pair what they do.

    names: linears whose inputs are measured.
    """
    seen = Seen({s.name: PairStatistics(s.heads) for s in sites},
                {s.name: output_statistics() for s in sites})
    first = seed
    for part in parts_of(observations):
        with torch.inference_mode(), _watched(student.net, names, len(part)) as peaks:
            _side_by_side(teacher, student, sites, part, range(first, first + len(part)), seen)
        for name, peak in peaks.items():
            seen.inputs.setdefault(name, []).append(peak)
        first += len(part)
        if step is not None:
            step(len(part))
    return seen


def _side_by_side(
    teacher: LiberoVla,
    student: LiberoVla,
    sites: Sequence[AttentionSite],
    part: Sequence[Observation],
    seeds: Sequence[int],
    seen: Seen,
) -> None:
    """Both in one denoising loop, so that the logits of one step are held and no more."""
    contexts = [policy.prepare_batch(part) for policy in (teacher, student)]
    spreads = {site.name: torch.zeros(len(part), dtype=torch.float64) for site in sites}
    start = start_noise(teacher, seeds)

    def velocity(x: Tensor, step: int) -> Tensor:
        halves, traces = x.chunk(2), []
        speeds = []
        for policy, context, half in zip((teacher, student), contexts, halves, strict=True):
            with _tapped(policy.net, sites) as found:
                speeds.append(policy.velocity(context, half, step))
            traces.append(found)
        for site in sites:
            of_logits, of_outputs = zip(*(found[site.name] for found in traces), strict=True)
            heads = seen.alphas[site.name].add_calls(*of_logits)
            seen.betas[site.name].add_calls(*of_outputs)
            spreads[site.name] = torch.maximum(spreads[site.name], heads.amax(1))
        return torch.cat(speeds)

    flow.denoise(velocity, torch.cat([start, start]), teacher.steps)
    for name, spread in spreads.items():
        seen.spreads.setdefault(name, []).append(spread)


@contextmanager
def _tapped(
    net: nn.Module, sites: Sequence[AttentionSite]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Note logits (B, heads, n) and outputs (B, 1, n) of each attention that runs inside."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    made: dict[str, Tensor] = {}
    handles = []

    def tap(site: AttentionSite) -> None:
        def core(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            made[site.name] = logits(inputs[0], inputs[1])

        def out(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[site.name] = made.pop(site.name), output.float().flatten(1)[:, None]

        module = net.get_submodule(f'{site.name}.core')
        handles.append(module.register_forward_pre_hook(core))
        handles.append(net.get_submodule(site.o).register_forward_hook(out))

    try:
        for site in sites:
            tap(site)
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watched(
    net: nn.Module, names: Sequence[str], frames: int
) -> Iterator[dict[str, Tensor]]:
    """Note the largest |input| that each named linear meets in each frame; (frames,)."""
    peaks: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # cameras are batched beside the frames, those of one frame together
            peak = inputs[0].detach().reshape(frames, -1).abs().amax(1).float()
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        handles.append(net.get_submodule(name).register_forward_pre_hook(hook))

    try:
        for name in names:
            watch(name)
        yield peaks
    finally:
        for handle in handles:
            handle.remove()
