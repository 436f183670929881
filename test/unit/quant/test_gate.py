# SPDX-License-Identifier: Apache-2.0
"""A precision whose measured error is above the stated limits is refused with a sentence."""

from dataclasses import replace

import pytest
import torch
from test_calibrated import EVIDENCE, calibration, written
from test_calibrated import artifact as artifact  # fixtures
from test_calibrated import folder as folder

from quantvla_ros.quant.artifact import Provenance, read_artifact, write_artifact
from quantvla_ros.quant.evidence import Evidence, read_evidence
from quantvla_ros.quant.gate import GateLimits, gate, refuse

LIMITS = GateLimits()


def scaled(figures, factor):
    return replace(figures, mean_rad=factor * figures.mean_rad,
                   worst_rad=factor * figures.worst_rad)


def judged(after):
    return replace(EVIDENCE, after=after)


def test_an_error_below_the_floor_of_another_seed_passes():
    assert refuse(EVIDENCE, LIMITS) == ''
    assert refuse(judged(EVIDENCE.floor), LIMITS) == ''


@pytest.mark.parametrize('factor', [1.01, 3.0, float('nan'), float('inf')])
def test_a_mean_error_above_the_floor_is_refused(factor):
    sentence = refuse(judged(scaled(EVIDENCE.floor, factor)), LIMITS)
    assert 'mean action error' in sentence and '4 held-out frames' in sentence


def test_a_bad_frame_is_refused_though_the_mean_is_good():
    bad = replace(EVIDENCE.after, worst_rad=1.6 * EVIDENCE.floor.worst_rad)
    assert 'worst-frame action error' in refuse(judged(bad), LIMITS)
    assert refuse(judged(bad), GateLimits(worst_ratio=2.0)) == ''


def test_an_artifact_nobody_measured_passes_unless_evidence_is_asked_for(folder):
    assert gate(folder, '', LIMITS) == ''
    assert 'nobody measured' in gate(folder, '', GateLimits(needs_evidence=True))


@pytest.mark.parametrize(('error', 'refused'), [(1.0, False), (5.0, True)])
def test_an_artifact_is_judged_by_its_own_evidence(folder, error, refused):
    measured = {'action_error_mrad': error, 'other_seed_mrad': 4.0}
    write_artifact(folder, read_artifact(folder).layers,
                   Provenance('c' * 64, 'rtn', 'w4a8', measured=measured))
    assert bool(gate(folder, '', LIMITS)) is refused
    assert bool(gate(folder, 'newest', LIMITS)) is refused


def test_what_a_calibration_mended_passes_with_it_alone(folder, artifact):
    evidence = replace(EVIDENCE, before=scaled(EVIDENCE.floor, 2.0))
    written(folder, calibration(artifact, evidence=evidence))
    assert 'mean action error is 8.00 mrad' in gate(folder, '', LIMITS)
    assert gate(folder, 'robot', LIMITS) == ''
    assert gate(folder, 'newest', LIMITS) == ''


@pytest.mark.parametrize('change', [
    lambda d: d.pop('floor'),
    lambda d: d['after'].update(mean_rad=float('nan')),
    lambda d: d['after'].update(mean_rad='small'),
    lambda d: d.update(frames=0),
])
def test_evidence_that_is_not_whole_is_refused(change):
    document = EVIDENCE.document()
    assert isinstance(read_evidence(document), Evidence)
    change(document)
    with pytest.raises(ValueError, match='evidence'):
        read_evidence(document)


def test_a_calibration_without_factors_is_neutral(artifact):
    assert not calibration(artifact).neutral
    assert calibration(artifact, alpha={}, beta={}).neutral
    assert torch.is_tensor(calibration(artifact).alpha['attn'])
