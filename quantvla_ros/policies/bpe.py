# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding from a tokenizer.json or from vocab.json and merges.txt, in plain Python.

Reads what the tokenizers of PaliGemma, Qwen, SmolLM and Llama use: byte-level text cut by a
pattern, or whole text with byte fallback. A part it does not know refuses the file by name;
nothing is guessed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Split = Callable[[list[str]], list[str]]
GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r'|\s*[\r\n]+|\s+(?!\S)|\s+')


class BpeError(ValueError):
    """A tokenizer file that this reader does not understand."""


def byte_letters() -> dict[int, str]:
    """Byte -> the printable character that byte-level vocabularies write for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return letters


def _ascii_twin(text: str) -> str:
    """The text with each character beyond ASCII replaced by one of its class, for patterns."""
    twins = {'L': 'a', 'N': '0', 'Z': ' '}
    return ''.join(
        c if c < '\x80' else ' ' if c.isspace() else twins.get(unicodedata.category(c)[0], '!')
        for c in text
    )


def _pattern(source: str) -> re.Pattern[str]:
    """Compile a pattern with Unicode classes for texts of ASCII twins."""
    inside, out, i = False, '', 0
    while i < len(source):
        found = re.match(r'\\p\{(L|N)\}', source[i:])
        if found:
            span = 'A-Za-z' if found[1] == 'L' else '0-9'
            out += span if inside else f'[{span}]'
            i += len(found[0])
            continue
        if source[i] == '\\':
            out += source[i : i + 2]
            i += 2
            continue
        inside = source[i] == '[' or (inside and source[i] != ']')
        out += source[i]
        i += 1
    return re.compile(out)


def _cut(pattern: re.Pattern[str], *, keep_rest: bool) -> Split:
    """Cut each piece at the matches of a pattern; what lies between them stays a piece."""

    def split(pieces: list[str]) -> list[str]:
        cut = []
        for piece in pieces:
            last = 0
            for match in pattern.finditer(_ascii_twin(piece)):
                if keep_rest and match.start() > last:
                    cut.append(piece[last : match.start()])
                cut.append(piece[match.start() : match.end()])
                last = match.end()
            if keep_rest and last < len(piece):
                cut.append(piece[last:])
        return [piece for piece in cut if piece]

    return split


def _to_letters(pieces: list[str]) -> list[str]:
    letters = byte_letters()
    return [''.join(letters[byte] for byte in piece.encode()) for piece in pieces]


def _with_previous(mark: str) -> Split:
    """Cut behind each mark."""

    def split(pieces: list[str]) -> list[str]:
        return [p for piece in pieces for p in re.findall(
            f'[^{re.escape(mark)}]*{re.escape(mark)}|[^{re.escape(mark)}]+', piece)]

    return split


def pre_tokenizer(part: Mapping[str, Any] | None) -> list[Split]:
    """Steps that cut a text. Raises BpeError on a kind that is not known."""
    if part is None:
        return []
    kind = part['type']
    if kind == 'Sequence':
        return [step for inner in part['pretokenizers'] for step in pre_tokenizer(inner)]
    if kind == 'ByteLevel':
        first = [] if not part.get('use_regex', True) else [_cut(_pattern(GPT2), keep_rest=True)]
        return [*first, _to_letters]
    if kind == 'Digits':
        single = part.get('individual_digits', False)
        return [_cut(re.compile('[0-9]' if single else '[0-9]+'), keep_rest=True)]
    if kind == 'Split':
        rule, behaviour = part['pattern'], part.get('behavior')
        if 'Regex' in rule and behaviour == 'Isolated':
            return [_cut(_pattern(rule['Regex']), keep_rest=True)]
        if 'String' in rule and behaviour == 'MergedWithPrevious':
            return [_with_previous(rule['String'])]
    raise BpeError(f'pre_tokenizer {dict(part)!r} is not one this reader knows')


def normalizer(part: Mapping[str, Any] | None) -> list[Callable[[str], str]]:
    """Steps that rewrite a text. Raises BpeError on a kind that is not known."""
    if part is None:
        return []
    kind = part['type']
    if kind == 'Sequence':
        return [step for inner in part['normalizers'] for step in normalizer(inner)]
    if kind == 'Prepend':
        return [lambda text: part['prepend'] + text if text else text]
    if kind == 'Replace' and 'String' in part['pattern']:
        return [lambda text: text.replace(part['pattern']['String'], part['content'])]
    if kind in ('NFC', 'NFKC'):
        return [lambda text: unicodedata.normalize(kind, text)]
    raise BpeError(f'normalizer {dict(part)!r} is not one this reader knows')


def merge(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours, the lowest rank first and the leftmost of equals, until none is left."""
    while len(symbols) > 1:
        best, at = None, -1
        for i in range(len(symbols) - 1):
            found = rank(symbols[i], symbols[i + 1])
            if found is not None and (best is None or found < best):
                best, at = found, i
        if best is None:
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


class BytePairs:
    """A byte-pair tokenizer: encode(text) -> numbers, token(piece) -> number."""

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        added: Mapping[str, int],
        rewrite: Sequence[Callable[[str], str]],
        cut: Sequence[Split],
        unknown: str | None,
        head: Sequence[int] = (),
    ) -> None:
        self.head = list(head)  # what the file itself puts before a text
        self._vocabulary, self._added = dict(vocabulary), dict(added)
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        self._rewrite, self._cut, self._unknown = rewrite, cut, unknown
        marks = sorted(self._added, key=len, reverse=True)
        self._marks = re.compile('|'.join(map(re.escape, marks)) or r'(?!)')
        self._kept: dict[str, list[int]] = {}

    def token(self, piece: str) -> int:
        """Return the number of one token."""
        found = self._added.get(piece, self._vocabulary.get(piece))
        if found is None:
            raise BpeError(f'this tokenizer has no {piece!r}; it belongs to another model')
        return found

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; marks such as <bos> count where they are written."""
        tokens, last = [], 0
        for match in self._marks.finditer(text):
            tokens += self._plain(text[last : match.start()]) + [self._added[match[0]]]
            last = match.end()
        return tokens + self._plain(text[last:])

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        for step in self._rewrite:
            text = step(text)
        pieces = [text]
        for cut in self._cut:
            pieces = cut(pieces)
        return [number for piece in pieces for number in self._piece(piece)]

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._kept:
            symbols = merge(list(piece), lambda a, b: self._ranks.get((a, b)))
            self._kept[piece] = [n for symbol in symbols for n in self._numbers(symbol)]
        return self._kept[piece]

    def _numbers(self, symbol: str) -> list[int]:
        if symbol in self._vocabulary:
            return [self._vocabulary[symbol]]
        as_bytes = [self._vocabulary.get(f'<0x{byte:02X}>') for byte in symbol.encode()]
        if all(number is not None for number in as_bytes):
            return [number for number in as_bytes if number is not None]
        if self._unknown is None:
            raise BpeError(f'this tokenizer has no token for {symbol!r}')
        return [self.token(self._unknown)]


def read_json(path: Path) -> BytePairs:
    """Read a tokenizer.json. Raises BpeError that names a part this reader does not know."""
    file = json.loads(path.read_text())
    model = file['model']
    if model.get('type', 'BPE') != 'BPE':
        raise BpeError(f'{path} holds a {model["type"]} model; this reader knows BPE')
    pairs: list[Any] = [
        tuple(m.split(' ', 1)) if isinstance(m, str) else tuple(m) for m in model['merges']
    ]
    return BytePairs(
        model['vocab'],
        pairs,
        {token['content']: token['id'] for token in file.get('added_tokens', [])},
        normalizer(file.get('normalizer')),
        pre_tokenizer(file.get('pre_tokenizer')),
        model.get('unk_token'),
        _head(file.get('post_processor')),
    )


def _head(part: Mapping[str, Any] | None) -> list[int]:
    """Marks that a template puts before a text."""
    if part is None or part['type'] not in ('Sequence', 'TemplateProcessing'):
        return []
    if part['type'] == 'Sequence':
        return [number for inner in part['processors'] for number in _head(inner)]
    found: list[int] = []
    for piece in part['single']:
        if 'Sequence' in piece:
            return found
        found += part['special_tokens'][piece['SpecialToken']['id']]['ids']
    return found


def read_qwen(folder: Path) -> BytePairs:
    """Read vocab.json, merges.txt and added_tokens.json, as Qwen's and Eagle's folders hold."""
    lines = (folder / 'merges.txt').read_text().splitlines()
    added = folder / 'added_tokens.json'
    return BytePairs(
        json.loads((folder / 'vocab.json').read_text()),
        [tuple(line.split(' ', 1)) for line in lines if line and not line.startswith('#version')],  # type: ignore[misc]
        json.loads(added.read_text()) if added.is_file() else {},
        normalizer({'type': 'NFC'}),
        [_cut(_pattern(QWEN2), keep_rest=True), _to_letters],
        None,
    )
