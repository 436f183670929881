# SPDX-License-Identifier: Apache-2.0
"""Episodes on a Ray cluster of two nodes on this machine: the same outcomes as in processes."""

import os

import pytest

from quantvla_ros.sim.episodes import Episode, Settings, Variant
from quantvla_ros.sim.players import play_in_processes, play_on_ray

ray = pytest.importorskip('ray', reason='pip install quantvla_ros[ray]')
pytestmark = pytest.mark.sim
SETTINGS = Settings(policy='hold', noise_rad=0.3)


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def outcomes(playing):
    return sorted((x.episode.start, x.status, x.steps, x.frame.tobytes()) for x in playing)


def test_two_nodes_play_what_processes_play(cluster, monkeypatch):
    """The frames at the end show that both moved alike: the arm is shaken by seeded noise."""
    monkeypatch.setenv('PYTHONPATH', os.getcwd())
    asked = [Episode(Variant(), 'libero_object', 2, start, 12) for start in range(3)]
    alone = outcomes(play_in_processes(asked, SETTINGS, workers=1))
    assert outcomes(play_on_ray(asked, SETTINGS, 2, cluster.address)) == alone
    assert len({frame for *_, frame in alone}) == 3
