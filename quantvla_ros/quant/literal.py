# SPDX-License-Identifier: Apache-2.0
"""QuantVLA and Omega-QVLA as their papers and codes have them, as simulations for comparison.

Neither form can run on integers: a scale for each input channel stands inside the sum,
y_o = sum_k s_k q_k w_ok. Here the sums are floats, as in the published codes. Stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantvla_ros.quant.layout import FULL_STACK, SELECTIVE
from quantvla_ros.quant.linear import DENOISING_STEP
from quantvla_ros.quant.observe import InputStatistics, Run, observe
from quantvla_ros.quant.pack import grouped, safe_scale
from quantvla_ros.quant.scheme import Granularity, PerGroup, PerRow, Scheme, qmax
from quantvla_ros.quant.sites import ACTION, PolicySites
from quantvla_ros.quant.transforms import (
    block_size,
    rotate_blocks,
    svd_hadamard_rotation,
    svd_rotation,
    two_pointer_permutation,
)

CLIPS = (0.5, 0.75, 1.0, 1.25, 1.5)  # scale = maxabs / qmax / clip, the one with the least error
PERCENTILE = 99.9


@dataclass(frozen=True)
class Literal:
    """One published form.

    hadamard: SVD x Hadamard instead of SVD. steps: an activation scale for each denoising step
    and channel instead of each channel. solver: the published GPTQ in the backbone, whose inverse
    is not down-dated and whose blocks of 128 do not talk. first_batch: the published calibrator
    freezes its scale after the first call.
    """

    name: str
    groups: tuple[str, ...]
    hadamard: bool
    steps: bool
    solver: bool
    first_batch: bool = False


LITERALS = {
    literal.name: literal
    for literal in (
        Literal('quantvla_literal', SELECTIVE, False, False, False),
        Literal('quantvla_first_batch', SELECTIVE, False, False, False, True),
        Literal('omega_literal', FULL_STACK, True, True, True),
    )
}


def clip_rounded(weight: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """Round to [-qmax - 1, qmax] with the published choice of scale; returns the float values."""
    groups = grouped(weight, granularity)
    full = groups.abs().amax(-1, keepdim=True) / qmax(bits)
    best, least = torch.zeros_like(groups), torch.full_like(full, float('inf'))
    for clip in CLIPS:
        scale = safe_scale(full / clip)
        rounded = (groups / scale).round().clamp(-qmax(bits) - 1, qmax(bits)) * scale
        error = (rounded - groups).pow(2).sum(-1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.reshape(weight.shape)


def fixed_inverse_gptq(weight: Tensor, hessian: Tensor, bits: int, damp: float = 0.05) -> Tensor:
    """The published solver: rows of a fixed H^-1, each block of 128 columns on its own."""
    w = weight.double().clone()
    out = torch.empty_like(w)
    for first in range(0, w.shape[1], 128):
        part = slice(first, min(first + 128, w.shape[1]))
        h = hessian.double()[part, part].clone()
        mean = float(h.diagonal().mean()) or 1.0
        h.diagonal().add_(damp * mean)
        inverse = torch.linalg.inv(h)
        block = w[:, part]
        full = block.abs().amax(1) / qmax(bits)
        errors = torch.stack([
            (_to_grid(block, full / clip, bits) - block).pow(2).sum(1) for clip in CLIPS
        ])
        scale = safe_scale(full / torch.tensor(CLIPS, dtype=w.dtype)[errors.argmin(0)])
        for j in range(block.shape[1]):
            q = _to_grid(block[:, j : j + 1], scale, bits)[:, 0]
            out[:, first + j] = q
            error = (block[:, j] - q) / inverse[j, j]
            block[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
    return out.float()


def _to_grid(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    scale = safe_scale(scale)[:, None]
    return (x / scale).round().clamp(-qmax(bits) - 1, qmax(bits)) * scale


def output_rotation(weight: Tensor) -> Tensor:
    """Left singular vectors of each run of 64 output rows, (n, b, b)."""
    block = block_size(weight.shape[0])
    rows = weight.double().reshape(-1, block, weight.shape[1])
    return torch.linalg.svd(rows, full_matrices=weight.shape[1] < block).U


class LiteralLinear(nn.Module):
    """y = (fq(x P R) fq(U W P R)^T) U + b with a static scale for each input channel."""

    bias: Tensor | None

    def __init__(
        self,
        form: Literal,
        linear: nn.Linear,
        seen: InputStatistics,
        scheme: Scheme,
        in_head: bool,
    ) -> None:
        super().__init__()
        weight = linear.weight.detach().float().cpu()
        block = block_size(weight.shape[1])
        perm = two_pointer_permutation(weight.pow(2).mean(0))
        moved = weight[:, perm]
        rotation = (svd_hadamard_rotation if form.hadamard else svd_rotation)(moved, block).float()
        out = output_rotation(weight).float()
        turned = rotate_blocks(rotate_blocks(moved, rotation).T, out.transpose(1, 2)).T
        group = form.steps and weight.shape[1] % 128 == 0
        if form.solver and not in_head:
            h = seen.hessian[perm][:, perm]
            h = rotate_blocks(rotate_blocks(h, rotation.double()).T, rotation.double())
            rounded = fixed_inverse_gptq(turned, h, scheme.weight_bits)
        else:
            kind = PerGroup(128) if group else PerRow()
            rounded = clip_rounded(turned, scheme.weight_bits, kind)
        self.bits, self.in_features = scheme.act_bits, linear.in_features
        self.register_buffer('perm', perm, persistent=False)
        self.register_buffer('rotation', rotation, persistent=False)
        self.register_buffer('out', out, persistent=False)
        self.register_buffer('weight', rounded, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().cpu().float()
        self.register_buffer('bias', bias, persistent=False)
        self.register_buffer('table', self._table(form, seen), persistent=False)

    def _into(self, x: Tensor) -> Tensor:
        return rotate_blocks(x[..., self.get_buffer('perm')], self.get_buffer('rotation'))

    def _table(self, form: Literal, seen: InputStatistics) -> Tensor:
        """Scales (steps, in), or (1, in) without steps."""
        if form.first_batch and seen.first is not None:
            samples = [seen.first]
        elif form.steps and seen.steps:
            samples = [seen.step_sample(step) for step in seen.steps]
        else:
            samples = [seen.sample()]
        rows = [torch.quantile(self._into(x).abs(), PERCENTILE / 100, dim=0) for x in samples]
        return safe_scale(torch.stack(rows) / qmax(self.bits))

    def forward(self, x: Tensor) -> Tensor:
        """Run the published form in floats."""
        table = self.get_buffer('table')
        step = DENOISING_STEP.get() or 0
        scale = table[min(step, len(table) - 1)]
        z = self._into(x.float()) / scale
        z = z.round().clamp(-qmax(self.bits) - 1, qmax(self.bits)) * scale
        y = rotate_blocks(F.linear(z, self.get_buffer('weight')), self.get_buffer('out'))
        bias = self.bias
        return (y if bias is None else y + bias).to(x.dtype)


def put_literal(
    net: nn.Module,
    sites: PolicySites,
    form: Literal,
    precision: Scheme,
    run: Run,
    seen: Mapping[str, InputStatistics] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Replace the linears of a form's groups in place; calibrated on the float network.

    seen: statistics that were taken before, so that nothing is run.
    """
    chosen = sites.in_groups(form.groups)
    found = seen or observe(net, [site.name for site in chosen], run)
    fresh = {}
    for site in chosen:
        linear = net.get_submodule(site.name)
        assert isinstance(linear, nn.Linear)
        stats = found[site.name].to('cpu')
        fresh[site.name] = LiteralLinear(form, linear, stats, precision, site.group in ACTION)
        if progress is not None:
            progress(site.name, len(fresh), len(chosen))
    device = next(iter(net.parameters())).device
    for name, module in fresh.items():
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, module.to(device))
