# SPDX-License-Identifier: Apache-2.0
"""The shipped policy from outside: one door for units, the same chunk for the same seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_vla import observe, tiny_checkpoint

from quantvla_ros.action import NS_PER_S, ActionChunk
from quantvla_ros.policies import flow
from quantvla_ros.policies.base import PolicySettings, make_policy
from quantvla_ros.policies.libero_graph import RecordedChunks
from quantvla_ros.policies.libero_panda import Door
from quantvla_ros.resources import share_path


def make(folder, contract, **settings):
    return make_policy('libero_panda', contract, PolicySettings(model=str(folder), **settings))


@pytest.fixture
def policy(folder, contract):
    return make(folder, contract)


def test_same_observation_and_seed_give_the_same_chunk(policy, contract):
    chunks = [policy.denoise(policy.prepare(observe(contract)), seed=5) for _ in range(2)]
    assert np.array_equal(chunks[0].positions, chunks[1].positions)


def test_another_seed_gives_another_chunk(policy, contract):
    context = policy.prepare(observe(contract))
    one, two = policy.denoise(context, seed=5), policy.denoise(context, seed=6)
    assert not np.array_equal(one.positions, two.positions)


def test_chunk_starts_at_the_observation_and_names_the_joints(policy, contract):
    chunk = policy.denoise(policy.prepare(observe(contract)), seed=0)
    assert chunk.stamp_ns == 10
    assert chunk.joint_names == contract.action.joints
    assert chunk.positions.shape == (16, 8)
    assert chunk.step_dt_s == pytest.approx(0.05)


def test_gripper_is_either_open_or_closed(policy, contract):
    chunk = policy.denoise(policy.prepare(observe(contract)), seed=0)
    gripper = contract.gripper
    assert set(chunk.positions[:, -1]) <= {gripper.open_position, gripper.closed_position}


def test_joint_order_of_the_robot_does_not_matter(policy, contract):
    seen = observe(contract)
    order = np.random.default_rng(1).permutation(len(seen.joint_names))
    mixed = replace(
        seen,
        joint_names=tuple(seen.joint_names[i] for i in order),
        joint_positions=seen.joint_positions[order],
    )
    one = policy.denoise(policy.prepare(seen), seed=1)
    two = policy.denoise(policy.prepare(mixed), seed=1)
    assert np.array_equal(one.positions, two.positions)


def test_door_comes_back_to_where_it_started(contract):
    """SI -> normalised -> SI, for targets on both sides of the gripper's middle."""
    door = Door(tiny_checkpoint(), contract)
    random = np.random.default_rng(0)
    state = random.normal(size=9)
    targets = random.normal(size=(16, 8))
    targets[:, -1] = np.where(random.random(16) > 0.5, 0.04, 0.0)
    back = door.chunk(door.normalize_action(targets, state), state, 0)
    assert_allclose(back.positions, targets, atol=1e-6)


def test_value_above_zero_closes_the_gripper(contract):
    checkpoint = tiny_checkpoint()
    door = Door(checkpoint, contract)
    for value, expected in ((0.01, contract.gripper.closed_position), (-0.01, 0.04)):
        raw = (np.full((16, 8), value) - checkpoint.statistics.action_mean)
        chunk = door.chunk(raw / checkpoint.statistics.action_std, np.zeros(9), 0)
        assert (chunk.positions[:, -1] == expected).all()


def test_fewer_steps_is_a_setting(folder, contract):
    assert make(folder, contract).steps == 4
    two = make(folder, contract, steps=2)
    assert two.modulation.shape[0] == 2
    assert two.denoise(two.prepare(observe(contract)), seed=0).positions.shape == (16, 8)


def test_bfloat16_stays_near_float(folder, contract):
    one, two = make(folder, contract), make(folder, contract, precision='bfloat16')
    chunks = [p.denoise(p.prepare(observe(contract)), seed=0).positions for p in (one, two)]
    assert 0 < np.abs(chunks[0] - chunks[1])[:, :7].max() < 0.05


def test_prefix_pulls_the_first_steps(policy, contract):
    context = policy.prepare(observe(contract))
    free = policy.denoise(context, seed=0)
    wanted = free.positions + np.r_[np.full(7, 0.2), 0.0]
    prefix = ActionChunk(free.joint_names, wanted[:8], free.stamp_ns, free.step_dt_s)
    pulled = policy.denoise(context, seed=0, prefix=prefix)
    before = np.abs(free.positions - wanted)[:4, :7].mean()
    after = np.abs(pulled.positions - wanted)[:4, :7].mean()
    assert after < 0.5 * before
    assert not np.array_equal(pulled.positions[:8], free.positions[:8])


def test_prefix_of_the_past_changes_nothing(policy, contract):
    context = policy.prepare(observe(contract))
    free = policy.denoise(context, seed=0)
    past = ActionChunk(
        free.joint_names, free.positions + 1.0, free.stamp_ns - 2 * NS_PER_S, free.step_dt_s
    )
    assert np.array_equal(policy.denoise(context, 0, past).positions, free.positions)


def test_prefix_of_other_joints_is_refused(policy, contract):
    context = policy.prepare(observe(contract))
    other = ActionChunk(('elbow',), np.zeros((4, 1)), 10, 0.05)
    with pytest.raises(ValueError, match='the prefix moves elbow; expected panda_joint1'):
        policy.denoise(context, 0, other)


def test_batch_gives_what_each_would_get_alone(policy, contract):
    seen = [observe(contract, seed=k) for k in range(3)]
    together = policy.denoise_batch(policy.prepare_batch(seen), [4, 5, 6])
    for one, seed, chunk in zip(seen, (4, 5, 6), together, strict=True):
        alone = policy.denoise(policy.prepare(one), seed)
        assert_allclose(chunk.positions, alone.positions, atol=1e-5)


def test_recorded_chunks_are_those_of_the_separate_calls(policy, contract):
    seen, seeds = [observe(contract, seed=k) for k in range(3)], [4, 5, 6]
    wanted = policy.denoise_batch(policy.prepare_batch(seen), seeds)
    tensors, states = policy._inputs(seen)
    shape = (policy.config.chunk, policy.config.action)
    start = torch.from_numpy(np.stack([flow.noise(seed, shape) for seed in seeds]))
    other = [torch.zeros_like(tensor) for tensor in (*tensors, start)]
    recorded = RecordedChunks(policy._chunk_of, other)
    found = policy._leave(recorded(*tensors, start), states, [10, 10, 10])
    for one, chunk, plain in zip(found, wanted, policy.chunks(seen, seeds), strict=True):
        assert_allclose(one.positions, chunk.positions, atol=1e-6)
        assert_allclose(plain.positions, chunk.positions, atol=1e-6)


def test_unknown_words_are_refused(policy, contract):
    with pytest.raises(ValueError, match="does not know 'lift'.*Known words: cup, on, plate"):
        policy.prepare(observe(contract, instruction='lift the cup'))


def test_camera_of_another_size_is_refused(policy, contract):
    with pytest.raises(ValueError, match="camera 'agentview' is 64x64; the policy reads 32x32"):
        policy.prepare(observe(contract, image=64))


def test_missing_camera_and_joint_are_named(policy, contract):
    seen = observe(contract)
    images = {'agentview': seen.images['agentview']}
    with pytest.raises(ValueError, match='lacks camera wrist'):
        policy.prepare(replace(seen, images=images, image_stamps_ns={'agentview': 10}))
    with pytest.raises(ValueError, match='lacks joint panda_finger_joint2'):
        policy.prepare(replace(
            seen, joint_names=seen.joint_names[:8], joint_positions=seen.joint_positions[:8]
        ))


def test_contract_that_does_not_fit_is_refused_with_all_reasons(folder, contract):
    action = replace(contract.action, horizon=12, execute=4, kind='delta')
    with pytest.raises(ValueError) as refusal:
        make(folder, replace(contract, action=action, policy='other'))
    for sentence in (
        "policy is 'other'; the checkpoint needs 'libero_panda'",
        'action.horizon is 12; the checkpoint needs 16',
        "action.kind is 'delta'; the checkpoint needs 'absolute'",
    ):
        assert sentence in str(refusal.value)


def test_unknown_precision_is_refused(folder, contract):
    with pytest.raises(ValueError, match="precision 'w1a1' is unknown"):
        make(folder, contract, precision='w1a1')


# -- the weights that ship ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def shipped(contract):
    """Fails, and does not skip, where the weights are absent: the package ships them."""
    assert (share_path('models/libero_panda') / 'model.safetensors').is_file()
    return make_policy('libero_panda', contract, PolicySettings())


def test_shipped_policy_is_20_to_40_million_weights_in_64_megabytes(shipped):
    assert 20e6 <= shipped.net.parameter_count <= 40e6
    assert (share_path('models/libero_panda') / 'model.safetensors').stat().st_size < 64 * 2**20


def test_shipped_policy_knows_the_default_instruction_and_stays_near_the_arm(shipped, contract):
    seen = observe(contract, image=128, instruction=contract.instruction)
    home = shipped.door.statistics.state_mean
    chunk = shipped.denoise(shipped.prepare(replace(seen, joint_positions=home)), seed=0)
    assert np.abs(chunk.positions[:, :7] - home[:7]).max() < 2.0
    assert np.isfinite(chunk.positions).all()
