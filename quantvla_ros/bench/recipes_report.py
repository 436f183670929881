# SPDX-License-Identifier: Apache-2.0
"""The table of `quantvla bench recipes` as Markdown, and success rates from evaluation reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIMULATED = '-'  # a published form that only exists in floats has no bytes


def read_success(paths: Sequence[Path]) -> dict[tuple[str, str], str]:
    """Return (recipe, precision) -> 'successes/episodes' from reports of `quantvla eval`.

    An artifact folder is named <precision> for onboard and <recipe>-<precision> for the others.
    """
    found = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; `quantvla eval` writes report.json')
        try:
            variants = json.loads(path.read_text())['variants']
            for name, numbers in variants.items():
                recipe, dash, precision = Path(name).name.rpartition('-')
                key = (recipe if dash else 'onboard', precision)
                found[key] = f'{numbers["all"]["successes"]}/{numbers["all"]["trials"]}'
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f'{path} is not a report of `quantvla eval`: {error!r}') from error
    return found


def matrix(
    rows: Sequence[Mapping[str, Any]], column: str, *, floats: bool = True
) -> str:
    """Markdown, one part for each model: recipes down, precisions across, one figure in a cell.

    The least of the recipes that have bytes is marked in each column.
    """
    lines = []
    for model in dict.fromkeys(row['model'] for row in rows):
        mine = [row for row in rows if row['model'] == model]
        across = list(dict.fromkeys(r['precision'] for r in mine if r['precision'] != 'float'))
        lines += [f'**{model}**', '', _line(['recipe', *across]),
                  _line(['---'] * (1 + len(across)))]
        for row in mine:
            if row['precision'] == 'float' and floats:
                lines.append(_line([row['recipe'], *[f'{row[column]:.2f}'] * len(across)]))
        for recipe in dict.fromkeys(r['recipe'] for r in mine if r['precision'] != 'float'):
            cells = [_cell(mine, recipe, precision, column) for precision in across]
            lines.append(_line([recipe, *cells]))
        lines.append('')
    return '\n'.join(lines)


def _cell(
    rows: Sequence[Mapping[str, Any]], recipe: str, precision: str, column: str
) -> str:
    here = [row for row in rows if row['precision'] == precision]
    found = [row for row in here if row['recipe'] == recipe]
    if not found:
        return ''
    value = found[0][column]
    if column == 'nbytes':
        return f'{value / 1e6:.2f}' if value else SIMULATED
    best = found[0]['nbytes'] and value == min(row[column] for row in here if row['nbytes'])
    return f'**{value:.2f}**' if best else f'{value:.2f}'


def table(
    rows: Sequence[Mapping[str, Any]], success: Mapping[tuple[str, str], str] | None = None
) -> str:
    """Markdown, one part for each model and precision, the least error first marked."""
    lines = []
    for model in dict.fromkeys(row['model'] for row in rows):
        mine = [row for row in rows if row['model'] == model]
        head = ['recipe', 'precision', 'mean [mrad]', 'p95 [mrad]', '2 steps [mrad]',
                'gripper [%]', 'MB']
        if success:
            head.append('success')
        lines += [f'**{model}**', '', _line(head), _line(['---'] * len(head))]
        for row in mine:
            rivals = [
                r['mean_mrad'] for r in mine
                if r['precision'] == row['precision'] != 'float' and r['nbytes']
            ]
            best = bool(rivals) and row['nbytes'] and row['mean_mrad'] == min(rivals)
            mean = f'{row["mean_mrad"]:.2f}'
            cells = [
                row['recipe'],
                row['precision'],
                f'**{mean}**' if best else mean,
                f'{row["p95_mrad"]:.2f}',
                f'{row["few_mrad"]:.2f}' if row['few_mrad'] else '',
                f'{100 * row["gripper"]:.2f}',
                f'{row["nbytes"] / 1e6:.2f}' if row['nbytes'] else SIMULATED,
            ]
            if success:
                cells.append(success.get((row['recipe'], row['precision']), ''))
            lines.append(_line(cells))
        lines.append('')
    return '\n'.join(lines)


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'
