# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench bags` on a small bag: it reads what it wrote and keeps every figure."""

import argparse
import json

import pytest

from quantvla_ros.bench import bags


def parse(*words):
    parser = argparse.ArgumentParser()
    bags.add_arguments(parser)
    return parser.parse_args(words)


def test_figures_of_a_small_bag_are_printed_and_kept(tmp_path, capsys):
    args = parse('--pairs', '400', '--size', '32x24', '--kinds', 'mcap-unindexed',
                 '--folder', str(tmp_path), '--json', str(tmp_path / 'rows.json'))
    bags.run(args)
    (row,) = json.loads((tmp_path / 'rows.json').read_text())
    assert row['pairs'] == 400
    assert 1.8 < row['megabytes'] < 3  # two pictures of 2304 bytes, and joints
    assert min(row['rosbags_s'], row['observations_s'], row['frames_s']) > 0
    assert row['peak_mb'] < 100
    assert 'mcap-unindexed' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ['rows.json']  # the bags are gone


@pytest.mark.parametrize('words, sentence', [
    (('--size', 'large'), 'WIDTHxHEIGHT'), (('--pairs', '3'), 'at least 400'),
    (('--kinds', 'rosbag1'), 'known are mcap'),
])
def test_what_cannot_be_measured_is_refused(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        bags.run(parse(*words))
