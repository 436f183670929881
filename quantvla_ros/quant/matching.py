# SPDX-License-Identifier: Apache-2.0
"""Fit alpha and beta of quant/balance.py on a float and a quantized network side by side.

Hooks the attention cores for the logits of each head and the output projections for what leaves
them. Streams over batches: what is held is one batch of both networks. The caller passes
functions that run a network on a batch with the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantvla_ros.kernels.weights import PackedWeight, keep
from quantvla_ros.quant.balance import PairStatistics, keeps_helping, output_statistics, to_band
from quantvla_ros.quant.linear import Make, QuantizedLayer, QuantLinear
from quantvla_ros.quant.recipes import Matching
from quantvla_ros.quant.scheme import FLOAT
from quantvla_ros.quant.sites import AttentionSite, PolicySites

Batch = Callable[[nn.Module], None]


@dataclass
class Trace:
    """What one run gave, by site: logits (B, heads, n) and outputs (B, n) of its calls."""

    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Factors:
    """Fitted factors of one attention: alpha (heads,) and beta; 1 where nothing is changed."""

    alpha: Tensor
    beta: float

    @property
    def neutral(self) -> bool:
        """Whether nothing is changed."""
        return bool((self.alpha == 1).all()) and self.beta == 1.0


def logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(D) by head: q (B, H, T, D), k (B, G, S, D) -> (B, H, T * S)."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.float() @ keys.float().transpose(2, 3) / q.shape[-1] ** 0.5).flatten(2)


def trace(net: nn.Module, sites: Sequence[AttentionSite], batch: Batch) -> Trace:
    """Run one batch and keep logits and outputs of every attention site."""
    found, handles = Trace(), []

    def watch(site: AttentionSite) -> None:
        def core(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.logits.setdefault(site.name, []).append(logits(inputs[0], inputs[1]))

        def out(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found.outputs.setdefault(site.name, []).append(output.detach().float().flatten(1))

        module = net.get_submodule(f'{site.name}.core')
        handles.append(module.register_forward_pre_hook(core))
        handles.append(net.get_submodule(site.o).register_forward_hook(out))

    try:
        for site in sites:
            watch(site)
        with torch.no_grad():
            batch(net)
    finally:
        for handle in handles:
            handle.remove()
    return found


def fit_factors(
    teacher: nn.Module,
    student: nn.Module,
    sites: PolicySites,
    batches: Sequence[Batch],
    how: Matching,
) -> dict[str, Factors]:
    """Fit every site's factors; with how.check, fit on even batches and confirm on odd ones."""
    chosen = [site for site in sites.attentions if site.alpha_foldable or site.beta_foldable]
    fitting = batches[::2] if how.check and len(batches) > 1 else batches
    alphas = {site.name: PairStatistics(site.heads) for site in chosen}
    betas = {site.name: output_statistics() for site in chosen}
    for batch in fitting:
        t, s = trace(teacher, chosen, batch), trace(student, chosen, batch)
        for site in chosen:
            _add(alphas[site.name], t.logits[site.name], s.logits[site.name])
            _add(betas[site.name], *([o[:, None] for o in x.outputs[site.name]] for x in (t, s)))
    found = {}
    for site in chosen:
        heads = torch.ones(site.heads, dtype=torch.float64)
        alpha = _factor(alphas[site.name], how) if how.alpha and site.alpha_foldable else heads
        beta = _factor(betas[site.name], how) if how.beta and site.beta_foldable else heads[:1]
        found[site.name] = Factors(alpha, float(beta))
    if how.check:
        return _confirmed(teacher, student, chosen, batches[1::2] or batches, found)
    return found


def _add(statistics: PairStatistics, teacher: list[Tensor], student: list[Tensor]) -> None:
    for t, s in zip(teacher, student, strict=True):
        for one, other in zip(t.cpu(), s.cpu(), strict=True):
            statistics.add(one, other)


def _factor(statistics: PairStatistics, how: Matching) -> Tensor:
    raw = statistics.ratio() if how.fit == 'ratio' else statistics.least_squares()
    return to_band(raw)


def _confirmed(
    teacher: nn.Module,
    student: nn.Module,
    sites: Sequence[AttentionSite],
    batches: Sequence[Batch],
    found: Mapping[str, Factors],
) -> dict[str, Factors]:
    """Set every factor to 1 that does not lower the error of frames it was not fitted on."""
    before: dict[str, list[Tensor]] = {}
    after: dict[str, list[Tensor]] = {}
    for batch in batches:
        t, s = trace(teacher, sites, batch), trace(student, sites, batch)
        for site in sites:
            factors = found[site.name]
            for key, old, new in (
                ('alpha', *_errors(t.logits, s.logits, site.name, factors.alpha, centred=True)),
                ('beta', *_errors(t.outputs, s.outputs, site.name, torch.tensor(factors.beta),
                                  centred=False)),
            ):
                before.setdefault(f'{site.name}/{key}', []).append(old)
                after.setdefault(f'{site.name}/{key}', []).append(new)
    kept = {}
    for site in sites:
        alpha = found[site.name].alpha.clone()
        old, new = (torch.cat(x[f'{site.name}/alpha']) for x in (before, after))
        for head in range(site.heads):
            if not keeps_helping(old[:, head], new[:, head]):
                alpha[head] = 1.0
        old, new = (torch.cat(x[f'{site.name}/beta']) for x in (before, after))
        helps = keeps_helping(old, new)
        kept[site.name] = Factors(alpha, found[site.name].beta if helps else 1.0)
    return kept


def _errors(
    teacher: dict[str, list[Tensor]],
    student: dict[str, list[Tensor]],
    name: str,
    factor: Tensor,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of each frame, (B,) or (B, heads), without and with the factor."""
    old, new = [], []
    for t, s in zip(teacher[name], student[name], strict=True):
        t, s = t.double().cpu(), s.double().cpu()
        if centred:
            t, s = t - t.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True)
        scaled = s * (factor[:, None] if factor.ndim else factor)
        old.append((t - s).pow(2).mean(-1))
        new.append((t - scaled).pow(2).mean(-1))
    return torch.stack(old).mean(0), torch.stack(new).mean(0)


def fold(
    net: nn.Module,
    sites: PolicySites,
    layers: Mapping[str, QuantizedLayer],
    factors: Mapping[str, Factors],
    make: Make = QuantLinear,
) -> dict[str, QuantizedLayer]:
    """Fold factors into stored layers, put the changed ones into net, and return all layers.

    A layer that the layout left in float becomes a 16-bit one with a fold. A layer with rows of
    mixed width cannot take a factor and stays as it is.
    """
    folds: dict[str, Tensor] = {}
    for site in sites.attentions:
        if site.name in factors and not factors[site.name].neutral:
            found = factors[site.name]
            rows = found.alpha.repeat_interleave(site.head_dim)
            if not bool((rows == 1).all()):
                folds[site.q] = rows
            if found.beta != 1.0:
                folds[site.o] = torch.full((sites.linear(site.o).out_features,), found.beta)
    done = dict(layers)
    for name, rows in folds.items():
        layer = done[name] if name in done else _kept(net.get_submodule(name))
        if isinstance(layer.weight, PackedWeight):
            done[name] = replace(layer, fold=rows.float())
            parent, _, child = name.rpartition('.')
            device = next(iter(net.parameters())).device
            setattr(net.get_submodule(parent), child, make(done[name]).to(device))
    return done


def _kept(linear: nn.Module) -> QuantizedLayer:
    assert isinstance(linear, nn.Linear)
    bias = None if linear.bias is None else linear.bias.detach().cpu().float()
    return QuantizedLayer(FLOAT, keep(linear.weight.detach().cpu()), bias)
