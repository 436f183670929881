# SPDX-License-Identifier: Apache-2.0
"""Folder to chunk, against what the public implementations computed from the same folder."""

import functools

import numpy as np
import pytest

from quantvla_ros.bench.parity_case import CASES, relative_error


@pytest.fixture(scope='module')
def chunks(folders):
    """name -> our chunk, computed once."""
    return functools.cache(lambda name: CASES[name].ours(folders(name)))


@pytest.mark.parametrize('name', CASES)
def test_the_chunk_is_that_of_the_public_implementation(name, chunks, stored):
    theirs = np.array(stored(name)['chunk'])
    ours = chunks(name)
    assert ours.shape == theirs.shape
    assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize('name', CASES)
def test_a_chunk_depends_on_every_input(name, chunks):
    """A comparison that constant output would pass proves nothing."""
    chunk = chunks(name)
    assert len(chunk) == 1 or np.ptp(chunk, axis=0).min() > 0
    assert np.ptp(chunk, axis=1).min() > 0
