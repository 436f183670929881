# SPDX-License-Identifier: Apache-2.0
"""`quantvla inspect`: what an artifact costs, layer by layer, as text and one HTML page.

Compares every stored layer with the float layer of its checkpoint on the tokens that really enter
it: error of the output, bits and bytes, outliers before and after the transform, alpha and beta.
The page is one file that loads nothing.
"""

from __future__ import annotations

import argparse
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantvla_ros.calibration.frames_file import read_frames
from quantvla_ros.calibration.policy_runs import chunks
from quantvla_ros.calibration.stress_twin import outlier_ratio
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.base import PolicySettings
from quantvla_ros.policies.libero_checkpoint import read_checkpoint, read_settings
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import Artifact, read_artifact
from quantvla_ros.quant.linear import QuantizedLayer, denoising_step
from quantvla_ros.quant.observe import InputStatistics, observe
from quantvla_ros.quant.simulate import simulate
from quantvla_ros.quant.sites import PolicySites


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `quantvla inspect`."""
    add = parser.add_argument
    add('artifact', type=Path, help='artifact folder, as MODEL/w4a8')
    add('--model', default='', help='its checkpoint; default: the folder above the artifact')
    add('--frames', type=Path, required=True, help='frames file made by `quantvla frames`')
    add('--limit', type=int, default=16, help='use at most so many frames')
    add('--html', type=Path, default=None, help='page to write; default: ARTIFACT/inspect.html')
    add('--top', type=int, default=15, help='layers to print, costliest first')


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


def as_text(
    reports: Sequence[LayerReport], artifact: Artifact,
    factors: Sequence[tuple[str, list[float], float]], top: int,
) -> str:
    """The costliest layers first."""
    provenance = artifact.provenance
    lines = [
        f'{provenance.recipe} {provenance.precision}: {len(reports)} layers, '
        f'{artifact.nbytes / 1e6:.2f} MB, checkpoint {provenance.checkpoint[:12]}',
        *(f'  {key}: {value:.3f}' for key, value in sorted(provenance.measured.items())),
        f'{"layer":44s} {"scheme":9s} {"kB":>7s} {"error":>8s} {"dB":>6s} '
        f'{"max/median":>11s} {"after":>7s}',
    ]
    for one in sorted(reports, key=lambda r: -r.error)[:top]:
        lines.append(
            f'{one.name:44s} {one.scheme:9s} {one.nbytes / 1e3:7.0f} {one.error:8.1e} '
            f'{one.decibel:6.1f} {one.peaks:11.1f} {one.peaks_after:7.1f}'
        )
    for name, alpha, beta in factors:
        shown = ' '.join(f'{a:.3f}' for a in alpha)
        lines.append(f'{name}: alpha {shown}  beta {beta:.3f}')
    if not factors:
        lines.append('no alpha or beta is folded')
    return '\n'.join(lines)


def _bar(x: float, y: float, width: float, label: str, colour: str) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="11" '
            f'fill="{colour}"><title>{html.escape(label)}</title></rect>')


def _error_plot(reports: Sequence[LayerReport]) -> str:
    """One bar for each layer in the order of the network: error of its output, log scale."""
    low, high = 1e-6, 1.0
    body = []
    for row, one in enumerate(reports):
        share = math.log(max(one.error, low) / low) / math.log(high / low)
        colour = f'hsl({120 * (1 - min(share, 1)):.0f},60%,45%)'
        y = 14 * row
        body.append(f'<text x="0" y="{y + 10}">{html.escape(one.name)}</text>')
        body.append(_bar(300, y, 480 * share, f'{one.name}: {one.error:.2e}', colour))
    height = 14 * len(reports)
    return f'<svg viewBox="0 0 800 {height}" width="800" height="{height}">{"".join(body)}</svg>'


def _factor_plot(factors: Sequence[tuple[str, list[float], float]]) -> str:
    """Alpha of each head as dots, beta as a square, around the line of 1."""
    body, middle, reach = [], 540.0, 600.0
    for row, (name, alpha, beta) in enumerate(factors):
        y = 16 * row + 8
        body.append(f'<text x="0" y="{y + 4}">{html.escape(name)}</text>')
        body += [
            f'<circle cx="{middle + reach * math.log(a):.1f}" cy="{y}" r="4" fill="#2266aa">'
            f'<title>alpha of head {head}: {a:.4f}</title></circle>'
            for head, a in enumerate(alpha)
        ]
        x = middle + reach * math.log(beta)
        body.append(f'<rect x="{x - 4:.1f}" y="{y - 4}" width="8" height="8" fill="#aa4422">'
                    f'<title>beta: {beta:.4f}</title></rect>')
    height = 16 * len(factors)
    line = f'<line x1="{middle}" x2="{middle}" y1="0" y2="{height}" stroke="#999"/>'
    return (f'<svg viewBox="0 0 800 {height}" width="800" height="{height}">{line}'
            f'{"".join(body)}</svg>')


def as_html(
    reports: Sequence[LayerReport], artifact: Artifact,
    factors: Sequence[tuple[str, list[float], float]],
) -> str:
    """One page that loads nothing from anywhere."""
    provenance = artifact.provenance
    head = ('layer', 'scheme', 'bytes', 'error', 'dB', 'max/median', 'after transform')
    rows = ''.join(
        '<tr>' + ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in (
            one.name, one.scheme, one.nbytes, f'{one.error:.2e}', f'{one.decibel:.1f}',
            f'{one.peaks:.1f}', f'{one.peaks_after:.1f}')) + '</tr>'
        for one in sorted(reports, key=lambda r: -r.error)
    )
    title = html.escape(f'{provenance.recipe} {provenance.precision}')
    facts: Mapping[str, object] = {
        'checkpoint': provenance.checkpoint, 'frames': provenance.frames,
        'seed': provenance.seed, 'bytes of the layers': artifact.nbytes, **provenance.measured,
    }
    said = ''.join(f'<li>{html.escape(k)}: {html.escape(str(v))}</li>' for k, v in facts.items())
    matching = (
        f'<p>Dots: alpha of each head; square: beta; line: 1.</p>{_factor_plot(factors)}'
        if factors else '<p>No alpha or beta is folded.</p>'
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>'
        'body{font:14px sans-serif;margin:2em}td,th{padding:1px 8px;text-align:right}'
        'td:first-child,th:first-child{text-align:left}text{font:10px monospace}'
        f'</style></head><body><h1>{title}</h1><ul>{said}</ul>'
        '<h2>Error of each layer on its own inputs, in the order of the network (1e-6 to 1)</h2>'
        f'{_error_plot(reports)}<h2>Attention temperature and output balance</h2>{matching}'
        '<h2>Layers, costliest first</h2><table><tr>'
        + ''.join(f'<th>{name}</th>' for name in head)
        + f'</tr>{rows}</table></body></html>\n'
    )


def run(args: argparse.Namespace) -> int:
    """Examine, print, write the page."""
    model = Path(args.model) if args.model else args.artifact.resolve().parent
    settings = read_settings(model)
    checkpoint, net = read_checkpoint(model)
    sites = libero_vla_sites(net)
    artifact = read_artifact(args.artifact, checkpoint.sha256, sites)
    policy = LiberoVla.around(
        load_contract(settings.contract), PolicySettings(), checkpoint, net
    )
    observations = read_frames(args.frames, args.limit).observations
    names = [site.name for site in sites.linears if site.name in artifact.layers]

    def run_frames() -> None:
        chunks(policy, observations)

    seen = observe(net, names, run_frames)
    reports = []
    with torch.no_grad():
        for name in names:
            linear = net.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layer = artifact.layers[name]
            reports.append(examine(name, layer, linear.weight, linear.bias, seen.pop(name)))
    factors = factors_by_head(reports, sites)
    print(as_text(reports, artifact, factors, args.top))
    page = args.html or args.artifact / 'inspect.html'
    page.write_text(as_html(reports, artifact, factors))
    print(f'{page} written')
    return 0

