# SPDX-License-Identifier: Apache-2.0
"""`quantvla bench policy`: rows take turns, and the verdict compares the fastest of each kind."""

import argparse

import pytest

from quantvla_ros.bench import policy


def row(precision, mode, threads, p50):
    return dict(precision=precision, mode=mode, threads=threads, chunk=dict(p50=p50))


def test_the_fastest_float_form_is_what_integers_are_held_against():
    rows = [row('float', 'eager', 1, 200.0), row('bfloat16', 'compile', 1, 90.0),
            row('bfloat16', 'compile', 2, 60.0), row('w8a8', 'served', 1, 29.0),
            row('w8a8', 'served', 2, 35.0), row('w4a8', 'served', 2, 31.0)]
    eight, four = policy.speed_verdicts(rows)
    assert eight.startswith('w8a8 on 1 thread(s): 2.07x as fast as bfloat16 compile on 2')
    assert 'goal 2.0x: met' in eight
    assert four.startswith('w4a8 on 2 thread(s): 1.94x') and 'NOT met' in four


@pytest.mark.parametrize('rows', [[], [row('w8a8', 'served', 1, 29.0)]])
def test_without_a_float_row_nothing_is_claimed(rows):
    assert policy.speed_verdicts(rows) == []


class FakeRow:
    """Counts its turns; all of them write into one list."""

    order: list = []

    def __init__(self, settings, contract, mode):
        self.name, self.repeats = f'{settings.precision} {settings.threads}', 0

    def measure(self, repeats):
        self.repeats += repeats
        FakeRow.order.append(self.name)

    def end(self):
        return dict(repeats=self.repeats)


def test_rows_are_measured_in_turns_and_get_all_their_repeats(monkeypatch):
    monkeypatch.setattr(policy, 'Row', FakeRow)
    monkeypatch.setattr(FakeRow, 'order', [])
    args = argparse.Namespace(precision='float,bfloat16', model='', modes='eager', threads='1,2',
                              steps=0, contract='libero_panda', turns=3, repeats=7)
    rows = policy.measure_in_turns(args)
    assert [r['repeats'] for r in rows] == [7] * 4
    assert FakeRow.order == ['float 1', 'float 2', 'bfloat16 1', 'bfloat16 2'] * 3
