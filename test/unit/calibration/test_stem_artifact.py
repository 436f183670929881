# SPDX-License-Identifier: Apache-2.0
"""Artifacts with the convolutional stem, without it, and with a part of it."""

import numpy as np
import pytest

from quantvla_ros.calibration.pipeline import nearest_artifact, quantize_unseen
from quantvla_ros.calibration.policy_runs import chunks
from quantvla_ros.kernels.windows import WindowLinear
from quantvla_ros.policies.libero_checkpoint import read_checkpoint
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import ArtifactError, Provenance, read_artifact, write_artifact
from quantvla_ros.quant.convolutions import convolution_layers
from quantvla_ros.quant.recipes import find_recipe
from quantvla_ros.quant.scheme import parse_scheme


def write(model, name, left_out=()):
    checkpoint, net = read_checkpoint(model)
    layers = {**convolution_layers(net, libero_vla_sites(net)),
              **quantize_unseen(net, find_recipe('rtn'), parse_scheme('w8a8'))}
    kept = {n: layer for n, layer in layers.items() if not n.startswith(tuple(left_out))}
    write_artifact(model / name, kept, Provenance(checkpoint.sha256, 'rtn', 'w8a8'))


def test_an_artifact_holds_the_stem_and_serves_it_on_integers(model, make_policy, monkeypatch,
                                                              tmp_path):
    monkeypatch.setenv('QUANTVLA_CACHE', str(tmp_path))
    folder = nearest_artifact(model, 'w4a8')
    held = read_artifact(folder).layers
    assert {n: held[n].scheme.name for n in held if n.startswith('vision.convs')} == dict.fromkeys(
        ('vision.convs.0', 'vision.convs.1', 'vision.convs.2'), 'w8a8')
    policy = make_policy(precision=str(folder))
    assert isinstance(policy.net.vision.patch, WindowLinear) and policy.program is not None


def test_an_artifact_without_the_stem_serves_it_in_float(model, make_policy, observations):
    write(model, 'whole')
    write(model, 'old', ['vision.convs', 'vision.patch'])
    old, whole = make_policy(precision='old'), make_policy(precision='whole')
    assert not isinstance(old.net.vision.patch, WindowLinear) and old.program is not None
    made = [chunks(policy, observations[:2]) for policy in (old, whole, make_policy())]
    assert 0 < np.abs(made[0] - made[1]).max() < 0.02
    assert np.abs(made[0] - made[2]).max() < 0.02 and np.abs(made[1] - made[2]).max() < 0.02


def test_an_artifact_with_a_part_of_the_stem_is_refused(model, make_policy):
    write(model, 'part', ['vision.convs.1'])
    with pytest.raises(ArtifactError, match=r'lacks vision\.convs\.1; quantize this model again'):
        make_policy(precision='part')
