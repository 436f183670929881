# SPDX-License-Identifier: Apache-2.0
"""The page of `quantvla inspect`: one HTML file that loads nothing, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from quantvla_ros.calibration.inspect_reports import GroupReport, LayerReport, facts
from quantvla_ros.quant.artifact import Artifact

TEXT = 'font-family="monospace" font-size="10" fill="currentColor"'


def _text(x: float, y: float, said: str, more: str = '') -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {TEXT} {more}>{html.escape(said)}</text>'


def _bar(x: float, y: float, width: float, label: str, colour: str) -> str:
    return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="11" '
            f'fill="{colour}"><title>{html.escape(label)}</title></rect>')


def _svg(height: float, body: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 800 {height:.0f}" width="800" height="{height:.0f}">'
            f'{"".join(body)}</svg>')


def _error_plot(reports: Sequence[LayerReport]) -> str:
    """One bar for each layer in the order of the network: error of its output, by decades."""
    if not reports:
        return ''
    floor, left, right, top = 1e-6, 220.0, 780.0, 18.0
    logs = [math.log10(max(one.error, floor)) for one in reports]
    first, last = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    decade, height = (right - left) / (last - first), top + 14 * len(reports)
    body = []
    for power in range(first, last + 1):
        x = left + decade * (power - first)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{height}" '
                    'stroke="#8886"/>')
        body.append(_text(x, 10, f'1e{power}', 'text-anchor="middle"'))
    for row, (one, log) in enumerate(zip(reports, logs, strict=True)):
        share, y = (log - first) / (last - first), top + 14 * row
        colour = f'hsl({120 * (1 - share):.0f},60%,45%)'
        said = f'{one.name}: {one.error:.2e}, {one.scheme}, {one.nbytes / 1e3:.0f} kB'
        body += [_text(0, y + 10, one.name), _bar(left, y, decade * (log - first), said, colour)]
    return _svg(height, body)


def _factor_plot(factors: Sequence[tuple[str, list[float], float]]) -> str:
    """Alpha of each head as dots, beta as a square, around the line of 1."""
    body, middle, reach = [], 540.0, 600.0
    for row, (name, alpha, beta) in enumerate(factors):
        y = 16 * row + 8
        body.append(_text(0, y + 4, name))
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
    return _svg(height, [line, *body])


def _group_plot(groups: Sequence[GroupReport]) -> str:
    """One bar for each group: the action error when its layers alone are rounded."""
    most, body = max([g.alone_mrad for g in groups], default=0.0) or 1.0, []
    for row, one in enumerate(groups):
        y, width = 20 * row + 2, 380 * one.alone_mrad / most
        noun = 'layer' if one.layers == 1 else 'layers'
        said = f'{one.alone_mrad:.3f} mrad, {one.layers} {noun}, {one.nbytes / 1e3:.0f} kB'
        body.append(_text(0, y + 10, one.group.replace('_', ' ')))
        body.append(_bar(140, y, width, said, '#4488cc'))
        body.append(_text(150 + width, y + 10, said))
    return _svg(20 * len(groups) + 4, body)


def as_html(
    reports: Sequence[LayerReport], artifact: Artifact,
    factors: Sequence[tuple[str, list[float], float]], groups: Sequence[GroupReport],
) -> str:
    """One page that loads nothing from anywhere."""
    provenance = artifact.provenance
    head = ('layer', 'scheme', 'kB', 'error', 'dB', 'peaks, max/median',
            'after the transform')
    rows = ''.join(
        '<tr>' + ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in (
            one.name, one.scheme, f'{one.nbytes / 1e3:.1f}', f'{one.error:.2e}',
            f'{one.decibel:.1f}', f'{one.peaks:.1f}', f'{one.peaks_after:.1f}')) + '</tr>'
        for one in sorted(reports, key=lambda r: -r.error)
    )
    title = html.escape(f'{provenance.recipe} {provenance.precision}')
    said = ''.join(f'<li>{html.escape(name)}: {html.escape(text)}</li>'
                   for name, text in facts(artifact))
    matching = (
        f'<p>Dots: alpha of each head; square: beta; line: 1.</p>{_factor_plot(factors)}'
        if factors else '<p>No alpha or beta is folded.</p>'
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{title}</title><style>'
        ':root{color-scheme:light dark}body{font:14px/1.4 sans-serif;margin:2em auto;'
        'max-width:60em;padding:0 1em}table{border-collapse:collapse}'
        'td,th{padding:1px 8px;text-align:right;font-variant-numeric:tabular-nums}'
        'tr:nth-child(even){background:#8881}'
        'td:first-child,th:first-child{text-align:left;white-space:nowrap}'
        'svg{max-width:100%;height:auto}'
        f'</style></head><body><h1>{title}</h1><ul>{said}</ul>'
        f'<h2>Action error when one group of layers alone is rounded</h2>{_group_plot(groups)}'
        '<h2>Error of each layer on its own inputs, in the order of the network</h2>'
        '<p>|y - q|² / |y|², y in float and q on integers</p>'
        f'{_error_plot(reports)}<h2>Attention temperature and output balance</h2>{matching}'
        '<h2>Layers, costliest first</h2><table><tr>'
        + ''.join(f'<th>{name}</th>' for name in head)
        + f'</tr>{rows}</table></body></html>\n'
    )
