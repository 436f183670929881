# SPDX-License-Identifier: Apache-2.0
"""SentencePiece `.model` files with byte-pair pieces (PaliGemma, Gemma, Llama), in plain Python.

Reads the few fields that encoding needs from the file's protocol buffer. Refuses unigram models
and files that normalise text by a compiled table, because it would encode them differently.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantvla_ros.policies.bpe import BpeError, merge

SPACE = '\u2581'
BPE = 2
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and raw values of one protocol buffer message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(data, at)
            yield number, data[at : at + size]
            at += size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            yield number, data[at : at + size]
            at += size
        else:
            raise BpeError(f'not a SentencePiece model: wire type {wire}')


class SentencePieceModel:
    """A byte-pair SentencePiece model: encode(text) -> numbers, token(piece) -> number."""

    def __init__(self, path: Path) -> None:
        self.head: list[int] = []  # such a file puts nothing before a text by itself
        self._numbers: dict[str, int] = {}
        self._scores: dict[str, float] = {}
        self._users: list[str] = []
        self._unknown = 0
        self._prefix, self._squeeze, self._kind = True, True, 1
        for number, value in fields(path.read_bytes()):
            if number == 1:
                self._add_piece(value)
            elif number == 2:
                self._kind = dict(fields(value)).get(3, 1)
            elif number == 3:
                self._read_normalizer(value, path)
        if self._kind != BPE:
            raise BpeError(f'{path} is not a byte-pair model (model_type {self._kind})')
        self._users.sort(key=len, reverse=True)
        self._user_pattern = re.compile('|'.join(map(re.escape, self._users)) or r'(?!)')

    def _add_piece(self, data: bytes) -> None:
        part = dict(fields(data))
        text = part[1].decode()
        number, kind = len(self._numbers), part.get(3, NORMAL)
        self._numbers[text] = number
        if kind == UNKNOWN:
            self._unknown = number
        elif kind == USER:
            self._users.append(text)
        if kind in (NORMAL, USER):
            self._scores[text] = struct.unpack('<f', part[2])[0] if 2 in part else 0.0

    def _read_normalizer(self, data: bytes, path: Path) -> None:
        part = dict(fields(data))
        if part.get(1, b'identity') not in (b'identity', b''):
            raise BpeError(
                f'{path} normalises text by {part[1].decode()!r}; this reader knows identity'
            )
        self._prefix, self._squeeze = bool(part.get(3, 1)), bool(part.get(4, 1))

    def token(self, piece: str) -> int:
        """Return the number of one token."""
        if piece not in self._numbers:
            raise BpeError(f'this tokenizer has no {piece!r}; it belongs to another model')
        return self._numbers[piece]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without marks for its begin or end."""
        if self._squeeze:
            text = re.sub(' +', ' ', text.strip(' '))
        if not text:
            return []
        text = (SPACE if self._prefix else '') + text.replace(' ', SPACE)
        symbols, last = [], 0
        for match in self._user_pattern.finditer(text):
            symbols += [*text[last : match.start()], match[0]]
            last = match.end()
        symbols += text[last:]
        return [n for symbol in merge(symbols, self._rank) for n in self._number(symbol)]

    def _rank(self, first: str, second: str) -> float | None:
        if first in self._users or second in self._users:
            return None
        score = self._scores.get(first + second)
        return None if score is None else -score

    def _number(self, symbol: str) -> list[int]:
        if symbol in self._scores:
            return [self._numbers[symbol]]
        found = [self._numbers.get(f'<0x{byte:02X}>') for byte in symbol.encode()]
        if all(number is not None for number in found):
            return [number for number in found if number is not None]
        return [self._unknown]
