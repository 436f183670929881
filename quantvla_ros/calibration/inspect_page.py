# SPDX-License-Identifier: Apache-2.0
"""The page of `quantvla inspect`: one HTML file that loads nothing, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from quantvla_ros.calibration.inspect_reports import GroupReport, LayerReport
from quantvla_ros.quant.artifact import Artifact


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


def _group_plot(groups: Sequence[GroupReport]) -> str:
    """One bar for each group: the action error when its layers alone are rounded."""
    most, body = max([g.alone_mrad for g in groups], default=0.0) or 1.0, []
    for row, one in enumerate(groups):
        y, width = 20 * row, 400 * one.alone_mrad / most
        said = f'{one.alone_mrad:.3f} mrad, {one.layers} layers, {one.nbytes / 1e3:.0f} kB'
        body.append(f'<text x="0" y="{y + 10}">{html.escape(one.group)}</text>')
        body.append(_bar(150, y, width, said, '#2266aa'))
        body.append(f'<text x="{160 + width:.0f}" y="{y + 10}">{html.escape(said)}</text>')
    height = 20 * len(groups)
    return f'<svg viewBox="0 0 800 {height}" width="800" height="{height}">{"".join(body)}</svg>'


def as_html(
    reports: Sequence[LayerReport], artifact: Artifact,
    factors: Sequence[tuple[str, list[float], float]], groups: Sequence[GroupReport],
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
        ':root{color-scheme:light dark}body{font:14px/1.4 sans-serif;margin:2em auto;'
        'max-width:60em;padding:0 1em}table{border-collapse:collapse}'
        'td,th{padding:1px 8px;text-align:right;font-variant-numeric:tabular-nums}'
        'tr:nth-child(even){background:#8881}td:first-child,th:first-child{text-align:left}'
        'text{font:10px monospace;fill:currentColor}svg{max-width:100%;height:auto}'
        f'</style></head><body><h1>{title}</h1><ul>{said}</ul>'
        f'<h2>Action error when one group of layers alone is rounded</h2>{_group_plot(groups)}'
        '<h2>Error of each layer on its own inputs, in the order of the network (1e-6 to 1)</h2>'
        f'{_error_plot(reports)}<h2>Attention temperature and output balance</h2>{matching}'
        '<h2>Layers, costliest first</h2><table><tr>'
        + ''.join(f'<th>{name}</th>' for name in head)
        + f'</tr>{rows}</table></body></html>\n'
    )
