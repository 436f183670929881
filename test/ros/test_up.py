# SPDX-License-Identifier: Apache-2.0
"""Real child processes: how they start, how they stop and that none stays behind."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from quantvla_ros import up
from quantvla_ros.graph import Graph, Process
from quantvla_ros.processes import Supervisor, environment_of

READY = 'print("ready", flush=True)'
SLEEP = f'import time; {READY}; time.sleep(60)'
STUBBORN = ('import signal, time; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; '
            f'{READY}; time.sleep(60)')


def alive(pid):
    try:
        with open(f'/proc/{pid}/stat') as file:
            return file.read().rsplit(')', 1)[1].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def python(code):
    return [sys.executable, '-S', '-c', code]


@pytest.fixture
def log():
    return io.StringIO()


def test_output_carries_the_name_of_the_process(log):
    with Supervisor(log) as supervisor:
        child = supervisor.start_command('arm', python('print("hello")'), os.environ)
        assert wait_for(lambda: child.ended)
    assert '[arm] hello\n' in log.getvalue()


def test_interrupt_ends_children_cleanly(log):
    code = (f'import time\ntry:\n {READY}\n time.sleep(60)\n'
            'except KeyboardInterrupt:\n print("bye")')
    with Supervisor(log) as supervisor:
        child = supervisor.start_command('node', python(code), os.environ)
        assert wait_for(lambda: 'ready' in log.getvalue())
    assert child.popen.returncode == 0
    assert '[node] bye' in log.getvalue()


def test_hanging_child_is_killed_by_pid_after_both_grace_times(log):
    with Supervisor(log, grace_s=0.2, kill_s=0.5) as supervisor:
        child = supervisor.start_command('node', python(STUBBORN), os.environ)
        assert wait_for(lambda: 'ready' in log.getvalue())
    assert child.popen.returncode == -signal.SIGKILL
    assert 'still runs; sending SIGTERM' in log.getvalue()
    assert 'still runs; sending SIGKILL' in log.getvalue()


def test_grandchild_does_not_outlive_its_parent(log):
    code = ('import subprocess, sys; p = subprocess.Popen([sys.executable, "-S", "-c", '
            f'{STUBBORN!r}], stdout=subprocess.PIPE); p.stdout.readline(); '
            'print(p.pid, flush=True)')
    with Supervisor(log) as supervisor:
        child = supervisor.start_command('node', python(code), os.environ)
        assert wait_for(lambda: child.ended)
        assert wait_for(lambda: '\n' in log.getvalue())
    grandchild = int(log.getvalue().split()[1])
    assert wait_for(lambda: not alive(grandchild))


def test_end_of_a_required_child_is_told_with_its_name(log):
    with Supervisor(log) as supervisor:
        supervisor.start_command('sim', python(SLEEP), os.environ)
        supervisor.start_command('policy', python('raise SystemExit(3)'), os.environ)
        ended = supervisor.wait(threading.Event())
    assert ended.name == 'policy'
    assert '[policy] ended with status 3' in log.getvalue()


def test_end_of_an_optional_child_leaves_the_rest_running(log):
    stop = threading.Event()
    with Supervisor(log) as supervisor:
        robot = supervisor.start_command('policy', python(SLEEP), os.environ)
        supervisor.start_command('record', python('pass'), os.environ, required=False)
        waiter = threading.Thread(target=supervisor.wait, args=(stop,))
        waiter.start()
        assert wait_for(lambda: 'the rest goes on' in log.getvalue())
        assert not robot.ended
        stop.set()
        waiter.join()


PARENT = f"""
import os, sys
from quantvla_ros import up
from quantvla_ros.graph import GRAPHS, Graph, Process
GRAPHS['test'] = Graph('test', '', (), lambda values: [
    Process('first', command=(sys.executable, '-S', '-c',
                              'import os; print(os.getpid()); {SLEEP}')),
    Process('second', command=(sys.executable, '-S', '-c', {{second!r}})),
])
import quantvla_ros.cli
sys.exit(quantvla_ros.cli.main(['up', 'test']))
"""


def run_parent(second, **options):
    code = PARENT.replace('{second!r}', repr(second))
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                            start_new_session=True, env=environment_of(Process('x')), **options)


def read_until_ready(parent, count):
    lines, ready = [], 0
    while ready < count:
        line = parent.stdout.readline()
        assert line, f'parent ended early: {lines}'
        lines.append(line)
        ready += 'ready' in line
    return [int(line.split()[1]) for line in lines if line.split()[1].isdigit()]


WITH_PID = f'import os; print(os.getpid()); {SLEEP}'
STUBBORN_WITH_PID = f'import os; print(os.getpid()); {STUBBORN}'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_up_stops_cleanly_and_leaves_no_orphan(number):
    parent = run_parent(WITH_PID)
    pids = read_until_ready(parent, 2)
    parent.send_signal(number)
    assert parent.wait(30) == 0
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_up_hears_interrupt_even_when_started_with_it_ignored():
    parent = run_parent(WITH_PID, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    pids = read_until_ready(parent, 2)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(30) == 0
    assert not any(alive(pid) for pid in pids)


def test_killed_parent_leaves_no_orphan_even_when_a_child_hangs():
    parent = run_parent(STUBBORN_WITH_PID)
    pids = read_until_ready(parent, 2)
    parent.kill()
    parent.wait(30)
    assert len(pids) == 2
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_exit_status_tells_which_process_ended():
    parent = run_parent(f'{READY}; raise SystemExit(7)', stderr=subprocess.PIPE)
    read_until_ready(parent, 1)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == up.ENDED + 1
    assert 'second ended with status 7' in errors


def test_children_find_the_package_and_the_ament_prefix(monkeypatch):
    monkeypatch.delenv('AMENT_PREFIX_PATH', raising=False)
    env = environment_of(Process('x', environment={'A': 'b'}))
    assert env['AMENT_PREFIX_PATH'] == sys.prefix
    assert env['A'] == 'b'


def test_words_that_are_no_assignment_are_refused():
    with pytest.raises(ValueError, match='name:=value'):
        up.parse_assignments(['suite=libero_goal'])


def test_unknown_argument_and_bad_choice_are_refused_together():
    graph = up.graph_named('sim')
    assert isinstance(graph, Graph)
    with pytest.raises(ValueError, match='no argument of sim(.|\n)*mode is'):
        graph.values({'suit': 'x', 'mode': 'fast'})
