# SPDX-License-Identifier: Apache-2.0
"""Cells of `quantvla bench recipes` on disk: stored as each is done, found again by a later run.

A cell is found when model, precision and recipe are the same, the recipe's fields included; a
recipe that was changed is measured again. Refuses a file that was made from other frames or
weights, since its cells could not stand in one table with new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]  # model, recipe, precision
WORDS = ('paper', 'takes', 'differs')  # of a recipe, that change nothing


@dataclass(frozen=True)
class Row:
    """One cell of the table.

    mean, p95: |joint difference| to float at the same noise. few: the mean at FEW denoising
    steps, against float at as many. gripper: share of steps whose command differs. nbytes: of
    all linear layers, float ones at two bytes a weight. made_by: fingerprint of the recipe.
    """

    model: str
    recipe: str
    precision: str
    mean_mrad: float
    p95_mrad: float
    few_mrad: float
    gripper: float
    nbytes: int
    seconds: float
    made_by: str = ''

    @property
    def key(self) -> Key:
        """What names a cell."""
        return self.model, self.recipe, self.precision


def fingerprint(what: object) -> str:
    """Hash what a recipe does: its fields that are not at their defaults, its words aside."""
    return hashlib.sha256(_said(what).encode()).hexdigest()[:12]


def _said(what: object) -> str:
    """Like repr, but a field that has its default says nothing, as if it did not exist yet."""
    if isinstance(what, tuple):
        return f'({", ".join(map(_said, what))})'
    if not is_dataclass(what) or isinstance(what, type):
        return repr(what)
    values = {f.name: getattr(what, f.name) for f in fields(what) if f.name not in WORDS}
    plain = {f.name: f.default for f in fields(what)}
    said = [f'{n}={_said(v)}' for n, v in values.items() if v != plain[n]]
    return f'{type(what).__name__}({", ".join(said)})'


class Cells:
    """Rows by key in one JSON file (none: in memory), with the settings they were made under."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.rows: dict[Key, Row] = {}
        self._read()

    def _read(self) -> None:
        """Take in what the file holds; another run may have added to it meanwhile."""
        if self.path is None or not self.path.is_file():
            return
        try:
            document = json.loads(self.path.read_text())
            settings = document['settings']
            rows = [Row(**row) for row in document['rows']]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f'{self.path} holds no cells of this table: {error!r}') from error
        other = sorted(k for k in self.settings if settings.get(k) != self.settings[k])
        if other:
            raise ValueError(
                f'{self.path} was made with another {", ".join(other)}; '
                'give --json another file, or the same settings'
            )
        for row in rows:
            self.rows.setdefault(row.key, row)

    def find(self, key: Key, made_by: str) -> Row | None:
        """Return a cell that is done, or None."""
        row = self.rows.get(key)
        return row if row is not None and row.made_by == made_by else None

    def add(self, row: Row) -> None:
        """Store a cell at once; an interruption leaves the file as it was before."""
        self.rows[row.key] = row
        if self.path is None:
            return
        self._read()
        document = {'settings': self.settings, 'rows': [asdict(r) for r in self.rows.values()]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f'.{self.path.name}.{os.getpid()}')
        scratch.write_text(json.dumps(document, indent=1) + '\n')
        scratch.replace(self.path)
