# SPDX-License-Identifier: Apache-2.0
"""Run the shipped policy on recorded observations: chunks, calibration runs, random directions.

Owns which noise a frame meets (its own seed, the same for every variant of the policy) and what
an action error is. Knows no recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quantvla_ros.observation import Observation
from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_panda import LiberoVla, Prepared
from quantvla_ros.quant.jacobian import Loss
from quantvla_ros.quant.linear import denoising_step

BATCH = 16
GRIPPER_RAD = 0.01  # what one standard deviation of the gripper's command counts for, as an angle


def chunks(
    policy: LiberoVla, observations: Sequence[Observation], seed: int = 0, batch: int = BATCH
) -> np.ndarray:
    """Return the chunk of every frame, (frames, steps, joints) SI; frame i has seed + i."""
    found = []
    for first in range(0, len(observations), batch):
        part = observations[first : first + batch]
        prepared = policy.prepare_batch(part)
        seeds = range(seed + first, seed + first + len(part))
        found += [chunk.positions for chunk in policy.denoise_batch(prepared, list(seeds))]
    return np.stack(found)


def chunks_by_stride(
    policy: LiberoVla,
    observations: Sequence[Observation],
    seed: int = 0,
    strides: Sequence[int] = (1, 5),
    batch: int = BATCH,
) -> dict[int, np.ndarray]:
    """Return the chunks of chunks() at every stride: that of n takes every n-th denoising step.

    The times of 10 / 5 steps are those of steps 0 and 5 of 10, so scales that were fitted for
    each of the 10 serve them too. Each frame is encoded once for all strides.
    """
    found: dict[int, list[np.ndarray]] = {stride: [] for stride in strides}
    shape = (policy.config.chunk, policy.config.action)
    for first in range(0, len(observations), batch):
        part = observations[first : first + batch]
        prepared = policy.prepare_batch(part)
        noise = np.stack([flow.noise(seed + first + i, shape) for i in range(len(part))])
        start = torch.from_numpy(noise).to(policy.device)
        for stride, done in found.items():
            if policy.steps % stride:
                raise ValueError(f'{policy.steps} steps are not a multiple of {stride}')
            x = flow.denoise(_every(policy, prepared, stride), start, policy.steps // stride)
            rows = zip(x.cpu().numpy(), prepared.states, prepared.stamps_ns, strict=True)
            done += [policy.door.chunk(*row).positions for row in rows]
    return {stride: np.stack(done) for stride, done in found.items()}


def _every(
    policy: LiberoVla, prepared: Prepared, stride: int
) -> Callable[[Tensor, int], Tensor]:
    return lambda x, step: policy.velocity(prepared, x, step * stride)


def batches(
    policy: LiberoVla, observations: Sequence[Observation], seed: int = 0, batch: int = BATCH
) -> list[Callable[[nn.Module], None]]:
    """Return one function for each batch that runs a network in the policy's place on it."""

    def run(part: Sequence[Observation], first: int, net: nn.Module) -> None:
        own = policy.net
        policy.net = net  # type: ignore[assignment]
        try:
            chunks(policy, part, seed + first, batch)
        finally:
            policy.net = own

    def of(first: int) -> Callable[[nn.Module], None]:
        part = observations[first : first + batch]
        return lambda net: run(part, first, net)

    return [of(first) for first in range(0, len(observations), batch)]


def losses(
    policy: LiberoVla, observations: Sequence[Observation], draws: int = 1, seed: int = 0
) -> list[Loss]:
    """Return functions that run one frame with gradients and give r . A for a random r.

    A: the joints of the steps that are executed, in rad, and the gripper at GRIPPER_RAD.
    """
    rows = policy.contract.action.execute
    unit = np.array(policy.door.statistics.action_std[:rows], np.float64)
    unit[:, -1] = GRIPPER_RAD
    weight = torch.from_numpy(unit).float().to(policy.device)
    drawn = torch.Generator().manual_seed(seed)

    def loss(observation: Observation, index: int, r: Tensor) -> Loss:
        return lambda: (_differentiable(policy, observation, seed + index)[0, :rows] * r).sum()

    return [
        loss(o, i, torch.randn(weight.shape, generator=drawn).to(policy.device) * weight)
        for i, o in enumerate(observations)
        for _ in range(draws)
    ]


def _differentiable(policy: LiberoVla, observation: Observation, seed: int) -> Tensor:
    """The normalised chunk (1, steps, action) of one frame, with its graph."""
    context, _ = policy.encode([observation])
    shape = (policy.config.chunk, policy.config.action)
    start = torch.from_numpy(flow.noise(seed, shape))[None].to(policy.device)
    modulation = policy.modulation.clone()  # made in inference mode; a clone may enter a graph

    def velocity(x: Tensor, step: int) -> Tensor:
        with denoising_step(step):
            return policy.net.velocity(context, x, modulation[step : step + 1])

    return flow.denoise(velocity, start, policy.steps)


@dataclass(frozen=True)
class ActionError:
    """How far the executed part of some chunks lies from a reference.

    mean and p95 of |joint difference| in mrad; gripper: share of steps whose command differs;
    frames: the mean of each frame, mrad.
    """

    mean_mrad: float
    p95_mrad: float
    gripper: float
    frames: np.ndarray


def action_error(found: np.ndarray, reference: np.ndarray, execute: int) -> ActionError:
    """Compare chunks (frames, steps, joints), the last joint being the gripper."""
    off = 1e3 * np.abs(found[:, :execute, :-1] - reference[:, :execute, :-1])
    flips = found[:, :execute, -1] != reference[:, :execute, -1]
    return ActionError(
        float(off.mean()),
        float(np.quantile(off, 0.95)),
        float(flips.mean()),
        off.mean((1, 2)),
    )
