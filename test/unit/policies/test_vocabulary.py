# SPDX-License-Identifier: Apache-2.0
"""A closed vocabulary: what it encodes and what it refuses."""

import pytest

from quantvla_ros.policies.vocabulary import UnknownWords, Vocabulary

WORDS = Vocabulary.of(['pick up the bowl', 'push the plate'], length=5)


def test_words_are_sorted_behind_the_padding():
    assert WORDS.words == ('<pad>', 'bowl', 'pick', 'plate', 'push', 'the', 'up')


def test_case_and_punctuation_do_not_matter():
    assert WORDS.encode('Pick up the BOWL!').tolist() == [2, 6, 5, 1, 0]


def test_unknown_word_is_refused_with_the_known_ones():
    with pytest.raises(UnknownWords) as refusal:
        WORDS.encode('pick up the spoon')
    assert "does not know 'spoon'" in str(refusal.value)
    assert 'bowl, pick, plate, push, the, up' in str(refusal.value)


def test_the_padding_is_not_a_word():
    with pytest.raises(UnknownWords, match="does not know 'pad'"):
        WORDS.encode('<pad> plate')


def test_empty_instruction_is_refused():
    with pytest.raises(UnknownWords, match='needs words'):
        WORDS.encode('  ?')


def test_long_instruction_is_refused():
    with pytest.raises(UnknownWords, match='has 6 words; the policy reads at most 5'):
        WORDS.encode('push the plate push the plate')


def test_a_word_twice_is_refused():
    with pytest.raises(ValueError, match='each word once'):
        Vocabulary(['<pad>', 'a', 'a'], 5)
