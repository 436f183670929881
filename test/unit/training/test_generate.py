# SPDX-License-Identifier: Apache-2.0
"""Who makes which demonstrations: weights of suites, balanced cuts, and help for the slow."""

import argparse

import pytest

from quantvla_ros.training import generate, train

LONG, SHORT = ('libero_10', 3), ('libero_object', 0)


def attempts(words, suites='libero_object,libero_10/3'):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.attempts_of(parser.parse_args(
        ['demos', '--work', 'w', '--suites', suites, '--attempts', words]))


def test_one_number_holds_for_every_suite_and_several_for_their_own():
    assert set(attempts('7').values()) == {7} and len(attempts('7')) == 11
    found = attempts('20,90')
    assert found[LONG] == 90 and found[SHORT] == 20
    for wrong in ('20,90,3', 'many', '20,'):
        with pytest.raises(ValueError, match='one for each of libero_object, libero_10'):
            attempts(wrong)


def test_a_cut_leaves_every_task_at_the_same_part_of_its_attempts():
    jobs = generate.file_jobs({SHORT: 20, LONG: 80})
    assert len(jobs) == 4 + 16 and len(set(jobs)) == 20
    first = jobs[:10]
    assert first.count((SHORT, 0)) == 1
    assert sum(task == LONG for task, _ in first) == 8
    (share,) = generate.shares(jobs, [SHORT, LONG], 1)
    assert share == jobs


def test_who_is_done_makes_what_others_have_not_begun(tmp_path, monkeypatch):
    class World:
        class scene:  # noqa: N801
            name = 'any'

        def close(self):
            pass

    made = []
    monkeypatch.setattr(generate, 'load_scene', lambda *_: None)
    monkeypatch.setattr(generate, 'World', lambda _: World())
    monkeypatch.setattr(generate, 'StartSampler', lambda _: argparse.Namespace())
    monkeypatch.setattr(generate, 'demonstrate', lambda *_: 'episode')
    monkeypatch.setattr(generate, 'write_episodes', lambda path, *_: made.append(path.name))
    jobs = generate.file_jobs({SHORT: 10, LONG: 15})
    begun = tmp_path / 'libero_10_3_0_00005.npz'
    assert generate.take(begun) and not generate.take(begun)
    mine = [job for job in jobs if job[0] == SHORT]
    generate.simulate(mine, jobs, str(tmp_path), 0, (512,), float('inf'))
    assert sorted(made) == ['libero_10_3_0_00000.npz', 'libero_10_3_0_00010.npz',
                            'libero_object_0_0_00000.npz', 'libero_object_0_0_00005.npz']
    assert made[:2] == ['libero_object_0_0_00000.npz', 'libero_object_0_0_00005.npz']
    assert (tmp_path / 'simulated.txt').read_text().count('any 5 5') == 4
