# SPDX-License-Identifier: Apache-2.0
"""What the report says of known outcomes."""

import numpy as np
import pytest

from quantvla_ros.sim import report
from quantvla_ros.sim.episodes import Settings


def line(start, status, precision='float', task=0):
    return {
        'key': f'{precision}-{task}-{start}',
        'variant': {'precision': precision, 'steps': 0},
        'suite': 'libero_object',
        'task': task,
        'start': start,
        'cap': 280,
        'status': status,
        'steps': 100,
        'chunks': 13,
        'seconds': 4.0,
        'policy_seconds': 2.6,
        'error': 'Traceback\nRuntimeError: <broken>' if status == 'crashed' else '',
    }


LINES = [
    line(0, 'success'), line(1, 'success'), line(2, 'failure'), line(3, 'crashed'),
    line(0, 'success', 'w4a8'), line(1, 'failure', 'w4a8'), line(2, 'success', 'w4a8'),
    line(3, 'failure', 'w4a8'),
]


@pytest.fixture
def summary():
    return report.summarize(LINES, Settings())


def test_a_crashed_episode_is_in_no_rate_and_is_counted_beside_it(summary):
    found = summary['variants']['float']['all']
    assert (found['successes'], found['trials'], found['crashed']) == (2, 3, 1)
    assert '1 crashed' in report.as_text(summary)


def test_a_refused_instruction_counts_as_not_solved():
    found = report.rate([line(0, 'success'), line(1, 'refused')])
    assert (found['successes'], found['trials'], found['refused']) == (1, 2, 1)


def test_pairs_leave_out_what_crashed_on_either_side(summary):
    pair = summary['pairs'][0]
    assert (pair['pairs'], pair['only_first'], pair['only_second']) == (3, 1, 1)
    assert pair['p'] == 1.0


def test_text_names_the_caps_and_the_action_space(summary):
    text = report.as_text(summary)
    assert 'step caps: libero_object 280' in text
    assert 'OSC_POSE' in text


def test_text_names_every_setting_that_is_not_the_default():
    text = report.as_text(report.summarize(LINES, Settings(slip=True, noise_rad=0.02)))
    assert 'noise_rad 0.02; slip True' in text


def test_page_holds_the_last_frames_and_escapes_errors(summary, tmp_path):
    png = tmp_path / 'frame.png'
    report.write_png(png, np.zeros((4, 8, 3), np.uint8))
    page = report.as_html(summary, LINES, {'float-0-2': png.read_bytes()})
    assert page.count('data:image/png;base64,') == 1
    assert 'libero_object/0/2, float: failure after 100 steps' in page
    assert 'RuntimeError: &lt;broken&gt;' in page
    assert 'http' not in page, 'the page loads nothing'


def test_png_is_read_back_as_it_was(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    report.write_png(tmp_path / 'a' / 'b.png', picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'a' / 'b.png')), picture)
