# SPDX-License-Identifier: Apache-2.0
"""`quantvla eval --through-ros`: real processes, real DDS, the shipped weights."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros import cli
from quantvla_ros.action import ActionChunk
from quantvla_ros.nodes.origin import Origin
from quantvla_ros.sim.episodes import Episode, Settings, Variant
from quantvla_ros.sim.through_ros import compare, processes_of

pytestmark = [pytest.mark.ros, pytest.mark.sim]


def test_chunks_over_dds_equal_those_in_process_bit_for_bit(tmp_path, monkeypatch):
    """A second of an episode: success is not asked for, every chunk that was heard is."""
    monkeypatch.setenv('ROS_DOMAIN_ID', str(1 + os.getpid() % 100))
    options = ['--suite', 'libero_object', '--tasks', '2', '--inits', '0', '--cap', '16']
    options += ['--steps', '1', '--out', str(tmp_path)]
    assert cli.main(['eval', '--through-ros', *options]) == 0
    line = json.loads((tmp_path / 'episodes.jsonl').read_text())
    assert (line['status'], line['steps']) == ('failure', 16)
    assert line['compared'] >= 2
    assert line['different'] == 0
    assert ' equal bit for bit, 0 different' in (tmp_path / 'report.html').read_text()


def test_the_graph_has_the_light_that_was_asked_for():
    first = Episode(Variant(), 'libero_object', 2, 0, 16)
    sim, _ = processes_of(Settings(through_ros=True, lighting='night'), Variant(), first)
    assert sim.parameters['lighting'] == 'night'


class Ramp:
    """Answers with the seed in every number."""

    def prepare(self, observation):
        return observation

    def denoise(self, context, seed):
        return ActionChunk(('a',), np.full((3, 1), seed * 0.1), 1, 0.05)


def heard(seed, positions, observation='seen', prefixed=False):  # noqa: FBT002
    origin = Origin(1, {}, {}, 'go', seed, prefixed)
    return SimpleNamespace(origin=origin, positions=positions, observation=observation)


def test_one_bit_makes_a_chunk_different_and_unheard_frames_are_not_compared():
    same = np.full((3, 1), 3 * 0.1)
    off = same.copy()
    off[2, 0] = np.nextafter(off[2, 0], 1)
    assert compare([heard(3, same), heard(3, off), heard(4, same)], Ramp()) == (3, 2)
    unheard = [heard(3, off, observation=None), heard(3, off, prefixed=True)]
    assert compare(unheard, Ramp()) == (0, 0)


def test_an_origin_comes_back_from_its_text():
    origin = Origin(4, {'front': 3}, {}, 'go', 2**62 + 1, prefixed=True, chunk_sha256='ab')
    assert Origin.read(origin.text()) == origin
