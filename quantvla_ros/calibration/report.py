# SPDX-License-Identifier: Apache-2.0
"""The report of a calibration: one HTML page that loads nothing, and the same as JSON.

Shows what was tried and what stayed, alpha by head and beta by attention, errors before and
after, the worst frames with their pictures, and where all of it came from.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from quantvla_ros.calibration import svg
from quantvla_ros.calibration.frames import FrameSet
from quantvla_ros.calibration.png import png_bytes
from quantvla_ros.calibration.run import Outcome
from quantvla_ros.observation import Observation
from quantvla_ros.quant.evidence import ErrorFigures
from quantvla_ros.quant.gate import GateLimits, refuse

WORST = 4  # frames that are shown
SERIES = ('floor', 'before', 'after')
CALLED = {'floor': 'another noise seed', 'before': 'before', 'after': 'after'}
STYLE = ('body{font:14px sans-serif;margin:2em;max-width:62em}td,th{padding:2px 9px;'
         'text-align:right}td:first-child,th:first-child{text-align:left}text{font:11px '
         'monospace}figure{display:inline-block;margin:0 1em 1em 0}img{width:256px;image-'
         'rendering:pixelated}pre{white-space:pre-wrap}')


@dataclass(frozen=True)
class Report:
    """What a report is made of. measured: seconds, memory. others: precision -> its error."""

    name: str
    outcome: Outcome
    frames: FrameSet
    measured: Mapping[str, Any]
    limits: GateLimits
    others: Mapping[str, ErrorFigures] = field(default_factory=dict)


def make_report(report: Report) -> tuple[str, dict[str, Any]]:
    """Return the page and the JSON document."""
    outcome, calibration = report.outcome, report.outcome.calibration
    verdict = refuse(calibration.evidence, report.limits)
    document = {
        'name': report.name,
        'gate': {'refused': verdict, 'limits': asdict(report.limits)},
        'evidence': calibration.evidence.document(),
        'details': {key: dict(value) for key, value in outcome.details.items()},
        'questions': [asdict(question) for question in outcome.questions],
        'found': outcome.found,
        'kept': {'alpha': _lists(calibration.alpha), 'beta': _lists(calibration.beta),
                 'layers': sorted(calibration.layers)},
        'precisions': {name: asdict(found) for name, found in report.others.items()},
        'provenance': dict(calibration.provenance),
        'artifact': calibration.artifact,
        'checkpoint': calibration.checkpoint,
        'measured': dict(report.measured),
    }
    return _page(report, document, verdict), document


def _lists(tensors: Mapping[str, Any]) -> dict[str, list[float]]:
    return {name: [float(value) for value in tensor] for name, tensor in tensors.items()}


def _page(report: Report, document: Mapping[str, Any], verdict: str) -> str:
    calibration = report.outcome.calibration
    title = html.escape(f'Calibration {report.name} of {calibration.precision}')
    sections = [
        f'<h1>{title}</h1><p><b>Gate:</b> {html.escape(verdict or "may be activated")}</p>',
        '<h2>What was tried</h2>', _questions(report),
        '<h2>Action error on held-out frames</h2>', _errors(report),
        '<h3>By joint, mrad</h3>', svg.legend(list(CALLED.values())), _joints(report),
        '<h3>By denoising step: the chunk each step was heading for, mrad</h3>',
        svg.lines(_milli(report, 'denoising_steps_rad'), 'mrad'),
        '<h3>By step of the chunk, mrad</h3>',
        svg.lines(_milli(report, 'chunk_steps_rad'), 'mrad'),
        '<h3>By held-out frame, mrad</h3>', svg.lines(_milli(report, 'frames_rad'), 'mrad'),
        *_factor_plots(report),
        '<h2>Worst frames after calibration</h2>', _worst(report),
        '<h2>Where it comes from</h2>', _facts(document),
    ]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<style>{STYLE}</style></head><body>{"".join(sections)}</body></html>\n')


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = ''.join('<tr>' + ''.join(f'<td>{html.escape(str(c))}</td>' for c in row) + '</tr>'
                    for row in rows)
    return ('<table><tr>' + ''.join(f'<th>{html.escape(name)}</th>' for name in head)
            + f'</tr>{cells}</table>')


def _questions(report: Report) -> str:
    rows = [('kept' if q.kept else 'dropped', q.what, q.sentence)
            for q in report.outcome.questions]
    return _table(('', 'what', 'why'), rows) if rows else '<p>Nothing was asked for.</p>'


def _errors(report: Report) -> str:
    evidence = report.outcome.calibration.evidence
    named = {CALLED[key]: getattr(evidence, key) for key in SERIES}
    named.update({f'{name}, uncalibrated': found for name, found in report.others.items()})
    rows = [
        (name, f'{1e3 * e.mean_rad:.3f}', f'{1e3 * e.p95_rad:.3f}', f'{1e3 * e.worst_rad:.3f}',
         f'{e.cosine:.6f}', f'{e.cosine_worst:.6f}', f'{100 * e.gripper:.2f}')
        for name, e in named.items()
    ]
    head = ('against float at the same noise', 'mean [mrad]', 'p95', 'worst frame', 'cosine',
            'worst', 'gripper [%]')
    return _table(head, rows)


def _milli(report: Report, key: str) -> dict[str, list[float]]:
    details = report.outcome.details
    return {CALLED[name]: [1e3 * value for value in details[name][key]] for name in SERIES}


def _joints(report: Report) -> str:
    found = _milli(report, 'joints_rad')
    names = report.frames.held_out[0].joint_names
    count = len(next(iter(found.values())))
    return svg.bars({names[i]: {name: values[i] for name, values in found.items()}
                     for i in range(count)}, 'mrad')


def _factor_plots(report: Report) -> list[str]:
    """alpha by head and beta by attention: both forms before the band, and what was kept."""
    calibration, parts = report.outcome.calibration, []
    settings = calibration.provenance['settings']
    for kind, called, kept in (('alpha', 'Alpha of each head', calibration.alpha),
                               ('beta', 'Beta of each attention', calibration.beta)):
        forms = report.outcome.found[kind]
        rows = {name: {'ratio': forms['ratio'][name],
                       'least squares': forms['least_squares'][name],
                       'kept': [float(v) for v in kept.get(name, ())]} for name in forms['ratio']}
        reach = max((abs(math.log(v)) for row in rows.values() for values in row.values()
                     for v in values if v > 0), default=0.0)
        reach = max(1.1 * reach, 2 * settings['neutral'], 0.01)
        parts += [
            f'<h2>{called}</h2><p>The line is 1, the ends are a factor of '
            f'{math.exp(-reach):.3f} and {math.exp(reach):.3f}; within a factor of '
            f'{math.exp(settings["neutral"]):.3f} nothing is changed.</p>',
            svg.legend(('ratio', 'least squares', 'kept')), svg.factors(rows, reach)]
    return parts


def _worst(report: Report) -> str:
    errors = np.array(report.outcome.details['after']['frames_rad'])
    before = report.outcome.details['before']['frames_rad']
    figures = []
    for index in np.argsort(-errors)[:WORST]:
        seen = report.frames.held_out[int(index)]
        text = (f'held-out frame {index}, stamp {seen.stamp_ns}: {1e3 * before[index]:.2f} mrad '
                f'before, {1e3 * errors[index]:.2f} after; {seen.instruction}')
        figures.append(f'<figure>{_pictures(seen)}<figcaption>{html.escape(text)}</figcaption>'
                       '</figure>')
    return ''.join(figures)


def _pictures(seen: Observation) -> str:
    def one(name: str) -> str:
        data = base64.b64encode(png_bytes(seen.images[name])).decode()
        return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'

    return ' '.join(one(name) for name in sorted(seen.images))


def _facts(document: Mapping[str, Any]) -> str:
    said: dict[str, Any] = {
        'artifact': document['artifact'], 'checkpoint': document['checkpoint'],
        **document['provenance'], **document['measured'],
    }
    return _table(('', ''), [(key, value) for key, value in said.items()])
