# SPDX-License-Identifier: Apache-2.0
"""Read a YAML mapping key by key and collect every problem as a sentence. Knows no robot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNITS = {'rad': 1.0, 'deg': 0.017453292519943295, 'm': 1.0, 'mm': 0.001}  # -> SI


class Section:
    """One mapping of the file, read key by key; collects problems instead of raising."""

    def __init__(self, where: str, data: Any, problems: list[str]) -> None:
        self.where = where
        self.problems = problems
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}
        if not isinstance(data, dict):
            self.say('', data, 'a mapping')
        self.known: set[str] = set()

    def say(self, key: str, value: Any, allowed: str) -> None:
        """Note a problem: where, the value seen and what is allowed."""
        name = f'{self.where}.{key}' if key and self.where else key or self.where
        self.problems.append(f'{name} is {value!r}; expected {allowed}')

    def get(self, key: str, kind: type, allowed: str, default: Any = None) -> Any:
        """Return a value of the right kind; a missing one without default is a problem."""
        self.known.add(key)
        if key not in self.data:
            if default is None:
                self.say(key, None, allowed)
            return default
        value = self.data[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            self.say(key, value, allowed)
            return default
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        return self.get(key, str, 'a text', default) or ''

    def choice(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Return one of the allowed texts."""
        value = self.get(key, str, 'one of ' + ', '.join(allowed), default)
        if value is not None and value not in allowed:
            self.say(key, value, 'one of ' + ', '.join(allowed))
        return value or allowed[0]

    def positive(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a number above zero."""
        value = self.get(key, kind, 'a positive number', default)
        if value is not None and not value > 0:
            self.say(key, value, 'a positive number')
            value = None
        return kind(1) if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """Return any number."""
        value = self.get(key, float, 'a number', default)
        return 0.0 if value is None else value

    def names(self, key: str, default: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return a list of different names."""
        value = self.get(key, list, 'a list of names', list(default) if default else None)
        if value is None:
            return ()
        if not value or not all(isinstance(item, str) and item for item in value):
            self.say(key, value, 'a list of names, at least one')
            return ()
        if len(set(value)) != len(value):
            self.say(key, value, 'names that are all different')
        return tuple(value)

    def units(self, count: int) -> tuple[str, ...]:
        """Read `units`: one unit for all joints, or one for each."""
        self.known.add('units')
        value = self.data.get('units', 'rad')
        units = [value] * count if isinstance(value, str) else value
        if not isinstance(units, list) or any(unit not in UNITS for unit in units):
            self.say('units', value, 'one of ' + ', '.join(UNITS) + ', or a list of them')
            return ('rad',) * count
        if len(units) != count:
            self.say('units', value, f'one unit for all, or {count} of them')
        return tuple(units)

    def section(self, key: str, required: bool = True) -> Section:
        """Return the mapping below a key."""
        self.known.add(key)
        where = f'{self.where}.{key}' if self.where else key
        if key not in self.data and not required:
            return Section(where, {}, self.problems)
        return Section(where, self.data.get(key), self.problems)

    def done(self) -> None:
        """Note every key that nobody asked for."""
        for key in sorted(set(map(str, self.data)) - self.known):
            self.say(key, self.data.get(key), 'no such field; known are ' + ', '.join(
                sorted(self.known)))
