# SPDX-License-Identifier: Apache-2.0
import argparse

from quantvla_ros.bench import drift
from quantvla_ros.calibration.frames_file import write_frames


def test_frames_of_other_files_are_shown_by_name(
    tmp_path, model, contract, frames_path, observations, monkeypatch, capsys
):
    monkeypatch.setattr(drift, 'share_path', lambda name: model)
    monkeypatch.setattr(drift, 'load_contract', lambda name: contract)
    black = [drift.changed(one, lambda picture: 0 * picture) for one in observations]
    write_frames(tmp_path / 'cellar.npz', black)
    parser = argparse.ArgumentParser()
    drift.add_arguments(parser)
    words = ['--frames', str(frames_path), '--shown', str(tmp_path / 'cellar.npz'),
             '--count', '2', '--repeats', '1']
    assert drift.run(parser.parse_args(words)) == 0
    rows = {line[:16].strip(): line[16:]
            for line in capsys.readouterr().out.splitlines() if 'of the layers outside' in line}
    assert set(rows) == {*drift.scenes(), 'cellar'}
    assert rows['cellar'] == rows['lens covered']  # the same pictures
