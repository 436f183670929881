# SPDX-License-Identifier: Apache-2.0
"""When the pictures of a new scene are there: who starts an episode waits for it."""

import threading

import pytest

from quantvla_ros.sim.cameras import CameraLoop, Snapshot

PATIENCE_S = 30.0


class Rig:
    """Renders at once, but for a scene whose context is still being made."""

    def __init__(self):
        self.ready = threading.Event()

    def render(self, snapshot, names):
        if snapshot.model == 'new':
            self.ready.wait(PATIENCE_S)
        return dict.fromkeys(names)

    def close(self):
        pass


@pytest.fixture
def loop():
    made = CameraLoop(Rig(), lambda: made.newest, lambda: made.wanted, lambda: 100.0,
                      lambda *_: None, lambda: None)
    made.newest, made.wanted = Snapshot('old', None, 0), ['front']
    made.start()
    yield made
    made._rig.ready.set()
    made.stop()


def test_new_scene_is_there_with_its_first_picture(loop):
    assert loop.wait_for('old', 0, PATIENCE_S)
    loop.newest = Snapshot('new', None, 1)
    assert not loop.wait_for('new', 0, timeout_s=0.05), 'its context is being made'
    loop._rig.ready.set()
    assert loop.wait_for('new', 0, PATIENCE_S)


def test_every_camera_has_to_show_what_is_there_since_the_reset(loop):
    assert loop.wait_for('old', 0, PATIENCE_S)
    assert not loop.wait_for('old', 7, timeout_s=0.05), 'its picture is from before the reset'
    loop.newest = Snapshot('old', None, 7)
    assert loop.wait_for('old', 7, PATIENCE_S)
    shown = dict(loop._shown)
    loop._shown = {**shown, 'wrist': Snapshot('old', None, 6)}
    loop._picture = lambda name: None  # the other camera takes its time
    loop.wanted = ['front', 'wrist']
    assert not loop.wait_for('old', 7, timeout_s=0.05)


def test_nothing_is_waited_for_where_no_picture_is_wanted(loop):
    loop.wanted = []
    assert loop.wait_for('another', 0, timeout_s=0.0)
