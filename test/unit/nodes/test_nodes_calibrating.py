# SPDX-License-Identifier: Apache-2.0
"""A calibration's process: what is told of it, and that it ends when it is told to."""

import json
import os
import signal
import sys
import time

import pytest

from quantvla_ros.nodes.calibrating import (
    CALIBRATION_NODE,
    GRACE_S,
    Calibrating,
    CalibratingError,
    command,
)
from quantvla_ros.nodes.parameters import defaults
from quantvla_ros.resources import share_path

VALUES = {**defaults(CALIBRATION_NODE), 'bag': 'bags/monday'}
EVIDENCE = {'before': {'mean_rad': 0.002}, 'after': {'mean_rad': 0.001}}
SAYS = 'import json,sys,time,signal\ndef say(**d): print(json.dumps(d), flush=True)\n'
WAITS = SAYS + 'say(stage="side by side", share=0.5, left_s=3.0)\nsys.stdin.read()\n'
DEAF = SAYS + 'signal.signal(signal.SIGINT, signal.SIG_IGN)\n' + WAITS


@pytest.fixture
def run():
    made = []

    def start(script):
        made.append(Calibrating(VALUES, [sys.executable, '-c', script]))
        return made[-1]

    yield start
    for one in made:
        one.finish()


def until(ready, one, seconds=20.0):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, one.report()
        one.poll()
        time.sleep(0.005)


def ended(one):
    until(lambda: not one.running, one)
    return one.report()


def test_progress_and_result_are_told(run):
    one = run(SAYS + f'say(stage="writing", share=1.0, left_s=0.0)\n'
              f'say(result=dict(folder="f", evidence={EVIDENCE!r}))\n')
    told = ended(one)
    assert told['state'] == 'done' and told['share'] == 1.0
    assert told['sentence'] == 'action error 2.000 mrad before, 1.000 after; f'
    assert json.loads(json.dumps(told))['result']['folder'] == 'f'


def test_a_refusal_is_told_in_its_own_words(run):
    told = ended(run(SAYS + 'say(error="the bag is empty")\nsys.exit(2)\n'))
    assert (told['state'], told['sentence']) == ('failed', 'the bag is empty')


def test_a_bug_is_told_with_what_the_process_said(run):
    told = ended(run('raise RuntimeError("one over zero")'))
    assert told['state'] == 'failed' and 'one over zero' in told['sentence']


def test_a_killed_process_is_told_as_that(run):
    told = ended(run('import os, signal; os.kill(os.getpid(), signal.SIGKILL)'))
    assert told['state'] == 'failed'
    assert 'SIGKILL' in told['sentence'] and 'nothing was written' in told['sentence']


@pytest.mark.parametrize('script', [WAITS, DEAF])
def test_a_cancelled_process_ends_within_a_second(run, script):
    one = run(script)
    until(lambda: one.report()['stage'] == 'side by side', one)
    began = time.monotonic()
    one.cancel('asked to')
    told = ended(one)
    assert time.monotonic() - began < GRACE_S + 0.4
    assert told['state'] == 'cancelled' and 'asked to' in told['sentence']


def test_the_first_cause_of_a_cancel_counts(run):
    one = run(WAITS)
    until(lambda: one.report()['stage'] == 'side by side', one)
    one.cancel('the arm began to move')
    one.cancel('asked to')
    assert 'the arm began to move' in ended(one)['sentence']


def test_teardown_leaves_no_process(run):
    one = run(DEAF)
    until(lambda: one.report()['stage'] == 'side by side', one)
    one.finish()
    with pytest.raises(ProcessLookupError):
        os.kill(one._popen.pid, signal.SIGKILL)


def test_the_command_line_carries_every_setting():
    words = command({**VALUES, 'output': 'kitchen', 'recipe': 'gptq', 'partial': True})
    text = ' '.join(words)
    for part in ('calibrate bags/monday', '--json', '--frames 128', '--held-out 32',
                 '--recipe gptq', '--name kitchen', '--partial', '--nice 19'):
        assert part in text
    assert '--model' not in text
    assert '--out /srv/kitchen' in ' '.join(command({**VALUES, 'output': '/srv/kitchen'}))


def test_the_command_understands_its_own_words():
    import argparse

    from quantvla_ros.calibration.calibrate import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = command({**VALUES, 'contract': 'c', 'model': 'm', 'recipe': 'gptq'})
    args = parser.parse_args(words[words.index('calibrate') + 1:])
    assert (args.contract, args.model, args.seed, args.nice) == ('c', 'm', 0, 19)


def test_without_a_bag_nothing_starts():
    with pytest.raises(CalibratingError, match='bag is empty'):
        command({**VALUES, 'bag': ''})


def test_yaml_file_holds_every_parameter():
    from quantvla_ros.nodes.parameters import yaml_text

    text = share_path('config/calibration_node.yaml').read_text()
    assert text == yaml_text(CALIBRATION_NODE)
