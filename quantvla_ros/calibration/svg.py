# SPDX-License-Identifier: Apache-2.0
"""The few plots that a report needs, as inline SVG. Each takes numbers and returns text."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

COLOURS = ('#2266aa', '#aa4422', '#228844', '#999999')
ROW, LEFT, WIDTH = 16, 210, 620


def legend(names: Sequence[str]) -> str:
    """One line that names the colours."""
    marks = ''.join(
        f'<span style="color:{COLOURS[i]}">&#9632;</span> {html.escape(name)} &nbsp; '
        for i, name in enumerate(names))
    return f'<p>{marks}</p>'


def _frame(body: str, height: float) -> str:
    width = LEFT + WIDTH + 20
    return (f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" '
            f'role="img">{body}</svg>')


def factors(rows: Mapping[str, Mapping[str, Sequence[float]]], reach: float) -> str:
    """Dots around the line of 1, on a log scale that ends at +-reach.

    rows: name -> series -> factors, the series in the order of the colours.
    """
    middle, body = LEFT + WIDTH / 2, []
    for index, (name, series) in enumerate(rows.items()):
        y = ROW * index + ROW / 2
        body.append(f'<text x="0" y="{y + 4:.1f}">{html.escape(name)}</text>')
        for colour, (label, values) in zip(COLOURS, series.items(), strict=False):
            for number, value in enumerate(values):
                log = math.log(value) if value > 0 else -reach
                x = middle + max(-reach, min(reach, log)) / reach * WIDTH / 2
                body.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" '
                    f'fill-opacity="0.7"><title>{html.escape(label)} {number}: {value:.4f}'
                    '</title></circle>')
    height = ROW * len(rows)
    line = f'<line x1="{middle}" x2="{middle}" y1="0" y2="{height}" stroke="#999"/>'
    return _frame(line + ''.join(body), height)


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Horizontal bars, several series below each other for each name."""
    top = max((v for series in rows.values() for v in series.values()), default=0.0) or 1.0
    body, y = [], 0.0
    for name, series in rows.items():
        body.append(f'<text x="0" y="{y + 10:.1f}">{html.escape(name)}</text>')
        for colour, (label, value) in zip(COLOURS, series.items(), strict=False):
            wide = max(0.5, value / top * (WIDTH - 80))
            body.append(
                f'<rect x="{LEFT}" y="{y:.1f}" width="{wide:.1f}" height="9" fill="{colour}">'
                f'<title>{html.escape(label)}: {value:.4g} {unit}</title></rect>'
                f'<text x="{LEFT + wide + 4:.1f}" y="{y + 9:.1f}">{value:.3g}</text>')
            y += 11
        y += 5
    return _frame(''.join(body), y)


def lines(series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Lines over 0, 1, 2, ...; the scale begins at 0."""
    top = max((v for values in series.values() for v in values), default=0.0) or 1.0
    count, high = max((len(v) for v in series.values()), default=1), 160
    body = [f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{high}" y2="{high}" stroke="#999"/>',
            f'<text x="{LEFT - 60}" y="12">{top:.3g} {unit}</text>',
            f'<text x="{LEFT - 20}" y="{high}">0</text>']
    for colour, (label, values) in zip(COLOURS, series.items(), strict=False):
        points = [(LEFT + WIDTH * i / max(count - 1, 1), high - (high - 10) * v / top)
                  for i, v in enumerate(values)]
        path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2">'
                    f'<title>{html.escape(label)}</title></polyline>')
    return _frame(''.join(body), high + 10)
