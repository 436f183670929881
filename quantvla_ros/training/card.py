# SPDX-License-Identifier: Apache-2.0
"""From the files that the stages of training leave to the log in the model card.

Reads JSON and writes Markdown; trains and plays nothing. What a stage did not leave is said to be
missing, not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantvla_ros.policies.libero_checkpoint import read_settings
from quantvla_ros.sim.statistics import wilson

BEGIN, END = '<!-- training:begin -->', '<!-- training:end -->'
LOSSES = 12  # rows of the loss table
Counts = Mapping[str, list[int]]  # task -> attempts, solved, shown


def choose(found: Mapping[str, Counts], seed: int) -> dict[str, Any]:
    """Compare models on the same drawn starts; the best solved most, the first of equals.

    Raises ValueError when some were not played to the end: their rates cannot be compared.
    """
    models: dict[str, dict[str, Any]] = {}
    for name, counts in found.items():
        tried = sum(row[0] for row in counts.values())
        solved = sum(row[1] for row in counts.values())
        models[name] = {
            'attempts': tried, 'solved': solved, 'interval': wilson(solved, tried),
            'tasks': {task: row[:2] for task, row in sorted(counts.items())},
        }
    if len({row['attempts'] for row in models.values()}) > 1:
        said = ', '.join(f'{name} {row["attempts"]}' for name, row in models.items())
        raise ValueError(f'the models did not play the same starts ({said}); raise --limit')
    best = max(models, key=lambda name: int(models[name]['solved']))
    return {'best': best, 'seed': seed, 'models': models}


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    def line(cells: tuple[Any, ...]) -> str:
        return '| ' + ' | '.join(map(str, cells)) + ' |'

    return [line(head), line(('---',) * len(head)), *map(line, rows)]


def _fit_lines(name: str, document: Mapping[str, Any]) -> list[str]:
    """Say how one model was trained: data, settings, losses, validation."""
    log, settings = document['log'], document['settings']
    last = log[-1]
    from_where = f', from {document["init"]}' if document.get('init') else ''
    left_out = f', without {", ".join(document["without"])}' if document.get('without') else ''
    out = [
        f'**{name}**: seed {settings["seed"]}{from_where}{left_out}; data {document["data"]}, '
        f'{document["frames"]} frames of {document["episodes"]} episodes; '
        f'{document["ranks"]} x {document["device"]}, {document["cores"]} cores, torch '
        f'{document["torch"]}, {document["date"]}; {last["step"]} steps in {last["seconds"]:.0f} '
        f's; held-out joint L1 {1e3 * last["joint_rad"]:.1f} mrad, gripper error '
        f'{100 * last["gripper"]:.2f} %.', '',
        'Settings: ' + ', '.join(f'{key} {value}' for key, value in settings.items()) + '.', '',
    ]
    entries = [entry for entry in log if 'loss' in entry]
    chosen = entries[:: max(1, len(entries) // LOSSES)]
    if chosen:
        rows = [(e['step'], f'{e["loss"]:.4f}', e['samples_per_s']) for e in chosen]
        out += [*_table(('step', 'loss', 'samples/s'), rows), '']
    return out


def log_lines(work: Path) -> list[str]:
    """Return the log of a work folder as Markdown."""
    out: list[str] = []
    for summary in sorted(work.glob('*/summary.json')):
        counts = json.loads(summary.read_text())
        tried, solved = counts['tried'], counts['solved']
        rows = [(task, f'{solved.get(task, 0)}/{tried[task]}') for task in sorted(tried)]
        out += [f'Demonstrations `{summary.parent.name}`: {sum(solved.values())} of '
                f'{sum(tried.values())} attempts kept.', '', *_table(('task', 'kept'), rows), '']
    for takeover in sorted(work.glob('*/takeover_*.json')):
        columns = list(zip(*json.loads(takeover.read_text()).values(), strict=True))
        total = [sum(column) for column in columns] or [0, 0, 0]
        out += [f'Take-over `{takeover.parent.name}` ({takeover.stem}): {total[0]} attempts, '
                f'the policy solved {total[1]}, the expert showed {total[2]}.', '']
    for fitted in sorted(work.glob('fit/*/log.json')):
        out += _fit_lines(fitted.parent.name, json.loads(fitted.read_text()))
    selection = _read(work / 'selection.json')
    if selection is None:
        return [*out, 'No selection on drawn starts was made.']
    chosen = []
    for name, row in selection['models'].items():
        low, high = row['interval']
        chosen.append((name, f'{row["solved"]}/{row["attempts"]}',
                     f'{100 * low:.1f} to {100 * high:.1f} %'))
    return [*out, f'Selected on drawn starts (seed {selection["seed"]}), no official one: '
            f'**{selection["best"]}**.', '', *_table(('model', 'solved', '95 % Wilson'), chosen)]


def write_card(work: Path, model: str) -> Path:
    """Write the log between the marks of WORK/MODEL/MODEL_CARD.md, which is made when missing."""
    folder = work / model
    path = folder / 'MODEL_CARD.md'
    old = path.read_text() if path.exists() else f'# {model}\n\n{BEGIN}\n{END}\n'
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f'{path} has no {BEGIN} and {END} to write the log between')
    lines = [f'sha256 of the weights: `{read_settings(folder).sha256}`.', '', *log_lines(work)]
    path.write_text(head + BEGIN + '\n\n' + '\n'.join(lines) + '\n\n' + END + tail)
    return path
