# SPDX-License-Identifier: Apache-2.0
"""Training at tiny size: it learns, it resumes to the same state, what it exports loads back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from quantvla_ros.policies.libero_checkpoint import read_checkpoint
from quantvla_ros.policies.libero_vla import VlaConfig
from quantvla_ros.policies.vocabulary import Vocabulary
from quantvla_ros.training.dataset import load_demonstrations, statistics_of
from quantvla_ros.training.demonstrations import FRAME_EVERY, Demonstration
from quantvla_ros.training.fit import FitSettings, Trainer, export, fit
from quantvla_ros.training.objective import augment, to_network
from quantvla_ros.training.store import frames_path, read_episodes, write_episodes

SIZES = {'image': 32, 'vision_width': 64, 'vision_layers': 1, 'vision_mlp': 64, 'width': 64,
         'layers': 1, 'heads': 1, 'kv_heads': 1, 'mlp': 64, 'action_width': 64,
         'action_layers': 1, 'action_heads': 1, 'action_kv_heads': 1, 'action_mlp': 64}
TEXTS = {'libero_goal_8': 'put the bowl on the plate'}
STEPS = 31


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_episode(seed: int) -> Demonstration:
    rng = np.random.default_rng(seed)
    states = rng.uniform(-1, 1, (STEPS, 9))
    commands = np.concatenate([states[:, :7] + 0.1, np.where(rng.random((STEPS, 1)) > 0.5, 1, -1)],
                              axis=1)
    qpos = rng.uniform(-1, 1, (len(range(0, STEPS, FRAME_EVERY)), 12))
    fixtures = {'stove_1': (rng.uniform(-1, 1, 3), np.array([1.0, 0, 0, 0]))}
    return Demonstration('libero_goal_8', 'none', fixtures, qpos, states, commands)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        path = tmp_path / f'libero_goal_8_0_{number:05d}.npz'
        episodes = [make_episode(2 * number), make_episode(2 * number + 1)]
        write_episodes(path, 'libero_goal_8', episodes)
        frames = sum(len(episode.qpos) for episode in episodes)
        rng = np.random.default_rng(number)
        np.save(frames_path(path), rng.integers(0, 255, (frames, 2, 32, 32, 3), dtype=np.uint8))
    return tmp_path


def make_trainer(folder: Path, **changes: object) -> tuple[Trainer, Vocabulary]:
    vocabulary = Vocabulary.of(TEXTS.values(), 20)
    device = torch.device('cpu')
    data = load_demonstrations([folder], TEXTS, vocabulary, device)
    settings = FitSettings(**{'steps': 12, 'batch': 8, 'draws': 2, 'rate': 3e-3, 'warm_up': 2,
                              'log_every': 6, 'bfloat16': False, **changes})  # type: ignore[arg-type]
    config = VlaConfig(**SIZES)
    return Trainer(config, data, statistics_of(data, config.chunk), settings, device), vocabulary


def test_loss_is_finite_and_falls(folder):
    trainer, _ = make_trainer(folder)
    losses = [float(trainer.learn(0.1)) for _ in range(30)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-6:]) < 0.85 * np.mean(losses[:3])


def test_resuming_gives_the_state_that_was_saved(folder, tmp_path):
    whole, _ = make_trainer(folder)
    for _ in range(3):
        whole.learn(0.2)
    whole.save(tmp_path / 'fit')
    rest = [float(whole.learn(0.2)) for _ in range(3)]
    resumed, _ = make_trainer(folder)
    resumed.load(tmp_path / 'fit')
    assert [float(resumed.learn(0.2)) for _ in range(3)] == rest
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name


def test_one_gradient_that_is_not_finite_does_not_end_a_training(folder):
    trainer, _ = make_trainer(folder)
    whole = trainer.loss
    trainer.learn(0.0)
    trainer.loss = lambda *batch: whole(*batch) * float('nan')
    trainer.learn(0.0)
    trainer.loss = whole
    assert bool(trainer.learn(0.0).isfinite())
    assert int(trainer.skipped) == 1
    assert all(bool(weight.isfinite().all()) for weight in trainer.net.parameters())


def test_an_export_is_accepted_by_the_strict_loader(folder, tmp_path):
    trainer, vocabulary = make_trainer(folder)
    fit(trainer, tmp_path / 'fit', lambda line: None)
    export(trainer, vocabulary, 'libero_panda', tmp_path / 'model')
    checkpoint, net = read_checkpoint(tmp_path / 'model')
    assert checkpoint.vocabulary.words == vocabulary.words
    for name, value in trainer.average.state_dict().items():
        assert torch.equal(value.half().float(), net.state_dict()[name]), name


def test_labels_follow_the_episode_and_stop_at_its_end(folder):
    trainer, _ = make_trainer(folder)
    data = trainer.data
    state, action = data.labels(torch.tensor([0, 10]), 16)
    episode = read_episodes(sorted(folder.glob('*.npz'))[0])[0]
    np.testing.assert_allclose(state[0], episode.states[0], atol=1e-6)
    np.testing.assert_allclose(action[0, 5, :7],
                               episode.commands[5, :7] - episode.states[0, :7], atol=1e-5)
    np.testing.assert_allclose(action[1, -1, 7], episode.commands[-1, 7], atol=1e-5)


def test_held_out_episodes_are_never_drawn(folder):
    trainer, _ = make_trainer(folder)
    assert trainer.data.held_out.any()
    assert not trainer.data.held_out[trainer.train_frames].any()


def test_stored_episodes_come_back_within_half_a_quantum(folder):
    for index, path in enumerate(sorted(folder.glob('*.npz'))):
        for number, episode in enumerate(read_episodes(path)):
            true = make_episode(2 * index + number)
            np.testing.assert_allclose(episode.qpos, true.qpos, atol=6.3e-5)
            np.testing.assert_allclose(episode.commands, true.commands, atol=6.3e-5)
            np.testing.assert_array_equal(episode.fixtures['stove_1'][0],
                                          true.fixtures['stove_1'][0])


def test_augmented_frames_stay_frames():
    ramp = torch.linspace(0, 255, 32)
    images = ((ramp[:, None] + ramp) / 2)[None, None, :, :, None].expand(4, 2, 32, 32, 3)
    images = images.to(torch.uint8)
    seen = augment(images)
    assert seen.shape == to_network(images).shape
    assert seen.min() >= -1 and seen.max() <= 1
    assert 0 < (seen - to_network(images)).abs().mean() < 0.4


def test_what_is_left_out_is_left_out(folder):
    plain, _ = make_trainer(folder, augment=False, state_noise=False, ema=0.0)
    images, _, state, _ = plain.draw()
    known = to_network(plain.data.images)
    assert all(any(torch.equal(image, frame) for frame in known) for image in images)
    every = plain.data.labels(torch.arange(len(known)), plain.net.config.chunk)
    truth, _ = plain.normalize(*every)
    assert all(any(torch.equal(one, row) for row in truth) for one in state)
    plain.learn(0.1)
    for name, value in plain.net.state_dict().items():
        assert torch.equal(value, plain.average.state_dict()[name]), name


def test_only_episodes_of_the_asked_kinds_are_drawn(folder):
    vocabulary = Vocabulary.of(TEXTS.values(), 20)
    first = sorted(folder.glob('*.npz'))[1]
    episodes = read_episodes(first)
    write_episodes(first, 'libero_goal_8', [replace(episodes[0], kind='dropped'), episodes[1]])
    data = load_demonstrations(
        [folder], TEXTS, vocabulary, torch.device('cpu'), kinds=('none', 'elsewhere'))
    frames = len(episodes[0].qpos)
    assert (data.weight == 0).sum() == frames
    assert (data.weight[2 * frames : 3 * frames] == 0).all()
