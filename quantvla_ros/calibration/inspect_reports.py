# SPDX-License-Identifier: Apache-2.0
"""What an artifact costs: each layer against its float one, each group by the actions it moves.

A layer is compared on the tokens that really enter it: error of the output, bits and bytes,
outliers before and after the transform, alpha and beta. A group is put into the float network
alone, so that its action error is its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.calibration.stress_twin import outlier_ratio
from quantvla_ros.observation import Observation
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.quant.artifact import Artifact
from quantvla_ros.quant.linear import QuantizedLayer, denoising_step, replace_linears
from quantvla_ros.quant.observe import InputStatistics
from quantvla_ros.quant.simulate import simulate
from quantvla_ros.quant.sites import GROUPS, PolicySites


@dataclass(frozen=True)
class LayerReport:
    """One layer. error: |y - y_q|^2 / |y|^2 on its own inputs; peaks: max / median by channel."""

    name: str
    scheme: str
    nbytes: int
    error: float
    peaks: float
    peaks_after: float
    factors: tuple[float, ...]

    @property
    def decibel(self) -> float:
        """Signal over error, dB."""
        return -10 * math.log10(max(self.error, 1e-12))


def examine(
    name: str, layer: QuantizedLayer, weight: Tensor, bias: Tensor | None, seen: InputStatistics
) -> LayerReport:
    """Compare one stored layer with its float one on the tokens that were seen."""
    wrong = power = 0.0
    module = simulate(layer)
    for step in seen.steps or (None,):
        x = seen.sample() if step is None else seen.step_sample(step)
        truth = x @ weight.T if bias is None else x @ weight.T + bias
        if step is None:
            found = module(x)
        else:
            with denoising_step(step):
                found = module(x)
        wrong += float((found - truth).double().pow(2).sum())
        power += float(truth.double().pow(2).sum())
    fold = layer.fold
    return LayerReport(
        name,
        layer.scheme.name,
        layer.nbytes,
        wrong / max(power, 1e-30),
        outlier_ratio(seen.absmax),
        outlier_ratio(layer.transform.activations(seen.sample()).abs().amax(0)),
        () if fold is None else tuple(fold.tolist()),
    )


def factors_by_head(
    reports: Sequence[LayerReport], sites: PolicySites
) -> list[tuple[str, list[float], float]]:
    """Return (attention, alpha of each head, beta) for every attention that has a fold."""
    by_name = {report.name: report.factors for report in reports}
    found = []
    for site in sites.attentions:
        q, o = by_name.get(site.q, ()), by_name.get(site.o, ())
        if q or o:
            alpha = list(q[:: site.head_dim]) if q else [1.0] * site.heads
            found.append((site.name, alpha, o[0] if o else 1.0))
    return found


@dataclass(frozen=True)
class GroupReport:
    """Layers of one kind. alone_mrad: action error when they alone are rounded."""

    group: str
    layers: int
    nbytes: int
    alone_mrad: float


def group_reports(
    policy: LiberoVla, observations: Sequence[Observation], artifact: Artifact,
    sites: PolicySites,
) -> list[GroupReport]:
    """Put each group of layers into the float network by itself and judge the actions."""
    reference, found = chunks(policy, observations), []
    own = policy.net
    for group in GROUPS:
        names = [s.name for s in sites.in_groups([group]) if s.name in artifact.layers]
        if not names:
            continue
        layers = {name: artifact.layers[name] for name in names}
        policy.net = copy.deepcopy(own)
        replace_linears(policy.net, layers, simulate)
        policy.tabulate(policy.net)
        error = action_error(
            chunks(policy, observations), reference, policy.contract.action.execute)
        nbytes = sum(layer.nbytes for layer in layers.values())
        found.append(GroupReport(group, len(names), nbytes, error.mean_mrad))
    policy.net = own
    policy.tabulate(own)
    return sorted(found, key=lambda report: -report.alone_mrad)


def facts(artifact: Artifact) -> list[tuple[str, str]]:
    """What an artifact says of itself, in words and with units."""
    provenance = artifact.provenance
    found = [
        ('layers', f'{len(artifact.layers)}, {artifact.nbytes / 1e6:.2f} MB'),
        ('checkpoint', provenance.checkpoint[:16]),
        ('frames', provenance.frames[:16] or 'none'),
    ]
    measured = dict(provenance.measured)
    count = measured.pop('judged_frames', None)
    for key, words in (('action_error', 'action error when it was made'),
                       ('other_seed', 'of another noise seed')):
        mean, p95, worst = (
            measured.pop(f'{key}{part}_mrad', None) for part in ('', '_p95', '_worst'))
        if mean is not None:
            rest = [f'{name} {value:.2f}' for name, value in
                    (('p95', p95), ('worst frame', worst)) if value is not None]
            found.append((words, f'{mean:.2f} mrad ({", ".join(rest)})'))
    if count is not None:
        found.append(('judged on', f'{count:.0f} held-out frames'))
    return found + [(key, f'{value:.4g}') for key, value in sorted(measured.items())]
