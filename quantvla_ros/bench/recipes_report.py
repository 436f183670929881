# SPDX-License-Identifier: Apache-2.0
"""The tables of `quantvla bench recipes` as Markdown, and success from reports of `quantvla eval`.

Makes text of rows that are measured; measures nothing. Writes the tables into a page between
markers, so that a page's figures are those of a file of results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantvla_ros.sim.statistics import paired_difference

Row = Mapping[str, Any]
SIMULATED = '-'  # a published form that only exists in floats has no bytes
MEASURES = {'mean': 'mean_mrad', 'few': 'few_mrad', 'bytes': 'nbytes'}
FITS = ('', '+alpha+beta', '+alpha', '+beta', '+least squares', '+least squares, checked')


def in_ablation(row: Row) -> bool:
    """Whether a row is a variant of a recipe, which stands in no table of recipes."""
    return ':' in row['recipe']


def _best(rows: Sequence[Row], like: Row, column: str) -> bool:
    """Whether a row has the least of its model and precision; simulations do not compete."""
    of = (like['model'], like['precision'])
    rivals = [r[column] for r in rows if (r['model'], r['precision']) == of and r['nbytes']]
    return bool(like['nbytes']) and like[column] == min(rivals)


def _figure(rows: Sequence[Row], row: Row, column: str) -> str:
    if column == 'nbytes':
        return f'{row[column] / 1e6:.2f}' if row[column] else SIMULATED
    text = f'{row[column]:.2f}'
    return f'**{text}**' if row['precision'] != 'float' and _best(rows, row, column) else text


def matrix(rows: Sequence[Row], column: str) -> str:
    """Recipes down, models and precisions across, one figure in a cell, the least marked.

    Rows in float, which have no precision, say the same in every column of their model.
    """
    rows = [row for row in rows if not in_ablation(row)]
    across = list(dict.fromkeys(
        (r['model'], r['precision']) for r in rows if r['precision'] != 'float'))
    cells = {(r['model'], r['precision'], r['recipe']): _figure(rows, r, column) for r in rows}
    floats = {r['recipe'] for r in rows if r['precision'] == 'float'}
    lines = _head('recipe', *(' '.join(key) for key in across))
    for recipe in dict.fromkeys(r['recipe'] for r in rows):
        if recipe in floats and column != 'mean_mrad':
            continue
        lines.append(_line([recipe, *(
            cells.get((model, 'float' if recipe in floats else precision, recipe), '')
            for model, precision in across)]))
    return '\n'.join(lines)


def details(rows: Sequence[Row]) -> str:
    """One line for each row with all that was measured; the least mean error is marked."""
    lines = _head('model', 'recipe', 'precision', 'mean [mrad]', 'p95 [mrad]', '2 steps [mrad]',
                  'gripper [%]', 'MB', 's')
    for row in rows:
        lines.append(_line([
            row['model'],
            row['recipe'],
            row['precision'],
            f'{row["mean_mrad"]:.2f}' if in_ablation(row)
            else _figure([r for r in rows if not in_ablation(r)], row, 'mean_mrad'),
            f'{row["p95_mrad"]:.2f}',
            f'{row["few_mrad"]:.2f}' if row['few_mrad'] else '',
            f'{100 * row["gripper"]:.2f}',
            f'{row["nbytes"] / 1e6:.2f}' if row['nbytes'] else SIMULATED,
            f'{row["seconds"]:.0f}',
        ]))
    return '\n'.join(lines)


def against(rows: Sequence[Row], ours: str = 'onboard', floor: str = 'another noise seed') -> str:
    """Our recipe against the best other that runs on integers, at each precision."""
    lines = _head('model', 'precision', f'{ours} [mrad]', 'MB', 'best other', '[mrad]', 'MB',
                  'ours / other', 'ours / another seed')
    rows = [row for row in rows if not in_ablation(row)]
    seeds = {row['model']: row['mean_mrad'] for row in rows if row['recipe'] == floor}
    for mine in (row for row in rows if row['recipe'] == ours):
        others = [r for r in rows if r['recipe'] != ours and r['nbytes']
                  and (r['model'], r['precision']) == (mine['model'], mine['precision'])]
        if not others:
            continue
        other = min(others, key=lambda row: row['mean_mrad'])
        share = f'{mine["mean_mrad"] / seeds[mine["model"]]:.2f}' if mine['model'] in seeds else ''
        lines.append(_line([
            mine['model'], mine['precision'], f'{mine["mean_mrad"]:.2f}',
            f'{mine["nbytes"] / 1e6:.2f}', other['recipe'], f'{other["mean_mrad"]:.2f}',
            f'{other["nbytes"] / 1e6:.2f}', f'{mine["mean_mrad"] / other["mean_mrad"]:.2f}', share,
        ]))
    return '\n'.join(lines)


def ablation(rows: Sequence[Row]) -> str:
    """QuantVLA's layouts down, its matchings across, mean error in mrad."""
    cells = {(r['model'], r['precision'], r['recipe']): r for r in rows if in_ablation(r)}
    fits = [fit[1:].replace('+', ' and ') or 'without' for fit in FITS]
    lines = _head('model', 'precision', 'layout', 'MB', *fits)
    for model, precision in dict.fromkeys(key[:2] for key in cells):
        for layout in ('backbone', 'action', 'selective', 'full'):
            found = [cells.get((model, precision, f'quantvla:{layout}{fit}')) for fit in FITS]
            if any(found):
                nbytes = next(row for row in found if row)['nbytes']
                lines.append(_line([model, precision, layout, f'{nbytes / 1e6:.2f}', *(
                    f'{row["mean_mrad"]:.2f}' if row else '' for row in found)]))
    return '\n'.join(lines)


def success(reports: Mapping[str, Path]) -> str:
    """Success of each variant against the first one, from reports of `quantvla eval` by model."""
    lines = _head('model', 'variant', 'solved', '% [95 %]', 'only float', 'only this',
                  'points to float [95 %]', 'McNemar p')
    for model, path in reports.items():
        if not path.is_file():
            raise FileNotFoundError(f'{path} is missing; `quantvla eval` writes report.json')
        try:
            report = json.loads(path.read_text())
            lines += [_line([model, *cells]) for cells in _solved(report)]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f'{path} is not a report of `quantvla eval`: {error!r}') from error
    return '\n'.join(lines)


def _solved(report: Mapping[str, Any]) -> list[list[str]]:
    found, first = [], next(iter(report['variants']))
    pairs = {pair['second']: pair for pair in report['pairs'] if pair['first'] == first}
    for name, numbers in report['variants'].items():
        r = numbers['all']
        cells = [Path(name).name, f'{r["successes"]}/{r["trials"]}',
                 f'{100 * r["successes"] / max(r["trials"], 1):.1f} '
                 f'[{100 * r["low"]:.1f}, {100 * r["high"]:.1f}]']
        if name in pairs:
            p = pairs[name]
            low, high = paired_difference(p['only_first'], p['only_second'], p['pairs'])
            off = (p['only_second'] - p['only_first']) / max(p['pairs'], 1)
            cells += [str(p['only_first']), str(p['only_second']),
                      f'{100 * off:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]', f'{p["p"]:.3g}']
        found.append(cells + [''] * (7 - len(cells)))
    return found


def tables(rows: Sequence[Row], reports: Mapping[str, Path]) -> dict[str, str]:
    """Every table that a page can hold, by the name of its markers; what is empty is left out."""
    found = {name: matrix(rows, column) for name, column in MEASURES.items()}
    found['against'], found['ablation'] = against(rows), ablation(rows)
    found['success'] = success(reports)
    return {name: table for name, table in found.items() if table.count('\n') > 1}


def write_tables(page: Path, found: Mapping[str, str]) -> None:
    """Put tables into a page, each between its markers. Raises ValueError where one has none."""
    text = page.read_text()
    for name, table in found.items():
        begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
        head, opened, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (opened and closed):
            raise ValueError(f'{page} has no place for table {name!r}: {begin} ... {end}')
        text = f'{head}{begin}\n\n{table}\n\n{end}{tail}'
    page.write_text(text)


def _head(*cells: str) -> list[str]:
    return [_line(cells), _line(['---'] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return '| ' + ' | '.join(cells) + ' |'
