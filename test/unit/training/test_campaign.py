# SPDX-License-Identifier: Apache-2.0
"""The whole training in one command: who runs when and where, going on, and what fails."""

import argparse

import pytest

from quantvla_ros.training import campaign, train
from quantvla_ros.training.campaign import Campaign, Step, lanes


def settings(work, **changes):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(['all', '--work', str(work), '--seconds', '1000', '--attempts', '20'])
    for name, value in changes.items():
        setattr(args, name, value)
    return args


@pytest.fixture
def played(monkeypatch):
    """Replace the processes by a list of what was started and finished."""
    told = []

    class FakeStep:
        def __init__(self, work, name, arguments, gpus):
            self.name, self.log, self.process = name, work / name, self
            told.append(('start', name, gpus, list(arguments)))

        def finish(self):
            told.append(('finish', self.name))
            return 'ended'

        def stop(self):
            told.append(('stop', self.name))

    monkeypatch.setattr(campaign, 'Step', FakeStep)
    return told


def order(told):
    return [' '.join(entry[:2]) for entry in told]


def test_gpus_are_divided_among_the_seeds_and_one_is_left():
    assert lanes(8, 3) == campaign.Lanes(('0,1', '2,3', '4,5'), '7', True)
    assert lanes(4, 3) == campaign.Lanes(('0', '1', '2'), '3', True)
    assert lanes(2, 3) == campaign.Lanes(('0,1',) * 3, '0,1', False)
    assert lanes(0, 1) == campaign.Lanes(('',), '', False)


def test_seeds_train_beside_the_scout_where_there_are_gpus(tmp_path, played):
    assert Campaign(settings(tmp_path), 8, print).run() == ['seed0', 'seed1', 'seed2']
    happened = order(played)
    assert happened.index('start first2') < happened.index('start scout')
    assert happened.index('finish render') < happened.index('finish first0')
    assert happened.index('finish first2') < happened.index('start seed0')
    assert happened.index('start seed2') < happened.index('finish seed0')
    assert happened[-1] == 'finish select'
    where = {entry[1]: entry[2] for entry in played if entry[0] == 'start'}
    assert (where['first1'], where['seed1'], where['scout']) == ('2,3', '2,3', '7')
    assert where['select'] == where['demos'] == ''


def test_on_one_device_everything_follows_in_turn(tmp_path, played):
    Campaign(settings(tmp_path, seeds=2), 1, print).run()
    starts = [entry[1] for entry in played if entry[0] == 'start']
    assert starts == ['demos', 'scout', 'takeover', 'render', 'first0', 'first1', 'seed0',
                      'seed1', 'select']
    for before, after in zip(played[::2], played[1::2], strict=True):
        assert (before[0], after) == ('start', ('finish', before[1]))


def test_each_stage_gets_its_share_of_the_time_and_the_seeds_differ(tmp_path, played):
    Campaign(settings(tmp_path, compile=True, seed=5), 8, print).run()
    told = {entry[1]: entry[3] for entry in played if entry[0] == 'start'}

    def option(name, key):
        return told[name][told[name].index(key) + 1]

    assert option('demos', '--limit') == '200'
    assert option('first1', '--seconds') == '420'
    assert [option(f'seed{n}', '--seed') for n in range(3)] == ['5', '6', '7']
    assert option('seed2', '--init') == str(tmp_path / 'first2')
    assert option('seed2', '--data') == 'demos,takeover'
    assert option('select', '--model') == 'seed0,seed1,seed2'
    assert '--compile' in told['scout']
    assert '--compile' not in told['takeover']


def test_what_still_runs_is_ended_when_a_step_fails(tmp_path, played, monkeypatch):
    def fail(self, attempts):
        raise ValueError('scout ended with 1')

    monkeypatch.setattr(Campaign, 'scout', fail)
    with pytest.raises(ValueError, match='scout ended'):
        Campaign(settings(tmp_path), 8, print).run()
    assert [entry[1] for entry in played if entry[0] == 'stop'] == ['first0', 'first1', 'first2']


def test_a_step_that_fails_says_its_last_words_and_is_done_again(tmp_path):
    arguments = ['fit', '--small', '--suites', 'nowhere/0']
    with pytest.raises(ValueError, match=r"bad ended with 2; .*bad.log(.|\n)*'nowhere'"):
        Step(tmp_path, 'bad', arguments, '').finish()
    assert not (tmp_path / 'logs' / 'bad.done').exists()


def test_a_step_that_has_ended_well_is_not_done_again(tmp_path):
    (tmp_path / 'logs').mkdir()
    (tmp_path / 'logs' / 'good.done').touch()
    (tmp_path / 'logs' / 'good.log').write_text('demos took 3 s\n')
    step = Step(tmp_path, 'good', ['no such stage'], '')
    assert step.process is None
    assert step.finish() == 'demos took 3 s'
