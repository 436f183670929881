# SPDX-License-Identifier: Apache-2.0
"""Find the transform of one layer that a recipe asks for, from what was seen to enter it.

Pure functions of a weight (rows, k) and its InputStatistics. Each step works in the frame that
the steps before it made. Returns the transform and, where it was learned, a clipping ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantvla_ros.quant.observe import InputStatistics
from quantvla_ros.quant.pack import absmax_scale, dequantize, quantize
from quantvla_ros.quant.recipes import (
    AwqScale,
    Greedy,
    Hadamard,
    LearnedScale,
    Recipe,
    Search,
    Smooth,
    Snake,
    Step,
    Svd,
    SvdHadamard,
    TwoPointer,
)
from quantvla_ros.quant.rounding import expected_error, layer_error
from quantvla_ros.quant.scheme import Granularity, PerStep, Scheme, qmax
from quantvla_ros.quant.transforms import (
    InputTransform,
    block_size,
    duquant_rotation,
    smoothing_diagonal,
    snake_permutation,
    svd_hadamard_rotation,
    svd_rotation,
    two_pointer_permutation,
)


class Fit(NamedTuple):
    """A transform, and the share of each row's absmax that its scale covers (None: all)."""

    transform: InputTransform
    clip: Tensor | None = None


def append(chain: InputTransform, link: InputTransform) -> InputTransform:
    """Join two transforms; a link that only continues the last one merges into it."""
    if chain.then is not None:
        return replace(chain, then=append(chain.then, link))
    if chain.hadamard or chain.blocks is not None or (
        link.diagonal is not None
        and (chain.diagonal is not None or chain.permutation is not None)
    ) or (link.permutation is not None and chain.permutation is not None):
        return chain.followed_by(link) if not chain.is_identity else link
    return InputTransform(
        chain.diagonal if link.diagonal is None else link.diagonal,
        chain.permutation if link.permutation is None else link.permutation,
        link.hadamard,
        link.blocks,
    )


def fit_transform(
    recipe: Recipe, weight: Tensor, seen: InputStatistics, scheme: Scheme
) -> Fit:
    """Build a recipe's transform for one layer."""
    return _fit_steps(recipe.transform, weight, seen, scheme)


def _fit_steps(
    steps: Sequence[Step], weight: Tensor, seen: InputStatistics, scheme: Scheme
) -> Fit:
    fit = Fit(InputTransform())
    for step in steps:
        if isinstance(step, Search):
            options = [_fit_steps(option, weight, seen, scheme) for option in step.options]
            errors = [trial_error(o.transform, weight, seen, scheme) for o in options]
            link, clip = options[errors.index(min(errors))]
        else:
            link, clip = _link(step, _Frame(fit.transform, weight, seen), scheme)
        fit = Fit(append(fit.transform, link), fit.clip if clip is None else clip)
    return fit


def trial_error(
    transform: InputTransform, weight: Tensor, seen: InputStatistics, scheme: Scheme
) -> float:
    """Squared output error to expect in a transform's frame when tokens and weight are rounded."""
    return expected_error(
        transform.weight(weight.float()),
        transform.gram(seen.hessian),
        token_noise(transform, seen, scheme),
        scheme.weight_bits,
    )


def token_noise(transform: InputTransform, seen: InputStatistics, scheme: Scheme) -> float:
    """Variance that rounding adds to each channel of a token: the mean of scale^2 / 12."""
    if scheme.act_bits >= 16 or not seen.tokens:
        return 0.0
    peaks = transform.activations(seen.sample()).abs().amax(1).double()
    return float((peaks / qmax(scheme.act_bits)).pow(2).mean() / 12)


class _Frame:
    """Weight, sample and channel peaks as the next step of a recipe meets them."""

    def __init__(self, transform: InputTransform, weight: Tensor, seen: InputStatistics) -> None:
        self.weight = transform.weight(weight.float())
        self.sample = transform.activations(seen.sample())
        self.absmax = seen.absmax if transform.is_identity else self.sample.abs().amax(0)
        self.mean_abs = seen.mean_abs if transform.is_identity else self.sample.abs().mean(0)
        self.hessian = transform.gram(seen.hessian)


def _link(step: Step, frame: _Frame, scheme: Scheme) -> Fit:
    k = frame.weight.shape[1]
    if isinstance(step, Smooth):
        return Fit(_scaling(smoothing_diagonal(frame.absmax, frame.weight, step.alpha)))
    if isinstance(step, AwqScale):
        return Fit(_scaling(_awq_diagonal(step, frame, scheme)))
    if isinstance(step, LearnedScale):
        return _learned(step, frame, scheme)
    if isinstance(step, Snake):
        perm = snake_permutation(frame.absmax, block_size(k, step.block))
        return Fit(InputTransform(permutation=perm))
    if isinstance(step, TwoPointer):
        perm = two_pointer_permutation(frame.weight.pow(2).mean(0))
        return Fit(InputTransform(permutation=perm))
    if isinstance(step, Hadamard):
        return Fit(InputTransform(hadamard=block_size(k, step.block)))
    assert not isinstance(step, Search)
    block = block_size(k, step.block)
    if isinstance(step, Greedy):
        blocks = duquant_rotation(frame.sample, block, step.steps)[None]
    elif isinstance(step, SvdHadamard):
        blocks = svd_hadamard_rotation(frame.weight, block)
    else:
        assert isinstance(step, Svd)
        blocks = svd_rotation(frame.weight, block)
    return Fit(InputTransform(blocks=blocks.float()))


def _scaling(diagonal: Tensor) -> InputTransform:
    """A diagonal around 1 at two bytes a channel, rounded here so that it divides out."""
    around = diagonal / diagonal.log().mean().exp()
    return InputTransform(diagonal=around.to(torch.bfloat16))


def _awq_diagonal(step: AwqScale, frame: _Frame, scheme: Scheme) -> Tensor:
    """s = mean|x|^a with the a in [0, 1) whose rounded weight changes the output least."""
    best, least = torch.ones_like(frame.mean_abs), float('inf')
    for point in range(step.points):
        s = frame.mean_abs.clamp_min(1e-8) ** (point / step.points)
        s = s / (s.max() * s.min()).sqrt()
        scaled = frame.weight * s
        scale = absmax_scale(scaled, scheme.weight_bits, scheme.weight)
        codes = quantize(scaled, scale, scheme.weight_bits, scheme.weight)
        rounded = dequantize(codes, scale, scheme.weight) / s
        error = layer_error(frame.weight, rounded, frame.hessian)
        if error < least:
            best, least = s, error
    return best


def _straight_through(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to the grid going forward, pass the gradient of clipping going back."""
    limit = qmax(bits)
    scaled = (x / scale).clamp(-limit, limit)
    return (scaled + (scaled.round() - scaled).detach()) * scale


def _learned(step: LearnedScale, frame: _Frame, scheme: Scheme) -> Fit:
    """Learn the diagonal and each row's clipping ratio on the layer's output error."""
    x, w = frame.sample, frame.weight
    with torch.enable_grad():
        log_s = smoothing_diagonal(frame.absmax, w).log().requires_grad_()
        clip = torch.full((len(w), 1), 4.0, requires_grad=True)  # sigmoid(4) = 0.982
        optimizer = torch.optim.Adam([log_s, clip], lr=step.rate)
        target = x @ w.T
        for _ in range(step.steps):
            s = log_s.exp()
            scaled, inputs = w * s, x / s
            row = scaled.abs().amax(1, keepdim=True) * clip.sigmoid() / qmax(scheme.weight_bits)
            rounded = _straight_through(scaled, row, scheme.weight_bits)
            if scheme.act_bits < 16:
                peak = inputs.abs().amax(1, keepdim=True).clamp_min(1e-8)
                inputs = _straight_through(inputs, peak / qmax(scheme.act_bits), scheme.act_bits)
            loss = (inputs @ rounded.T - target).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Fit(_scaling(log_s.detach().exp()), clip.detach().sigmoid())


def static_scales(
    seen: InputStatistics, transform: InputTransform, act: Granularity, bits: int,
    percentile: float = 99.9,
) -> Tensor:
    """Scales from a percentile of magnitudes: one for each denoising step, (steps,), or (1,)."""
    per_step = isinstance(act, PerStep)
    samples = [seen.step_sample(step) for step in seen.steps] if per_step else [seen.sample()]
    scales = []
    for sample in samples:
        values = transform.activations(sample).abs().flatten()
        rank = min(len(values), max(1, round(percentile / 100 * len(values))))
        scales.append(float(values.kthvalue(rank).values) / qmax(bits))
    return torch.tensor(scales, dtype=torch.float32)


def clipped_scale(weight: Tensor, bits: int, granularity: Granularity, clip: Tensor) -> Tensor:
    """Absmax scale times a clipping ratio for each row."""
    return absmax_scale(weight, bits, granularity) * clip
