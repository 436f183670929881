# SPDX-License-Identifier: Apache-2.0
"""A process that steps back does it among sessions too, and only for a session of its own."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from quantvla_ros import priority
from quantvla_ros.priority import set_session_nice, set_thread_nice

PROGRAM = """
from pathlib import Path
from quantvla_ros.priority import set_session_nice
print(set_session_nice(19, Path({path!r})), set_session_nice(0, Path({path!r})))
"""


def run_in(path, *, leads):
    root = str(Path(priority.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM.format(path=str(path))], text=True, check=True,
        capture_output=True, start_new_session=leads, env={'PYTHONPATH': root})
    return done.stdout.split()


def test_leader_of_a_session_steps_back_and_rises_again(tmp_path):
    path = tmp_path / 'autogroup'
    path.write_text('')
    assert run_in(path, leads=True) == ['True', 'True']
    assert path.read_text() == '0'


def test_session_of_a_terminal_is_left_alone(tmp_path):
    path = tmp_path / 'autogroup'
    path.write_text('as it was')
    assert run_in(path, leads=False) == ['False', 'False']
    assert path.read_text() == 'as it was'


def test_without_such_groups_nothing_happens(tmp_path):
    assert run_in(tmp_path / 'not' / 'there', leads=True) == ['False', 'False']


def test_wish_that_the_kernel_puts_off_is_made_again(monkeypatch):
    class Busy:
        left = 3

        def write_text(self, text):
            self.left -= 1
            if self.left:
                raise BlockingIOError

    monkeypatch.setattr(priority.os, 'getsid', lambda _: priority.os.getpid())
    monkeypatch.setattr(priority.time, 'sleep', lambda _: None)
    busy = Busy()
    assert set_session_nice(5, busy)
    assert busy.left == 0


@pytest.mark.parametrize('nice', [3, 19])
def test_thread_steps_back_alone(nice):
    def priority_of_this():
        return priority.os.getpriority(priority.os.PRIO_PROCESS, threading.get_native_id())

    before, found = priority_of_this(), []

    def work():
        set_thread_nice(nice)
        found.append(priority_of_this())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [nice]
    assert priority_of_this() == before
