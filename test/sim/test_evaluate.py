# SPDX-License-Identifier: Apache-2.0
"""`quantvla eval` on real scenes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros import cli
from quantvla_ros.quant import calibrated
from quantvla_ros.sim import episode_log, evaluate, players
from quantvla_ros.sim.episodes import Episode, Outcome, Settings, Variant
from quantvla_ros.sim.robosuite_world import RobosuiteWorld
from quantvla_ros.sim.world import CLOSE, make_world

pytestmark = pytest.mark.sim
HOLD = ['--policy', 'hold', '--suite', 'libero_object', '--tasks', '2', '--cap', '8']


def play_all(out, *options, workers=1):
    return cli.main(['eval', *HOLD, '--workers', str(workers), '--out', str(out), *options])


def lines(out):
    return [json.loads(line) for line in (out / 'episodes.jsonl').read_text().splitlines()]


def test_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, capsys):
    assert play_all(tmp_path, '--inits', '0') == 0
    with (tmp_path / 'episodes.jsonl').open('a') as file:
        file.write('{"key": "cut off in the mid')
    capsys.readouterr()
    assert play_all(tmp_path, '--inits', '0-1') == 0
    assert '1 of 2 episodes are in' in capsys.readouterr().out
    assert [(x['start'], x['status'], x['steps']) for x in lines(tmp_path)] == [
        (0, 'failure', 8), (1, 'failure', 8),
    ]
    page = (tmp_path / 'report.html').read_text()
    assert page.count('data:image/png;base64,') == 2


def test_another_evaluation_is_paired_with_this_one(tmp_path, capsys):
    first, second = tmp_path / 'first', tmp_path / 'second'
    assert play_all(first, '--inits', '0-1') == 0
    before = (first / 'episodes.jsonl').read_bytes()
    assert play_all(second, '--inits', '1-2', '--against', f'gpu={first}') == 0
    said = capsys.readouterr().out
    assert 'float (gpu) against float, 1 pairs' in said
    variants = json.loads((second / 'report.json').read_text())['variants']
    assert {name: found['all']['trials'] for name, found in variants.items()} == {
        'float (gpu)': 1, 'float': 2}
    assert (first / 'episodes.jsonl').read_bytes() == before
    for options, why in ((['--against', 'gpu=nowhere'], 'expected NAME=FOLDER'),
                         (['--against', f'gpu={first}', '--recovery'], 'another slip'),
                         (['--against', f'gpu={first}', '--cap', '9'], 'none of these')):
        assert play_all(second, '--inits', '1', *options) == 2
        assert why in capsys.readouterr().err


def test_another_setting_never_meets_an_old_outcome():
    episode = Episode(Variant(), 'libero_object', 2, 0, 8)
    settings = Settings(policy='hold')
    key = episode_log.Keys(settings)[episode]
    assert episode_log.Keys(settings)[episode] == key
    for other in (Settings(policy='hold', seed=1), Settings(policy='hold', execute=4),
                  Settings(policy='hold', noise_rad=0.01), Settings(policy='hold', slip=True),
                  Settings(policy='hold', lighting='night')):
        assert episode_log.Keys(other)[episode] != key
    assert episode_log.Keys(settings)[Episode(Variant(steps=2), 'libero_object', 2, 0, 8)] != key
    assert episode_log.Keys(settings)[Episode(Variant(), 'libero_object', 2, 0, 9)] != key


def test_an_artifact_elsewhere_decides_the_key_too(tmp_path):
    artifact = tmp_path / 'w8a8'
    artifact.mkdir()
    (artifact / 'artifact.json').write_text('1')
    before = episode_log.model_hash(Settings(), Variant(str(artifact)))
    (artifact / 'artifact.json').write_text('2')
    assert episode_log.model_hash(Settings(), Variant(str(artifact))) != before


def test_calibrations_are_compared_and_change_no_key_of_what_has_none(tmp_path):
    args = SimpleNamespace(precision='w4a8, float', calibration='none,monday', steps='0')
    names = [variant.name for variant in evaluate.variants_of(args)]
    assert names == ['w4a8', 'w4a8 + monday', 'float', 'float + monday']
    settings = Settings(policy='hold')
    plain, with_one = (Episode(Variant('w4a8', calibration=c), 'libero_object', 2, 0, 8)
                       for c in ('', 'monday'))
    assert episode_log.Keys(settings)[plain] != episode_log.Keys(settings)[with_one]
    artifact = tmp_path / calibrated.FOLDER / 'w8a8'  # a name above the model hides nothing
    made = artifact / calibrated.FOLDER / 'monday'
    made.mkdir(parents=True)
    bare = episode_log.model_hash(Settings(), Variant(str(artifact)))
    (artifact / 'artifact.json').write_text('1')
    assert episode_log.model_hash(Settings(), Variant(str(artifact))) != bare
    before = [episode_log.model_hash(Settings(), Variant(str(artifact), calibration=c))
              for c in ('', 'monday', str(made))]
    (made / 'calibration.json').write_text('1')
    after = [episode_log.model_hash(Settings(), Variant(str(artifact), calibration=c))
             for c in ('', 'monday', str(made))]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_a_calibration_that_is_not_there_is_told_and_nothing_crashes(tmp_path, capsys):
    words = ['--policy', 'libero_panda', '--precision', 'float', '--calibration', 'monday']
    assert play_all(tmp_path / 'out', *words) == 2
    assert 'calibration' in capsys.readouterr().err


def test_the_player_sees_the_light_that_was_asked_for():
    episode = Episode(Variant(), 'libero_object', 2, 0, 8)
    means = []
    for words in ('day', 'night'):
        world = players.make_task(Settings(policy='hold', lighting=words), episode)
        means.append(world.render('wrist', 64).mean())
        world.close()
    assert means[1] < 0.6 * means[0]


@pytest.mark.parametrize('words, sentence', [
    (['--lighting', 'noon'], 'neither day'),
    (['--lighting', 'lamp', '--real'], 'leave out --real'),
])
def test_light_that_cannot_be_had_is_refused_before_anything_is_played(
    tmp_path, capsys, words, sentence
):
    assert play_all(tmp_path / 'out', *words) == 2
    assert sentence in capsys.readouterr().err


def test_a_crashed_episode_is_played_again(tmp_path):
    log = episode_log.Log(tmp_path)
    episode = Episode(Variant(), 'libero_object', 2, 0, 8)
    log.add('a', Outcome(episode, 'crashed', error='boom'))
    assert not episode_log.Log(tmp_path).finished('a')
    log.add('a', Outcome(episode, 'success'))
    assert episode_log.Log(tmp_path).finished('a')


def test_a_process_that_dies_is_a_crash_and_its_work_goes_on(monkeypatch):
    """The first process is ended while it plays; the next one plays the rest."""
    start, started = players._Worker.__init__, []

    def start_and_end_the_first(self, settings, index):
        start(self, settings, index)
        started.append(self)
        if len(started) == 1:
            self.process.kill()
            self.process.join()

    monkeypatch.setattr(players._Worker, '__init__', start_and_end_the_first)
    monkeypatch.setattr(players._Worker, 'give', _give_even_to_the_dead)
    asked = [Episode(Variant(), 'libero_object', 2, start, 8) for start in (0, 1)]
    found = list(players.play_in_processes(asked, Settings(policy='hold'), workers=1))
    assert [(x.episode.start, x.status) for x in found] == [(0, 'crashed'), (1, 'failure')]
    assert 'exit code -9' in found[0].error


def test_a_player_that_is_done_frees_what_it_holds_and_ends_by_itself(monkeypatch):
    start, started = players._Worker.__init__, []

    def start_and_keep(self, settings, index):
        start(self, settings, index)
        started.append(self.process)

    monkeypatch.setattr(players._Worker, '__init__', start_and_keep)
    asked = [Episode(Variant(), 'libero_object', 2, 0, 8)]
    assert len(list(players.play_in_processes(asked, Settings(policy='hold'), workers=1))) == 1
    assert [process.exitcode for process in started] == [0]


def _give_even_to_the_dead(self, episode):
    self.episode = episode
    if self.process.is_alive():
        self.connection.send(episode)


def test_players_of_several_gpus_find_what_one_player_finds():
    settings = Settings(policy='hold', noise_rad=0.3)
    asked = [Episode(Variant(), 'libero_object', task, 0, 8) for task in (2, 3)]
    parts = players.divide(asked, 2)
    assert parts == [asked[:1], asked[1:]]

    def found(outcomes):
        return sorted((o.episode.task, o.status, o.steps, o.frame.sum()) for o in outcomes)

    on_two = found(players._play_on_gpus(parts, settings, workers=1))
    assert on_two == found(players.play_in_processes(asked, settings, workers=1))


def test_what_a_player_beside_a_gpu_refuses_is_refused_here():
    asked = [Episode(Variant('w5a5'), 'libero_object', 2, 0, 8)]
    with pytest.raises(ValueError, match='w5a5'):
        list(players._play_on_gpus([asked], Settings(), workers=1))


def test_wrong_options_are_refused_with_a_sentence(tmp_path, capsys):
    for options, sentence in (
        (['--inits', 'some'], 'expected numbers and ranges such as 0,3-5'),
        (['--perturb', 'wind=3'], 'expected noise=RADIANS'),
        (['--execute', '17'], 'a chunk has 16 steps'),
        (['--suite', 'libero_moon'], "suite 'libero_moon' is unknown"),
        (['--ray', 'auto', '--batch', '2'], 'leave out --batch'),
        (['--through-ros', '--recovery', '--real'], 'leave out --real, --recovery'),
        (['--video', 'libero_object'], 'expected SUITE/TASK/INIT'),
    ):
        assert play_all(tmp_path, *options) == 2
        assert sentence in capsys.readouterr().err


def test_numbers_and_ranges_are_read():
    assert evaluate.parse_numbers('0,3-5,4') == [0, 3, 4, 5]
    assert evaluate.parse_numbers('') == []


def test_video_of_any_episode(tmp_path):
    assert play_all(tmp_path, '--video', 'libero_object/2/0') == 0
    video = tmp_path / 'libero_object_2_0.mp4'
    import cv2

    reader = cv2.VideoCapture(str(video))
    assert int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) == 8


def test_shipped_policy_solves_an_official_start(tmp_path):
    """The weights belong to the package: without them this fails."""
    options = ['--suite', 'libero_object', '--tasks', '2', '--inits', '0', '--workers', '1',
               '--steps', '2']
    assert cli.main(['eval', *options, '--out', str(tmp_path)]) == 0
    assert [x['status'] for x in lines(tmp_path)] == ['success']


def test_robosuite_itself_moves_and_sees_what_world_does():
    """robosuite's textures are the originals; so are those of a scene packed without a limit."""
    real, world = RobosuiteWorld('libero_object', 2), make_world('libero_object', 2, 0)
    try:
        assert real.scene.instruction == world.scene.instruction
        for start in (1, 0):  # the second reset must leave nothing of the first
            real.reset_official(start)
            world.reset_official(start)
            target = world.joint_state()[:7] + 0.1
            for _ in range(10):
                real.step(target, CLOSE)
                world.step(target, CLOSE)
            assert np.abs(real.joint_state() - world.joint_state()).max() < 1e-9
        for camera in ('agentview', 'wrist'):
            seen = [w.render(camera).astype(float) for w in (real, world)]
            assert np.abs(seen[0] - seen[1]).mean() < 0.5
        assert real.success() is world.success() is False
    finally:
        real.close()
        world.close()
