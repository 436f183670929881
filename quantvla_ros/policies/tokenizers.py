# SPDX-License-Identifier: Apache-2.0
"""Text to numbers, from a file on this machine, and the exact prompts of each family.

Reads a SentencePiece `.model`, a `tokenizer.json`, or vocab.json with merges.txt; the readers are
in sentencepiece_model.py and bpe.py. Downloads nothing; a missing file is answered with where
users get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from quantvla_ros.policies.bpe import read_json, read_qwen
from quantvla_ros.policies.sentencepiece_model import SentencePieceModel

STATE_BINS = 256
WHERE = {
    'pi05': 'pi0 and pi0.5 use the tokenizer of PaliGemma: paligemma_tokenizer.model of '
    'gs://big_vision (public), or tokenizer.json of google/paligemma-3b-pt-224 (accept its '
    'licence first)',
    'smolvla': 'SmolVLA uses tokenizer.json of HuggingFaceTB/SmolVLM2-500M-Video-Instruct',
    'groot_n15': 'GR00T N1.5 uses the tokenizer of Eagle 2.5: tokenizer.json of '
    'lerobot/eagle2hg-processor-groot-n1p5, or vocab.json and merges.txt beside it',
    'openvla': 'OpenVLA folders bring their own tokenizer.model or tokenizer.json',
}
WHERE['pi0'] = WHERE['pi05']
WHERE['openvla_oft'] = WHERE['openvla']


class TokenizerError(ValueError):
    """A tokenizer that the user can bring; the message says from where."""


class Tokenizer(Protocol):
    """Text -> numbers. head: marks that the file itself puts before a text."""

    head: list[int]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without marks for its begin or end."""

    def token(self, piece: str) -> int:
        """Return the number of one token by its name."""


def load_tokenizer(folder: Path, named: str, family: str) -> Tokenizer:
    """Read the tokenizer of a family: the file that the contract names, else one in the folder.

    Raises TokenizerError that says where to get it.
    """
    places = [Path(named).expanduser(), folder / named] if named else []
    places += [folder, folder / 'tokenizer']
    for place in places:
        for path in (place, place / 'tokenizer.json', place / 'tokenizer.model',
                     place / 'paligemma_tokenizer.model'):
            if path.is_file() and path.suffix == '.json':
                return read_json(path)
            if path.is_file() and path.suffix == '.model':
                return SentencePieceModel(path)
        if (place / 'vocab.json').is_file() and (place / 'merges.txt').is_file():
            return read_qwen(place)
    raise TokenizerError(
        f'{folder} holds no tokenizer.json and no *.model'
        + (f', and model.tokenizer names {named!r}, which is not there' if named else '')
        + f'. {WHERE[family]}. Put it into the folder or name it in model.tokenizer'
    )


def discretise(state: Sequence[float] | np.ndarray) -> list[int]:
    """Normalised state -> bins 0..255 over [-1, 1]; -1 below and 255 above, as published."""
    edges = np.linspace(-1, 1, STATE_BINS + 1)[:-1]
    return (np.digitize(np.asarray(state, dtype=np.float32), edges) - 1).tolist()


def clean(instruction: str) -> str:
    """Make one line of an instruction, as pi0.5 was trained on."""
    return instruction.strip().replace('_', ' ').replace('\n', ' ')


def state_prompt(instruction: str, state: Sequence[float] | np.ndarray) -> str:
    """pi0.5's prompt with the discretised state."""
    bins = ' '.join(map(str, discretise(state)))
    return f'Task: {clean(instruction)}, State: {bins};\nAction: '


def openvla_prompt(instruction: str) -> str:
    """OpenVLA's question."""
    return f'In: What action should the robot take to {instruction.lower()}?\nOut:'


def pi_tokens(
    tokenizer: Tokenizer, prompt: str, *, tail: str = '', longest: int
) -> list[int]:
    """<bos>, prompt, and a tail that is encoded by itself; cut where the model stops reading."""
    tokens = [tokenizer.token('<bos>'), *tokenizer.encode(prompt)]
    if tail:
        tokens += tokenizer.encode(tail)
    return tokens[:longest]
