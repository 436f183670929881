# SPDX-License-Identifier: Apache-2.0
"""From checkpoint and frames to an artifact that the policy serves."""

from dataclasses import replace

import numpy as np
import pytest

from quantvla_ros.calibration import quantize
from quantvla_ros.calibration.policy_runs import action_error, chunks
from quantvla_ros.cli import main
from quantvla_ros.policies import libero_quantized
from quantvla_ros.policies.libero_checkpoint import CheckpointError
from quantvla_ros.policies.libero_program import Stored
from quantvla_ros.policies.sites import libero_vla_sites
from quantvla_ros.quant.artifact import ArtifactError, read_artifact, read_provenance
from quantvla_ros.quant.linear import QuantLinear
from quantvla_ros.quant.simulate import SimulatedLinear
from quantvla_ros.quant.times import read_times


def command(model, frames_path, *more):
    return main(['quantize', str(model), '--frames', str(frames_path), '--one-pass', *more])


def test_artifact_is_served_and_stays_close_to_float(
    model, frames_path, make_policy, observations
):
    assert command(model, frames_path, '--precision', 'w8a8') == 0
    policy, plain = make_policy(precision='w8a8'), make_policy()
    assert isinstance(policy.net.action.blocks[0].mlp.down_proj, Stored)  # in programs, fast
    apart = action_error(chunks(policy, observations), chunks(plain, observations), 8)
    other = action_error(chunks(plain, observations, 99), chunks(plain, observations), 8)
    assert 0 < apart.mean_mrad < 0.2 * other.mean_mrad


def test_scales_of_each_step_are_found_while_denoising(model, frames_path, make_policy):
    assert command(model, frames_path, '--recipe', 'omega_qvla', '--precision', 'w8a8') == 0
    policy = make_policy(precision='omega_qvla-w8a8')
    assert policy.net.action.blocks[0].attn.q_proj.act_scales.numel() == policy.steps
    quick = make_policy(precision='omega_qvla-w8a8', steps=6)
    with pytest.raises(RuntimeError, match='scales for 4 denoising steps'):
        chunks(quick, _one(quick))


def _one(policy):
    from tiny_vla import observe

    return [observe(policy.contract)]


def test_same_seed_gives_the_same_bytes(model, frames_path, tmp_path):
    folders = [tmp_path / 'a', tmp_path / 'b']
    for folder in folders:
        command(model, frames_path, '--out', str(folder), '--precision', 'w4a4')
    for name in ('layers.safetensors', 'artifact.json'):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_provenance_names_checkpoint_frames_and_recipe(model, frames_path):
    command(model, frames_path, '--recipe', 'rtn')
    found = read_provenance(model / 'rtn-w4a8')
    assert (found.recipe, found.precision) == ('rtn', 'w4a8')
    assert len(found.checkpoint) == len(found.frames) == 64
    assert found.measured['action_error_mrad'] > 0


def test_peak_memory_and_errors_are_printed(model, frames_path, capsys):
    command(model, frames_path, '--recipe', 'rtn')
    said = capsys.readouterr().out
    assert 'peak memory' in said and 'mrad' in said and 'another noise seed' in said


def test_interruption_leaves_the_old_artifact(model, frames_path, monkeypatch, capsys):
    command(model, frames_path, '--precision', 'w8a8')
    before = {p.name: p.read_bytes() for p in (model / 'w8a8').iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, 'write_artifact', interrupted)
    assert command(model, frames_path, '--precision', 'w8a8', '--seed', '3') == 130
    assert {p.name: p.read_bytes() for p in (model / 'w8a8').iterdir()} == before
    assert sorted(p.name for p in model.iterdir()) == [
        'model.safetensors', 'policy.json', 'w8a8']
    assert 'is as it was' in capsys.readouterr().err


def test_a_budget_is_kept_and_layers_that_run_at_load_are_served(
    model, frames_path, make_policy, observations
):
    budgets, held = (0.75, 0.95), []
    for mb in budgets:
        command(model, frames_path, '--budget', str(mb))
        layers = read_artifact(model / 'w4a8').layers
        floats = libero_vla_sites(make_policy().net)
        rest = sum(2 * s.parameters for s in floats.linears if s.name not in layers)
        held.append(sum(layer.nbytes for layer in layers.values()) + rest)
        assert held[-1] <= 1e6 * mb
    assert held[1] > held[0]
    assert layers['action.time_out'].scheme.name == 'w8a16'
    off = (make_policy(precision='w4a8').modulation - make_policy().modulation).abs()
    assert 0 < float(off.max()) < 0.02
    assert len(chunks(make_policy(precision='w4a8'), observations[:1])) == 1


def test_time_is_spent_by_times_that_are_measured_once(model, frames_path, tmp_path, capsys):
    path = tmp_path / 'times.json'
    assert command(model, frames_path, '--budget-ms', '1e6', '--times', str(path)) == 0
    times = read_times(path)
    assert all(set(by_width) == {2, 4, 8} for by_width in times.ms.values())
    wide = read_artifact(model / 'w4a8').layers
    assert {layer.scheme.weight_bits for layer in wide.values()} == {8}
    dear = {unit: {2: 1.0, 4: 1.0, 8: 3.0} for unit in times.ms}
    replace(times, ms=dear).write(path)
    capsys.readouterr()
    budget = str(len(dear) + 2.0)  # one unit may be wide
    assert command(model, frames_path, '--budget-ms', budget, '--times', str(path)) == 0
    assert f'at their own widths: {len(dear) + 2:.2f} ms' in capsys.readouterr().out


def test_bytes_and_time_are_not_spent_at_once(model, frames_path, capsys):
    assert command(model, frames_path, '--budget', '1', '--budget-ms', '1') == 2
    assert 'bytes or time, not both' in capsys.readouterr().err


def test_a_budget_for_a_recipe_that_spends_none_is_refused(model, frames_path, capsys):
    assert command(model, frames_path, '--recipe', 'rtn', '--budget', '1') == 2
    assert 'gives every layer the same width' in capsys.readouterr().err


def test_unknown_recipe_is_a_sentence(model, frames_path, capsys):
    assert command(model, frames_path, '--recipe', 'magic') == 2
    assert 'known are' in capsys.readouterr().err


def test_artifact_of_another_checkpoint_is_refused(model, frames_path, make_policy):
    command(model, frames_path, '--recipe', 'rtn', '--out', str(model / 'mine'))
    text = (model / 'mine' / 'artifact.json').read_text()
    sha = read_provenance(model / 'mine').checkpoint
    (model / 'mine' / 'artifact.json').write_text(text.replace(sha, '0' * 64))
    with pytest.raises(ArtifactError, match='was made for checkpoint 000000000000'):
        make_policy(precision='mine')


def test_changed_weights_are_refused(model, frames_path, make_policy):
    command(model, frames_path, '--recipe', 'rtn', '--out', str(model / 'mine'))
    weights = model / 'model.safetensors'
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match='is not the file'):
        make_policy(precision='mine')


def test_unknown_precision_lists_the_artifacts(model, frames_path, make_policy):
    command(model, frames_path, '--recipe', 'rtn', '--out', str(model / 'mine'))
    with pytest.raises(ValueError, match='known are float, bfloat16, mine;'):
        make_policy(precision='yours')


def test_no_float_copy_of_a_quantized_layer_is_kept(model, frames_path, make_policy):
    command(model, frames_path, '--recipe', 'rtn', '--precision', 'w4a8')
    floats = sum(p.numel() for p in make_policy().net.parameters())
    left = sum(p.numel() for p in make_policy(precision='rtn-w4a8').net.parameters())
    assert left < 0.4 * floats


def test_simulated_policy_agrees_with_the_integer_one(
    model, frames_path, contract, observations, monkeypatch
):
    """A token that falls on the other side of a step moves a chunk by a part of what rounding
    does; where none does, only float sums differ."""
    from quantvla_ros.policies.base import PolicySettings
    from quantvla_ros.policies.libero_panda import LiberoVla
    from quantvla_ros.policies.libero_quantized import read_quantized

    command(model, frames_path, '--precision', 'w4a8')
    settings = PolicySettings(model=str(model), precision='w4a8')
    recorded = LiberoVla(contract, settings)
    monkeypatch.setattr(libero_quantized, 'recordable', lambda layers: False)
    exact = LiberoVla(contract, settings)
    assert isinstance(exact.net.action.blocks[0].mlp.down_proj, QuantLinear)
    checkpoint, net, *_ = read_quantized(model, 'w4a8', device='cuda')  # layers only; stays here
    assert isinstance(net.backbone.blocks[0].attn.q_proj, SimulatedLinear)
    near = LiberoVla.around(contract, PolicySettings(), checkpoint, net)
    off = action_error(chunks(near, observations), chunks(exact, observations), 8)
    plain = LiberoVla(contract, PolicySettings(model=str(model)))
    away = action_error(chunks(plain, observations), chunks(exact, observations), 8)
    assert off.mean_mrad < 0.05 * away.mean_mrad
    assert off.frames.min() < 1e-3
    quick = action_error(chunks(recorded, observations), chunks(exact, observations), 8)
    assert quick.mean_mrad < 0.1 * away.mean_mrad


def test_gripper_flips_are_counted_apart():
    reference = np.zeros((1, 4, 3))
    found = reference.copy()
    found[0, 0, 0], found[0, 1, 2] = 0.004, 1.0
    error = action_error(found, reference, 4)
    assert error.mean_mrad == pytest.approx(0.5)
    assert error.gripper == pytest.approx(0.25)


def test_rounding_to_nearest_needs_no_frames_and_is_made_once(model, contract, observations,
                                                              tmp_path, monkeypatch):
    from quantvla_ros.calibration.pipeline import nearest_artifact
    from quantvla_ros.policies.base import PolicySettings
    from quantvla_ros.policies.libero_panda import LiberoVla

    monkeypatch.setenv('QUANTVLA_CACHE', str(tmp_path))
    folder = nearest_artifact(model, 'w8a8')
    made = (folder / 'artifact.json').stat().st_mtime_ns
    assert nearest_artifact(model, 'w8a8') == folder
    assert (folder / 'artifact.json').stat().st_mtime_ns == made
    settings = PolicySettings(model=str(model), precision=str(folder))
    near = LiberoVla(contract, settings)
    plain = LiberoVla(contract, PolicySettings(model=str(model)))
    off = action_error(chunks(near, observations), chunks(plain, observations), 8)
    other = action_error(chunks(plain, observations, 99), chunks(plain, observations), 8)
    assert 0 < off.mean_mrad < 0.2 * other.mean_mrad


def test_a_recipe_that_needs_frames_is_refused_without_them(model):
    from quantvla_ros.calibration.pipeline import quantize_unseen
    from quantvla_ros.policies.libero_checkpoint import read_checkpoint
    from quantvla_ros.quant.recipes import RECIPES
    from quantvla_ros.quant.scheme import parse_scheme

    assert [name for name, recipe in RECIPES.items() if not recipe.needs_frames] == ['rtn']
    with pytest.raises(ValueError, match='needs calibration frames'):
        quantize_unseen(read_checkpoint(model)[1], RECIPES['gptq'], parse_scheme('w4a8'))
