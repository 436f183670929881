# SPDX-License-Identifier: Apache-2.0
"""Words of instructions as numbers; a closed vocabulary refuses a word it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

PAD = '<pad>'
WORD = re.compile(r'[a-z0-9]+')


class UnknownWords(ValueError):  # noqa: N818  (it is what the user typed, not a failure of ours)
    """An instruction the policy was never trained on."""


def split_words(instruction: str) -> list[str]:
    """Return the words of an instruction in lower case."""
    return WORD.findall(instruction.lower())


class Vocabulary:
    """Known words in a fixed order; word 0 pads an instruction to a fixed length."""

    def __init__(self, words: Sequence[str], length: int) -> None:
        if not words or words[0] != PAD or len(set(words)) != len(words):
            raise ValueError(f'a vocabulary starts with {PAD} and holds each word once')
        self.words = tuple(words)
        self.length = length
        self._number = {word: number for number, word in enumerate(self.words)}

    @classmethod
    def of(cls, instructions: Iterable[str], length: int) -> Vocabulary:
        """Make the vocabulary of a set of instructions."""
        return cls([PAD, *sorted({w for text in instructions for w in split_words(text)})], length)

    def encode(self, instruction: str) -> np.ndarray:
        """Return (length,) int64, padded. Raises UnknownWords that lists what is known."""
        words = split_words(instruction)
        unknown = [word for word in words if word not in self._number]
        if unknown or not words:
            what = f'does not know {", ".join(map(repr, unknown))}' if words else 'needs words'
            raise UnknownWords(
                f'instruction {instruction!r}: the policy {what}. '
                f'Known words: {", ".join(self.words[1:])}'
            )
        if len(words) > self.length:
            raise UnknownWords(
                f'instruction {instruction!r} has {len(words)} words; the policy reads at most '
                f'{self.length}'
            )
        numbers = np.zeros(self.length, dtype=np.int64)
        numbers[: len(words)] = [self._number[word] for word in words]
        return numbers
