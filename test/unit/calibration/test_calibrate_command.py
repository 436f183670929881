# SPDX-License-Identifier: Apache-2.0
"""`quantvla calibrate` as a process: killed, cancelled, out of disk, without its bag."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from test_calibration_run import HEAD, weakened, write
from tiny_vla import TINY, observe

from quantvla_ros.calibration import calibrate, frames
from quantvla_ros.calibration.frames_file import write_frames
from quantvla_ros.cli import main
from quantvla_ros.quant.artifact import read_artifact
from quantvla_ros.quant.calibrated import FOLDER, load_calibration
from quantvla_ros.resources import share_path

SMALL = ('--frames', '10', '--held-out', '8', '--threads', '1', '--nice', '0')
QUICK = ('--learn', 'activations')  # asks nothing that this artifact could answer


@pytest.fixture(scope='session')
def bag(tmp_path_factory, contract):
    path = tmp_path_factory.mktemp('bag') / 'kitchen.npz'
    write_frames(path, [observe(contract, seed=seed) for seed in range(40)])
    return path


@pytest.fixture(scope='session')
def small_contract(tmp_path_factory):
    """The shipped contract with cameras of the tiny network's size."""
    said = yaml.safe_load(share_path('config/contracts/libero_panda.yaml').read_text())
    for camera in said['cameras'].values():
        camera.update(width=TINY.image, height=TINY.image)
    path = tmp_path_factory.mktemp('contract') / 'small.yaml'
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture
def words(model, bag, small_contract):
    write(model, weakened)
    return ['calibrate', str(bag), '--model', str(model), '--precision', 'w8a8',
            '--contract', str(small_contract), *SMALL]


@pytest.fixture
def started(words):
    """Start the command as calibration_node does; what is left of it is killed."""
    made = []

    def start(*more, limit=None):
        def lower():
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        made.append(subprocess.Popen(
            [sys.executable, '-m', 'quantvla_ros', *words, '--json', *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=lower, env={**os.environ, 'OMP_NUM_THREADS': '1'}))
        return made[-1]

    yield start
    for child in made:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()


def until(child, stage):
    """Read progress until a stage begins."""
    for line in child.stdout:
        if stage in json.loads(line).get('stage', ''):
            return
    raise AssertionError(child.stderr.read())


def beside(model):
    folder = model / 'w8a8' / FOLDER
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_command_writes_a_calibration_with_its_report(words, model, capsys):
    assert main(words) == 0
    told = capsys.readouterr().out
    assert 'kept: beta' in told and 'gate: may be activated' in told
    name, found = load_calibration(model / 'w8a8', 'newest', read_artifact(model / 'w8a8'))
    assert name == 'kitchen' and HEAD in found.alpha
    folder = model / 'w8a8' / FOLDER / 'kitchen'
    page = (folder / 'report.html').read_text()
    assert page.count('data:image/png;base64,') == 2 * 4  # cameras, worst frames
    assert 'http' not in page and '<script' not in page and HEAD in page
    report = json.loads((folder / 'report.json').read_text())
    assert report['kept']['alpha'][HEAD][1] == pytest.approx(1.45, rel=0.02)
    assert len(report['details']['after']['denoising_steps_rad']) == 4
    assert len(report['details']['after']['joints_rad']) == 7


def test_killed_it_leaves_nothing_and_the_next_run_is_fine(started, words, model):
    child = started()
    until(child, 'side by side')
    child.kill()
    child.wait()
    assert beside(model) == []
    assert main([*words, *QUICK]) == 0
    assert beside(model) == ['kitchen']


def test_a_cancel_ends_it_and_leaves_nothing(started, model):
    child = started()
    until(child, 'side by side')
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 130
    assert 'nothing was written' in child.stderr.read()
    assert beside(model) == []


def test_it_ends_with_whoever_started_it(started, model):
    child = started()
    until(child, 'side by side')
    child.stdin.close()
    assert child.wait(timeout=60) == 130
    assert beside(model) == []


def test_a_full_disk_is_told_and_leaves_the_old_one(started, words, model):
    assert main([*words, *QUICK]) == 0
    document = model / 'w8a8' / FOLDER / 'kitchen' / 'calibration.json'
    before = document.read_bytes()
    child = started('--seed', '1', *QUICK, limit=1500)
    said = [json.loads(line) for line in child.stdout]
    assert child.wait(timeout=60) == 2
    assert 'could not be written' in said[-1]['error'] and 'as it was' in said[-1]['error']
    assert document.read_bytes() == before
    assert beside(model) == ['kitchen']


def test_a_bag_that_goes_while_it_is_read_is_refused(
    words, model, bag, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / 'gone.npz'
    shutil.copy(bag, copy)
    read = frames.read_frames

    def gone(path):
        copy.unlink()
        return read(path)

    monkeypatch.setattr(frames, 'read_frames', gone)
    words[1] = str(copy)
    assert main(words) == 2
    assert str(copy) in capsys.readouterr().err
    assert beside(model) == []


@pytest.mark.parametrize(('more', 'sentence'), [
    (['--precision', 'w9'], "precision 'w9' is unknown"),
    (['--name', '../up'], 'the name of a calibration is'),
    (['--name', 'newest'], 'the name of a calibration is'),
    (['--learn', 'gamma'], "learn names 'gamma'"),
    (['--frames', '0'], 'count is 0'),
    (['--nice', '20'], 'nice is 20'),
])
def test_wrong_words_are_refused_with_a_sentence(words, model, capsys, more, sentence):
    assert main([*words, *more]) == 2
    assert sentence in capsys.readouterr().err
    assert beside(model) == []


@pytest.mark.parametrize(('path', 'name'), [
    ('bags/monday', 'monday'), ('monday.mcap.zstd', 'monday'), ('a b/c d!.npz', 'c_d')])
def test_a_calibration_is_named_after_its_bag(tmp_path, path, name):
    assert calibrate.default_name(tmp_path / path) == name
