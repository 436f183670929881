# SPDX-License-Identifier: Apache-2.0
"""A calibration finds what is wrong with an artifact, keeps what helps, and comes off again."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_vla import observe, random_net, tiny_checkpoint

from quantvla_ros.calibration.calibrate import provenance
from quantvla_ros.calibration.evidence import judge
from quantvla_ros.calibration.factors import Factors, Foldable
from quantvla_ros.calibration.frames import FrameSet, frames_digest
from quantvla_ros.calibration.passes import encode, play
from quantvla_ros.calibration.pipeline import quantize_policy, quantize_unseen
from quantvla_ros.calibration.policy_runs import chunks
from quantvla_ros.calibration.run import CalibrationRun, with_provenance
from quantvla_ros.calibration.settings import CalibrationSettings
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.libero_checkpoint import read_checkpoint, write_checkpoint
from quantvla_ros.policies.libero_panda import LiberoVla
from quantvla_ros.policies.libero_quantized import build, open_artifact, read_teacher
from quantvla_ros.quant.artifact import Provenance, write_artifact
from quantvla_ros.quant.calibrated import FOLDER, read_document, write_calibration
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme

HEAD, LAYER = 'action.blocks.1.attn', 'action.blocks.0.cross'


@pytest.fixture(scope='session')
def frames(contract):
    seen = [observe(contract, seed=seed) for seed in range(20)]
    fit, held = tuple(seen[:10]), tuple(seen[10:])
    return FrameSet(fit, held, 'made up', frames_digest((fit, held)))


def write(model, spoil=lambda layers: layers, precision='w8a8', recipe='rtn'):
    """An artifact rounded to nearest, perhaps with something wrong in it."""
    checkpoint, net = read_checkpoint(model)
    layers = quantize_unseen(net, find_recipe('rtn'), parse_scheme(precision))
    write_artifact(model / precision, spoil(layers),
                   Provenance(checkpoint.sha256, recipe, precision))
    return model / precision


def weakened(layers):
    """Head 1 of an attention too cold by a third, and one output too small by a fifth."""
    spoiled = dict(layers)
    for name, rows, factor in ((f'{HEAD}.q_proj', slice(64, 128), 1 / 1.45),
                               (f'{LAYER}.o_proj', slice(None), 1 / 1.2)):
        weight = layers[name].weight
        scales = weight.scales.clone()
        scales[rows] *= factor
        spoiled[name] = replace(layers[name], weight=replace(weight, scales=scales))
    return spoiled


def calibrate(model, contract, frames, tell=lambda _: None, **settings):
    settings = CalibrationSettings(model, 'w8a8', threads=1, **settings)
    outcome = CalibrationRun(frames, contract, settings, QuantLinear, tell).run()
    return with_provenance(outcome, provenance(frames, settings))


@pytest.fixture(scope='module')
def weak(tmp_path_factory):
    """A model beside which lies an artifact with two things wrong in it; not to be changed."""
    folder = tmp_path_factory.mktemp('weak')
    write_checkpoint(folder, random_net(), tiny_checkpoint())
    write(folder, weakened)
    return folder


@pytest.fixture(scope='module')
def mended(weak, contract, frames):
    return calibrate(weak, contract, frames)


@pytest.fixture
def copied(weak, tmp_path):
    """A copy of the weak model that may be changed."""
    return Path(shutil.copytree(weak, tmp_path / 'copied'))


def test_the_teacher_on_the_disk_is_the_float_policy(model, contract, frames, make_policy):
    write(model)
    opened = open_artifact(model, 'w8a8')
    streamed = LiberoVla.around(contract, PolicySettings(), opened.checkpoint,
                                read_teacher(opened))
    expected = chunks(make_policy(), frames.fit[:3], seed=5)
    assert np.array_equal(play(streamed, encode(streamed, frames.fit[:3], 5)).chunks, expected)


def test_what_was_weakened_is_found_and_kept(mended):
    calibration = mended.calibration
    assert calibration.alpha[HEAD][1] == pytest.approx(1.45, rel=0.02)
    assert float(calibration.beta[LAYER]) == pytest.approx(1.2, rel=0.03)
    assert [q.kept for q in mended.questions if q.what != 'activations'] == [True, True]
    assert calibration.evidence.after.mean_rad < 0.5 * calibration.evidence.before.mean_rad
    assert calibration.evidence.after.cosine > calibration.evidence.before.cosine


def test_the_served_policy_moves_as_the_evidence_says(copied, frames, mended, make_policy):
    write_calibration(copied / 'w8a8' / FOLDER / 'robot', mended.calibration)
    plain, float_ = make_policy(model=str(copied), precision='w8a8'), make_policy()
    served = make_policy(model=str(copied), precision='w8a8', calibration='newest')
    assert (served.calibrated, plain.calibrated) == ('robot', '')
    truth = chunks(float_, frames.held_out)
    errors = [np.abs(chunks(policy, frames.held_out) - truth)[:, :8, :-1].mean()
              for policy in (plain, served)]
    assert errors[1] < 0.6 * errors[0]


def test_leaving_a_calibration_out_gives_the_artifact_back_to_the_bit(
    copied, frames, mended, make_policy
):
    settings = {'model': str(copied), 'precision': 'w8a8'}
    before = chunks(make_policy(**settings), frames.held_out[:3])
    write_calibration(copied / 'w8a8' / FOLDER / 'robot', mended.calibration)
    assert np.array_equal(chunks(make_policy(**settings), frames.held_out[:3]), before)


def test_the_same_frames_twice_give_the_same_bytes(weak, contract, frames, mended, tmp_path):
    again = calibrate(weak, contract, frames)
    for name, outcome in (('one', mended), ('two', again)):
        write_calibration(tmp_path / name, outcome.calibration)
    files = sorted(path.name for path in (tmp_path / 'one').iterdir())
    assert files == ['calibration.json', 'calibration.safetensors']
    assert all((tmp_path / 'one' / f).read_bytes() == (tmp_path / 'two' / f).read_bytes()
               for f in files)


def test_it_says_which_frames_it_saw(mended, frames, tmp_path):
    write_calibration(tmp_path / 'one', mended.calibration)
    said = read_document(tmp_path / 'one')['provenance']
    assert said['frames'] == frames.digest and said['bag'] == 'made up'


def test_ranges_cover_what_the_linears_meet(mended):
    for found in (mended.calibration.activations, mended.calibration.logits):
        assert all(0 < low <= middle <= high for low, middle, high in found.values())
    assert len(mended.calibration.logits) == 4
    assert 'vision.blocks.0.attn.q_proj' in mended.calibration.activations


def test_nothing_is_kept_of_an_artifact_that_is_well(model, contract, frames):
    write(model)
    outcome = calibrate(model, contract, frames)
    assert not any(question.kept for question in outcome.questions)
    assert outcome.calibration.neutral
    assert outcome.calibration.evidence.after == outcome.calibration.evidence.before


def test_rounding_anew_mends_what_factors_cannot(model, contract, frames):
    def coarse(layers):
        name = 'backbone.blocks.1.mlp.down_proj'
        weight = layers[name].weight
        zero = replace(weight, data=torch.zeros_like(weight.data))
        return {**layers, name: replace(layers[name], weight=zero)}

    write(model, coarse)
    outcome = calibrate(model, contract, frames, learn=('rounding',), recipe='smoothquant')
    assert [question.kept for question in outcome.questions] == [True]
    assert 'backbone.blocks.1.mlp.down_proj' in outcome.calibration.layers
    evidence = outcome.calibration.evidence
    assert evidence.after.mean_rad < 0.5 * evidence.before.mean_rad


def test_an_artifact_of_onboard_is_rounded_anew_as_a_whole(model, contract, frames):
    """Its modulation has float tokens: the new layer must not hold the float net's own bias."""
    policy = LiberoVla.around(contract, PolicySettings(threads=1), *read_checkpoint(model))
    made = quantize_policy(policy, find_recipe('onboard'), parse_scheme('w8a8'), frames.fit[:2],
                           seed=0, make=QuantLinear).layers
    assert any(layer.scheme.act_bits == 16 and layer.bias is not None for layer in made.values())
    checkpoint, _ = read_checkpoint(model)
    write_artifact(model / 'w8a8', made, Provenance(checkpoint.sha256, 'onboard', 'w8a8'))
    outcome = calibrate(model, contract, frames, learn=('rounding',))
    assert [question.what for question in outcome.questions] == ['rounding']


def test_rounding_anew_by_a_recipe_that_sees_no_frames_is_refused(model, contract, frames):
    write(model)
    with pytest.raises(ValueError, match='nothing to refit'):
        calibrate(model, contract, frames, learn=('rounding',))


def test_progress_rises_and_a_cancel_leaves_at_once(model, contract, frames):
    write(model, weakened)
    shares = []

    def tell(progress):
        shares.append(progress.share)
        if progress.stage == 'side by side':
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, contract, frames, tell)
    assert shares == sorted(shares) and 0 < shares[-1] < 1
    assert sorted(p.name for p in (model / 'w8a8').iterdir()) == [
        'artifact.json', 'layers.safetensors']


def test_factors_come_off_a_student_without_a_trace(model, contract, frames):
    write(model)
    opened = open_artifact(model, 'w8a8')
    layers = opened.artifact.layers
    student = LiberoVla.around(contract, PolicySettings(), opened.checkpoint,
                               build(opened, layers, QuantLinear))
    encoded = encode(student, frames.fit[:2], 0)
    before = play(student, encoded).chunks
    foldable = Foldable(student.net, opened.sites, layers, QuantLinear)
    foldable.set(Factors({HEAD: torch.tensor([1.0, 1.3])}, {LAYER: torch.tensor([0.8])}))
    assert not np.array_equal(play(student, encoded).chunks, before)
    foldable.set(Factors())
    assert np.array_equal(play(student, encoded).chunks, before)


@pytest.mark.parametrize(('gain', 'helps'), [(0.3, True), (0.0, False), (-0.3, False)])
def test_only_a_gain_beyond_chance_counts(gain, helps):
    drawn = np.random.default_rng(0)
    before = drawn.normal(3.0, 0.2, 40)
    after = before - gain + drawn.normal(0, 0.4, 40)
    assert judge(before, after, 0.95).helps is helps


def test_more_confidence_keeps_less():
    drawn = np.random.default_rng(1)
    before = drawn.normal(3.0, 0.2, 30)
    after = before - 0.12 + drawn.normal(0, 0.3, 30)
    lows = [judge(before, after, c).low_rad for c in (0.8, 0.95, 0.999)]
    assert lows == sorted(lows, reverse=True) and lows[0] > 0 > lows[-1]


@pytest.mark.parametrize(('wrong', 'sentence'), [
    ({'learn': ('gamma',)}, "learn names 'gamma'"),
    ({'clip': -1.0}, 'clip is -1.0'),
    ({'confidence': 1.0}, 'confidence is 1.0'),
])
def test_wrong_settings_are_refused(model, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        CalibrationSettings(model, 'w8a8', **wrong)


@pytest.mark.parametrize(('policy', 'precision'), [('hold', 'w8a8'), ('libero_panda', 'float')])
def test_a_calibration_where_nothing_takes_one_is_refused(model, contract, policy, precision):
    settings = PolicySettings(model=str(model), precision=precision, calibration='newest')
    with pytest.raises(ValueError, match='calibration'):
        make_policy(policy, contract, settings)
