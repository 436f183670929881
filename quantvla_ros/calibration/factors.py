# SPDX-License-Identifier: Apache-2.0
"""Choose alpha and beta by the action error they leave, on frames they may be chosen on.

The published ratio and least squares each propose a factor for every head or attention; the form
with the lower action error is taken, then attention by attention what does not lower it is left
out. Whether the rest may stay is for held-out frames to say (run.py). Changes the student's q and
o layers in place, through their stored scales, as a loaded calibration does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from quantvla_ros.calibration.passes import Seen
from quantvla_ros.kernels.weights import PackedWeight
from quantvla_ros.quant.balance import PairStatistics, to_band
from quantvla_ros.quant.calibrated import factor_rows
from quantvla_ros.quant.linear import Make, QuantizedLayer
from quantvla_ros.quant.sites import AttentionSite, PolicySites

FORMS = ('ratio', 'least_squares')
Errors = Callable[[], np.ndarray]  # runs the student as it is: (frames,) action errors in rad


@dataclass(frozen=True)
class Factors:
    """alpha (heads,) and beta (1,) by attention, float32; what is missing is 1."""

    alpha: Mapping[str, Tensor] = field(default_factory=dict)
    beta: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, kind: str) -> Mapping[str, Tensor]:
        """Return one kind."""
        return self.alpha if kind == 'alpha' else self.beta

    def put(self, kind: str, found: Mapping[str, Tensor]) -> Factors:
        """Return these factors with those of one kind exchanged."""
        return replace(self, **{kind: dict(found)})


class Foldable:
    """The student's q and o layers, remade whenever the factors in their scales change.

    layers: stored ones by name; linears that the artifact left in float are scaled themselves.
    Attentions whose rows have mixed widths take no factor and are not offered.
    """

    def __init__(
        self, net: nn.Module, sites: PolicySites, layers: Mapping[str, QuantizedLayer], make: Make
    ) -> None:
        self._net, self._make = net, make
        offered = [site for site in sites.attentions if _takes(site, layers)]
        self.sites = replace(sites, attentions=tuple(offered))
        names = [name for site in offered for name in (site.q, site.o)]
        self._layers = {name: layers[name] for name in names if name in layers}
        self._floats = {name: _copied(net.get_submodule(name))
                        for name in names if name not in layers}
        self._rows: dict[str, Tensor] = {}

    def set(self, factors: Factors) -> None:
        """Fold these factors, and no others, into the student."""
        rows = factor_rows(factors.alpha, factors.beta, self.sites)
        for name in sorted(set(rows) | set(self._rows)):
            old, new = self._rows.get(name), rows.get(name)
            if old is None or new is None or not torch.equal(old, new):
                self._put(name, new)
        self._rows = rows

    def _put(self, name: str, rows: Tensor | None) -> None:
        parent, _, child = name.rpartition('.')
        holder = self._net.get_submodule(parent)
        if name in self._layers:
            layer = self._layers[name]
            if rows is not None:
                fold = rows if layer.fold is None else layer.fold * rows
                layer = replace(layer, fold=fold)
            setattr(holder, child, self._make(layer))
            return
        linear = _copied(self._floats[name])
        if rows is not None:
            linear.weight.mul_(rows[:, None])
            if linear.bias is not None:
                linear.bias.mul_(rows)
        setattr(holder, child, linear)


def _takes(site: AttentionSite, layers: Mapping[str, QuantizedLayer]) -> bool:
    packed = all(isinstance(layers[name].weight, PackedWeight)
                 for name in (site.q, site.o) if name in layers)
    return packed and (site.alpha_foldable or site.beta_foldable)


def _copied(linear: nn.Module) -> nn.Linear:
    assert isinstance(linear, nn.Linear)
    bias = linear.bias is not None
    copy = nn.Linear(linear.in_features, linear.out_features, bias=bias, device='meta')
    copy.weight = nn.Parameter(linear.weight.detach().clone(), False)
    if bias:
        copy.bias = nn.Parameter(linear.bias.detach().clone(), False)
    return copy.eval()


def proposals(
    seen: Seen, sites: Sequence[AttentionSite], kind: str, neutral: float, clip: float
) -> dict[str, dict[str, Tensor]]:
    """Return form -> attention -> factors in the band; attentions left at 1 are not named."""
    found: dict[str, dict[str, Tensor]] = {form: {} for form in FORMS}
    for site in sites:
        if not (site.alpha_foldable if kind == 'alpha' else site.beta_foldable):
            continue
        statistics = (seen.alphas if kind == 'alpha' else seen.betas)[site.name]
        for form, raw in raw_factors(statistics).items():
            factors = to_band(raw, neutral, clip).float()
            if not bool((factors == 1).all()):
                found[form][site.name] = factors
    return found


def raw_factors(statistics: PairStatistics) -> dict[str, Tensor]:
    """Both forms before band and clip."""
    return {'ratio': statistics.ratio(), 'least_squares': statistics.least_squares()}


def raw_values(seen: Seen) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return kind -> form -> attention -> factors before band and clip, for the report."""
    def of(statistics: Mapping[str, PairStatistics], form: str) -> dict[str, list[float]]:
        return {name: [round(float(v), 6) for v in raw_factors(found)[form]]
                for name, found in statistics.items()}

    return {kind: {form: of(statistics, form) for form in FORMS}
            for kind, statistics in (('alpha', seen.alphas), ('beta', seen.betas))}


@dataclass(frozen=True)
class Choice:
    """What came out of a search: form, factors, and mean errors in rad while searching."""

    form: str
    factors: Mapping[str, Tensor]
    before_rad: float
    errors_rad: Mapping[str, float]


def by_weight(
    foldable: Foldable, options: Mapping[str, Mapping[str, Mapping[str, Tensor]]], errors: Errors
) -> list[str]:
    """Return the kinds, that with the lowest error first; leaves the student without factors."""
    lowest: dict[str, float] = {}
    for kind, forms in options.items():
        lowest[kind] = float('inf')
        for factors in forms.values():
            if factors:
                foldable.set(Factors().put(kind, factors))
                lowest[kind] = min(lowest[kind], float(errors().mean()))
    foldable.set(Factors())
    return sorted(lowest, key=lambda kind: lowest[kind])


def choose(
    foldable: Foldable,
    kept: Factors,
    kind: str,
    proposed: Mapping[str, Mapping[str, Tensor]],
    errors: Errors,
) -> Choice:
    """Find the factors of one kind that lower the mean error most; none where none does.

    kept: factors of the other kind, which stay. Leaves the student with `kept` alone.
    """
    foldable.set(kept)
    before = float(errors().mean())
    tried: dict[str, float] = {}
    for form, factors in proposed.items():
        if factors:
            foldable.set(kept.put(kind, factors))
            tried[form] = float(errors().mean())
    best, lowest = '', before
    chosen: dict[str, Tensor] = {}
    if tried:
        best = min(tried, key=lambda form: tried[form])
        chosen, lowest = _pruned(foldable, kept, kind, proposed[best], errors, before)
        tried[f'{best}, chosen attentions'] = lowest
        if tried[best] < lowest:
            chosen, lowest = dict(proposed[best]), tried[best]
    foldable.set(kept)
    return Choice(best, chosen if lowest < before else {}, before, tried)


def _pruned(
    foldable: Foldable,
    kept: Factors,
    kind: str,
    proposed: Mapping[str, Tensor],
    errors: Errors,
    before: float,
) -> tuple[dict[str, Tensor], float]:
    """Add attention after attention, as activations flow, each only if the error falls."""
    chosen: dict[str, Tensor] = {}
    lowest = before
    for name, factors in proposed.items():
        trial = {**chosen, name: factors}
        foldable.set(kept.put(kind, trial))
        error = float(errors().mean())
        if error < lowest:
            chosen, lowest = trial, error
    return chosen, lowest
