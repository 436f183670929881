# SPDX-License-Identifier: Apache-2.0
"""Which model is chosen, and what its card says of the training."""

import json

import pytest

from quantvla_ros.training import card


def test_the_model_that_solved_most_drawn_starts_is_chosen():
    found = {'a': {'libero_goal_3': [10, 7, 0]}, 'b': {'libero_goal_3': [10, 9, 0]},
             'c': {'libero_goal_3': [10, 9, 0]}}
    selection = card.choose(found, 90_000)
    assert selection['best'] == 'b'
    assert selection['models']['a']['solved'] == 7


def test_models_that_played_different_starts_are_not_compared():
    found = {'a': {'libero_goal_3': [10, 7, 0]}, 'b': {'libero_goal_3': [9, 9, 0]}}
    with pytest.raises(ValueError, match='a 10, b 9'):
        card.choose(found, 90_000)


@pytest.fixture
def work(tmp_path):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'fit' / 'model').mkdir(parents=True)
    (tmp_path / 'demos').mkdir()
    (tmp_path / 'demos' / 'summary.json').write_text(
        json.dumps({'solved': {'libero_goal_3': 12}, 'tried': {'libero_goal_3': 17}}))
    log = [{'step': 100, 'seconds': 7.0, 'loss': 0.5, 'samples_per_s': 900},
           {'step': 120, 'seconds': 9.0, 'joint_rad': 0.0221, 'gripper': 0.05}]
    (tmp_path / 'fit' / 'model' / 'log.json').write_text(json.dumps({
        'settings': {'seed': 4, 'rate': 6e-4}, 'log': log, 'ranks': 1, 'device': 'CPU',
        'torch': '2', 'data': 'demos', 'init': '', 'without': ['noise'], 'frames': 9,
        'episodes': 3, 'cores': 2, 'date': 'today'}))
    return tmp_path


def test_the_card_tells_data_settings_losses_and_that_nothing_was_selected(work, monkeypatch):
    monkeypatch.setattr(card, 'read_settings', lambda folder: type('S', (), {'sha256': 'abc'}))
    mine = work / 'model' / 'MODEL_CARD.md'
    mine.write_text(f'# head\n{card.BEGIN}\nold\n{card.END}\ntail\n')
    text = card.write_card(work, 'model').read_text()
    assert text.startswith('# head\n') and text.endswith('tail\n') and 'old' not in text
    for said in ('`abc`', '12 of 17 attempts', 'seed 4, without noise', '0.5000',
                 'joint L1 22.1 mrad', 'No selection on drawn starts was made.'):
        assert said in text
