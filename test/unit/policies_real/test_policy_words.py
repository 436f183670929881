# SPDX-License-Identifier: Apache-2.0
"""Prompts and tokens, to the letter."""

import json
from pathlib import Path

import numpy as np
import pytest

from quantvla_ros.policies.bpe import BpeError, pre_tokenizer
from quantvla_ros.policies.groot_folder import chat
from quantvla_ros.policies.sentencepiece_model import SentencePieceModel
from quantvla_ros.policies.tokenizers import (
    discretise,
    openvla_prompt,
    pi_tokens,
    state_prompt,
)

FIXTURES = Path(__file__).parents[2] / 'fixtures' / 'policies'


def test_a_sentencepiece_file_encodes_as_its_own_library_does():
    model = SentencePieceModel(FIXTURES / 'words.model')
    for text, tokens in json.loads((FIXTURES / 'words.json').read_text()).items():
        assert model.encode(text) == tokens, text


def test_the_state_is_written_in_256_bins():
    assert discretise([-1.0, -0.999, 0.0, 0.999, 1.0]) == [0, 0, 128, 255, 255]
    assert discretise([-1.5, 1.5]) == [-1, 255]


def test_the_prompt_with_state_is_the_published_one():
    prompt = state_prompt(' pick up_the\nbowl ', np.array([-1.0, -0.715], np.float32))
    assert prompt == 'Task: pick up the bowl, State: 0 36;\nAction: '


def test_a_prompt_is_cut_where_the_model_stops_reading():
    model = SentencePieceModel(FIXTURES / 'words.model')
    model._numbers['<bos>'] = 2
    tokens = pi_tokens(model, 'move the cube', tail='\n', longest=200)
    assert tokens[0] == 2
    assert tokens[-len(model.encode('\n')):] == model.encode('\n')
    assert len(pi_tokens(model, 'move the cube ' * 90, longest=48)) == 48


def test_openvla_is_asked_in_lower_case():
    assert openvla_prompt('Open THE drawer') == (
        'In: What action should the robot take to open the drawer?\nOut:')


def test_groot_reads_its_images_before_the_words():
    text = chat("['go']", 2, 3)
    assert text.count('<IMG_CONTEXT>') == 6
    assert text.startswith('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n')
    assert text.endswith("</img>['go']<|im_end|>\n<|im_start|>assistant\n")
    assert '<image 1><img>' in text
    assert '<image 2><img>' in text


def test_a_part_that_the_reader_does_not_know_is_refused():
    with pytest.raises(BpeError, match='Whitespace'):
        pre_tokenizer({'type': 'Whitespace'})
