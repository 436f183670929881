# SPDX-License-Identifier: Apache-2.0
"""The report names what is costly, and its page stands alone."""

import re

import pytest

from quantvla_ros.cli import main


@pytest.fixture
def artifact(model, frames_path):
    def make(recipe, precision):
        folder = model / f'{recipe}-{precision}'
        main(['quantize', str(model), '--frames', str(frames_path), '--one-pass', '--recipe',
              recipe, '--precision', precision, '--out', str(folder)])
        return folder

    return make


def inspect(folder, frames_path, capsys, *more):
    capsys.readouterr()
    assert main(['inspect', str(folder), '--frames', str(frames_path), *more]) == 0
    return capsys.readouterr().out


def errors_of(text):
    rows = [line.split() for line in text.splitlines() if re.match(r'\S+\.\S+ +w\d', line)]
    return {row[0]: float(row[3]) for row in rows}


def test_fewer_bits_show_a_larger_error_in_every_layer(artifact, frames_path, capsys):
    wide = errors_of(inspect(artifact('rtn', 'w8a8'), frames_path, capsys, '--top', '99'))
    narrow = errors_of(inspect(artifact('rtn', 'w4a4'), frames_path, capsys, '--top', '99'))
    assert wide.keys() == narrow.keys() and len(wide) > 20
    assert all(narrow[name] > 10 * wide[name] for name in wide)


def test_costliest_layer_comes_first(artifact, frames_path, capsys):
    found = list(errors_of(inspect(artifact('rtn', 'w4a4'), frames_path, capsys)).values())
    assert found == sorted(found, reverse=True) and len(found) == 15


def test_each_group_shows_what_it_costs_alone(artifact, frames_path, capsys):
    said = inspect(artifact('rtn', 'w4a4'), frames_path, capsys, '--limit', '4')
    found = re.findall(r'^(vision|projector|backbone\w+|action\w+) +\d+ +\d+ +(\S+)$', said,
                       re.M)
    assert len(found) == 6
    costs = [float(cost) for _, cost in found]
    assert costs == sorted(costs, reverse=True) and min(costs) > 0


def test_layers_that_run_once_at_load_are_examined(artifact, frames_path, capsys):
    said = inspect(artifact('onboard', 'w4a8'), frames_path, capsys, '--top', '99')
    assert 'action.time_out' in errors_of(said)
    assert re.search(r'^modulation +1 ', said, re.M)


def test_page_loads_nothing_and_names_every_layer(artifact, frames_path, capsys):
    folder = artifact('rtn', 'w4a4')
    inspect(folder, frames_path, capsys)
    page = (folder / 'inspect.html').read_text()
    assert 'src=' not in page and 'href=' not in page and 'http' not in page
    assert page.count('<tr>') == page.count('<rect') + 1 - 6 > 20  # six bars are of groups


def test_matching_shows_alpha_and_beta(artifact, frames_path, capsys):
    said = inspect(artifact('quantvla', 'w4a4'), frames_path, capsys)
    assert re.search(r'action\.blocks\.\d\.(attn|cross): alpha (\d\.\d{3} )+ beta', said)
