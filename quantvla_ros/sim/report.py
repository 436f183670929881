# SPDX-License-Identifier: Apache-2.0
"""Finished episodes as tables: text, JSON and one self-contained HTML page.

Reads lines of the episode log and nothing else. A crashed episode is in no rate and is counted
beside it; a refused instruction counts as not solved.
"""

from __future__ import annotations

import base64
import html
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from quantvla_ros.calibration.png import png_bytes
from quantvla_ros.sim.episodes import Settings, Variant
from quantvla_ros.sim.statistics import mcnemar_exact, wilson

Line = Mapping[str, Any]
CAVEAT = (
    "Start states, scenes and success predicates are LIBERO's. The action space is not: absolute "
    "joint positions (kp 200, targets clipped to 0.25 rad) instead of the papers' OSC_POSE, and "
    'demonstrations are scripted, so these rates are not comparable with published tables.'
)


CHUNK_COUNTS = ('chunks', 'compared', 'different')


def machine() -> str:
    """Name the processor and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path('/proc/cpuinfo')
    for row in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if row.startswith('model name'):
            name = row.partition(':')[2].strip()
            break
    return f'{name}, {len(os.sched_getaffinity(0))} cores'


def variant_name(line: Line) -> str:
    """Name of the variant that played a line's episode, and of the evaluation if another."""
    name = Variant(**line['variant']).name
    return f'{name} ({line["from"]})' if 'from' in line else name


def rate(lines: Iterable[Line]) -> dict[str, Any]:
    """Successes, trials, Wilson's interval and what is in no rate."""
    lines = list(lines)
    tried = [line for line in lines if line['status'] != 'crashed']
    solved = [line for line in tried if line['status'] == 'success']
    low, high = wilson(len(solved), len(tried))
    return {
        'successes': len(solved),
        'trials': len(tried),
        'low': low,
        'high': high,
        'refused': sum(line['status'] == 'refused' for line in tried),
        'crashed': len(lines) - len(tried),
        'mean_steps': float(np.mean([line['steps'] for line in solved])) if solved else None,
    }


def pair(first: Sequence[Line], second: Sequence[Line]) -> dict[str, Any]:
    """Compare two variants on the episodes that neither crashed in."""
    sides = []
    for lines in (first, second):
        sides.append({
            (line['suite'], line['task'], line['start']): line['status'] == 'success'
            for line in lines
            if line['status'] != 'crashed'
        })
    shared = sides[0].keys() & sides[1].keys()
    only_first = sum(sides[0][k] and not sides[1][k] for k in shared)
    only_second = sum(sides[1][k] and not sides[0][k] for k in shared)
    return {
        'first': variant_name(first[0]),
        'second': variant_name(second[0]),
        'pairs': len(shared),
        'only_first': only_first,
        'only_second': only_second,
        'p': mcnemar_exact(only_first, only_second),
    }


def summarize(lines: Sequence[Line], settings: Settings) -> dict[str, Any]:
    """Everything the report says, as JSON."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(variant_name(line), []).append(line)
    suites = list(dict.fromkeys(line['suite'] for line in lines))
    variants = {}
    for name, mine in groups.items():
        by_suite = {suite: [x for x in mine if x['suite'] == suite] for suite in suites}
        variants[name] = {
            'all': rate(mine),
            'suites': {suite: rate(part) for suite, part in by_suite.items()},
            'tasks': {
                suite: {
                    str(task): rate(x for x in part if x['task'] == task)
                    for task in sorted({x['task'] for x in part})
                }
                for suite, part in by_suite.items()
            },
            'policy_ms_per_chunk': _policy_ms(mine),
        }
    return {
        'machine': machine(),
        'settings': asdict(settings),
        'caps': {suite: next(x['cap'] for x in lines if x['suite'] == suite) for suite in suites},
        'caveat': CAVEAT,
        'variants': variants,
        'chunks': {key: sum(line.get(key, 0) for line in lines) for key in CHUNK_COUNTS},
        'pairs': [pair(groups[a], groups[b]) for a, b in combinations(groups, 2)],
        'failures': [
            {k: x[k] for k in ('key', 'suite', 'task', 'start', 'steps', 'status', 'error')}
            | {'variant': variant_name(x)}
            for x in lines
            if x['status'] != 'success'
        ],
    }


def _policy_ms(lines: Sequence[Line]) -> float | None:
    chunks = sum(line['chunks'] for line in lines)
    return 1e3 * sum(line['policy_seconds'] for line in lines) / chunks if chunks else None


def _percent(r: Mapping[str, Any]) -> str:
    if not r['trials']:
        return 'nothing finished'
    found = 100 * r['successes'] / r['trials']
    text = f'{found:5.1f} % [{100 * r["low"]:.1f}, {100 * r["high"]:.1f}]'
    return text + ''.join(f', {r[k]} {k}' for k in ('refused', 'crashed') if r[k])


def rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(variant, suite, successes/trials, rate with interval, successes of each task)."""
    found = []
    for name, variant in summary['variants'].items():
        for suite, r in variant['suites'].items():
            tasks = variant['tasks'][suite]
            each = ' '.join(f'{n}:{t["successes"]}/{t["trials"]}' for n, t in tasks.items())
            found.append((name, suite, f'{r["successes"]}/{r["trials"]}', _percent(r), each))
        r = variant['all']
        found.append((name, 'all', f'{r["successes"]}/{r["trials"]}', _percent(r), ''))
    return found


def _caps(summary: Mapping[str, Any]) -> str:
    return ', '.join(f'{suite} {cap}' for suite, cap in summary['caps'].items())


def as_text(summary: Mapping[str, Any]) -> str:
    """What `quantvla eval` prints at its end."""
    table = [('variant', 'suite', 'solved', 'rate [95 % Wilson]', 'by task'), *rows(summary)]
    widths = [max(len(row[i]) for row in table) for i in range(5)]
    padded = ([c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in table)
    out = ['  '.join(row).rstrip() for row in padded]
    for p in summary['pairs']:
        out.append(
            f'{p["first"]} against {p["second"]}, {p["pairs"]} pairs: only the first '
            f'{p["only_first"]}, only the second {p["only_second"]}, McNemar p = {p["p"]:.3g}'
        )
    out += _comparison(summary)
    plain = asdict(Settings())
    changed = [f'{k} {v}' for k, v in summary['settings'].items() if v != plain[k]]
    out.append('; '.join([f'step caps: {_caps(summary)}', *changed, summary['machine']]))
    return '\n'.join([*out, summary['caveat']])


def _comparison(summary: Mapping[str, Any]) -> list[str]:
    """Say how many chunks through ROS were computed again, and what came of it."""
    if not summary['settings']['through_ros']:
        return []
    c = summary['chunks']
    return [
        f'{c["compared"]} of {c["chunks"]} chunks were computed again in process from the same '
        f'frames and seed: {c["compared"] - c["different"]} equal bit for bit, '
        f'{c["different"]} different'
    ]


def _html_table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, row: Sequence[Any]) -> str:
        return ''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in row)

    inner = ''.join(f'<tr>{cells("td", row)}</tr>' for row in body)
    return f'<table><tr>{cells("th", head)}</tr>{inner}</table>'


STYLE = (
    'body{font:15px/1.5 system-ui,sans-serif;max-width:62em;margin:2em auto;padding:0 1em;'
    'color:#222}table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;'
    'border-bottom:1px solid #ddd;text-align:left;font-variant-numeric:tabular-nums}'
    'figure{display:inline-block;margin:.5em}figcaption{font-size:12px;color:#555}'
    'img{width:256px;image-rendering:pixelated}'
)


def as_html(
    summary: Mapping[str, Any], lines: Sequence[Line], frames: Mapping[str, bytes]
) -> str:
    """One page without any other file: rates, pairs, and how the failures ended."""
    pairs = [
        (p['first'], p['second'], p['pairs'], p['only_first'], p['only_second'], f'{p["p"]:.3g}')
        for p in summary['pairs']
    ]
    set_to = {k: v for k, v in summary['settings'].items() if v not in ('', False)}
    settings = ', '.join(f'{k} {v}' for k, v in set_to.items())
    parts = [
        f'<!doctype html><meta charset="utf-8"><title>LIBERO evaluation</title><style>{STYLE}'
        f'</style><h1>LIBERO evaluation</h1><p>{html.escape(summary["caveat"])}</p>',
        f'<p>Step caps: {html.escape(_caps(summary))}. {html.escape(settings)}. '
        f'{html.escape(summary["machine"])}.</p>',
        _html_table(
            ('variant', 'suite', 'solved', 'rate [95 % Wilson]', 'by task'), rows(summary)
        ),
    ]
    parts += [f'<p>{html.escape(line)}</p>' for line in _comparison(summary)]
    if pairs:
        head = ('first', 'second', 'pairs', 'only first', 'only second', 'McNemar p')
        parts += ['<h2>Pairs</h2>', _html_table(head, pairs)]
    parts.append(f'<h2>Not solved: {len(summary["failures"])} of {len(lines)}</h2>')
    parts += [_figure(failure, frames.get(failure['key'])) for failure in summary['failures']]
    return '\n'.join(parts) + '\n'


def _figure(failure: Mapping[str, Any], png: bytes | None) -> str:
    name = f'{failure["suite"]}/{failure["task"]}/{failure["start"]}'
    text = f'{name}, {failure["variant"]}: {failure["status"]} after {failure["steps"]} steps'
    picture = ''
    if png is not None:
        data = base64.b64encode(png).decode()
        picture = f'<img alt="last frames of {name}" src="data:image/png;base64,{data}">'
    elif failure['error']:
        picture = f'<pre>{html.escape(failure["error"].strip().splitlines()[-1])}</pre>'
    return f'<figure>{picture}<figcaption>{html.escape(text)}</figcaption></figure>'


def write_png(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 without an imaging library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_bytes(image))
