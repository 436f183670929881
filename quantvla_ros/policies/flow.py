# SPDX-License-Identifier: Apache-2.0
"""From noise to a chunk along a learned velocity, for any flow-matching policy.

Time runs from 0 (noise) to 1 (chunk): x_t = (1 - t) noise + t chunk, velocity = chunk - noise.
A model whose time runs from 1 to 0 passes velocity(x, t) = -v(x, 1 - t). Everything here is in
the model's normalised units; who calls owns them. Holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**64


@dataclass(frozen=True)
class PrefixGuidance:
    """Pull a chunk towards what is still being executed (real-time chunking).

    target: (batch, steps, action) normalised. weights: (steps,) in [0, 1], 1 for steps that will
    have been executed before the new chunk arrives. strongest: bound of the guidance weight.
    """

    target: Tensor
    weights: Tensor
    strongest: float = 10.0


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal float32 noise that depends on the seed alone.

    numpy's Philox counter generator keyed by the seed, drawn in float64: the same on every device
    and thread count. Raises ValueError on a seed outside 0 .. 2^64 - 1.
    """
    if not 0 <= seed < MAX_SEED:
        raise ValueError(f'seed is {seed}; expected a whole number from 0 to 2^64 - 1')
    generator = np.random.Generator(np.random.Philox(key=seed))
    return generator.standard_normal(shape).astype(np.float32)


def flow_times(steps: int) -> list[float]:
    """Return the times at which Euler's method asks for a velocity."""
    if steps < 1:
        raise ValueError(f'steps is {steps}; expected at least one denoising step')
    return [step / steps for step in range(steps)]


def prefix_weights(frozen: int, overlap: int, steps: int) -> np.ndarray:
    """Weights of a prefix: 1 for the frozen steps, falling linearly to 0 behind the overlap.

    frozen: steps executed before the new chunk arrives. overlap: steps the prefix still covers.
    """
    step = np.arange(steps)
    fall = (overlap - step) / max(overlap - frozen + 1, 1)
    return np.where(step < overlap, np.clip(fall, 0.0, 1.0), 0.0) * (step >= frozen) + (
        step < min(frozen, overlap)
    )


def guidance_weight(time: float, steps: int, strongest: float) -> float:
    """Weight of the correction at a time: (t^2 + (1-t)^2) / (t (1-t)), bounded.

    One Euler step moves by 1/steps, so a weight above `steps` would overshoot the target.
    """
    bound = min(strongest, float(steps))
    if time <= 0.0:
        return bound
    return min(bound, (time**2 + (1 - time) ** 2) / (time * (1 - time)))


def denoise(
    velocity: Callable[[Tensor, int], Tensor],
    start: Tensor,
    steps: int,
    guidance: PrefixGuidance | None = None,
) -> Tensor:
    """Integrate from noise to a chunk with Euler's method.

    velocity(x, step) -> dx/dt at flow_times(steps)[step]; start: noise (batch, steps, action).
    With guidance, v' = v + g w (target - (x + (1 - t) v)): the bracket's right side is the chunk
    the model is heading for. The closed form needs no gradient, so integer kernels serve it too.
    """
    x = start
    for step, time in enumerate(flow_times(steps)):
        v = velocity(x, step)
        if guidance is not None:
            g = guidance_weight(time, steps, guidance.strongest)
            heading = x + (1.0 - time) * v
            v = v + g * guidance.weights[:, None] * (guidance.target - heading)
        x = torch.add(x, v, alpha=1.0 / steps)
    return x
