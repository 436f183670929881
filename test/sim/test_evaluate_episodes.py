# SPDX-License-Identifier: Apache-2.0
"""The lockstep loop and its bookkeeping, on a world whose every move is known."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import load_contract
from quantvla_ros.policies.vocabulary import UnknownWords
from quantvla_ros.sim import episodes, players
from quantvla_ros.sim.episodes import CLOSE, OPEN, Disturbance, Episode, Settings, Variant, play

CONTRACT = load_contract('libero_panda')
EPISODE = Episode(Variant(), 'libero_object', 3, 17, cap=40)


class ReachWorld:
    """An arm that goes where it is told; the goal is its first joint above `goal`."""

    scene = SimpleNamespace(instruction='go up')

    def __init__(self, goal=1.0):
        self.goal, self.commands = goal, []

    def reset_official(self, start):
        self.start, self.q = start, np.zeros(7)

    def step(self, target, gripper):
        self.q = np.array(target)
        self.commands.append((np.array(target), gripper))

    def success(self):
        return self.q[0] > self.goal

    def joint_state(self):
        return np.r_[self.q, 0.04, -0.04]

    def render(self, camera, size=128):
        return np.full((128, 128, 3), 7, np.uint8)

    def close(self):
        pass


def climb(by=0.01, gripper=0.04, seeds=None):
    """A policy that raises the first joint a little at each step."""

    def act(episode, observation, seed):
        if seeds is not None:
            seeds.append(seed)
        positions = np.zeros((16, 8))
        positions[:, 0] = observation.joint_positions[0] + by * np.arange(1, 17)
        positions[:, -1] = gripper
        return ActionChunk(CONTRACT.action.joints, positions, observation.stamp_ns, 0.05)

    return act


def run(world, act, settings=Settings(), episode=EPISODE):  # noqa: B008
    return play(world, episode, settings, CONTRACT, 'go up', act)


def test_success_ends_the_episode_at_once():
    world = ReachWorld(goal=0.095)
    outcome = run(world, climb())
    assert (outcome.status, outcome.steps, outcome.chunks) == ('success', 10, 2)
    assert len(world.commands) == 10
    assert outcome.frame is None


def test_the_cap_ends_the_episode_as_a_failure_with_its_last_frames():
    outcome = run(ReachWorld(goal=9.0), climb(), episode=replace(EPISODE, cap=21))
    assert (outcome.status, outcome.steps, outcome.chunks) == ('failure', 21, 3)
    assert outcome.frame.shape == (128, 256, 3)


def test_execute_says_how_much_of_a_chunk_is_used():
    outcome = run(ReachWorld(goal=9.0), climb(), Settings(execute=5))
    assert outcome.chunks == 8


def test_gripper_positions_become_the_worlds_commands():
    for position, command in ((0.04, OPEN), (0.0, CLOSE), (0.019, CLOSE), (0.021, OPEN)):
        world = ReachWorld(goal=9.0)
        run(world, climb(gripper=position))
        assert {gripper for _, gripper in world.commands} == {command}


def test_noise_is_the_same_for_every_variant_and_new_for_every_chunk():
    float_seeds, other_seeds, other_start = [], [], []
    run(ReachWorld(9.0), climb(seeds=float_seeds))
    other = replace(EPISODE, variant=Variant('w4a4', 2))
    run(ReachWorld(9.0), climb(seeds=other_seeds), episode=other)
    run(ReachWorld(9.0), climb(seeds=other_start), episode=replace(EPISODE, start=18))
    assert float_seeds == other_seeds
    assert len(set(float_seeds)) == len(float_seeds) == 5
    assert not set(float_seeds) & set(other_start)


def test_seeds_are_pinned():
    """Another formula would silently unpair old and new results."""
    assert episodes.seed_of('flow', 0, 'libero_object/3/17', 0) == 2413613878656969013


def test_a_crash_is_a_crash_and_not_a_failure():
    def broken(episode, observation, seed):
        raise RuntimeError('cable fell out')

    outcome = run(ReachWorld(), broken)
    assert outcome.status == 'crashed'
    assert 'RuntimeError: cable fell out' in outcome.error


def test_an_unknown_instruction_is_refused_and_not_a_crash():
    def refuses(episode, observation, seed):
        raise UnknownWords('does not know spoon')

    outcome = run(ReachWorld(), refuses)
    assert (outcome.status, outcome.error) == ('refused', 'does not know spoon')


def test_an_unknown_precision_is_refused_and_not_a_crash(monkeypatch):
    monkeypatch.setattr(players, 'make_task', lambda settings, episode: ReachWorld())
    with pytest.raises(ValueError, match='w9a9'):
        players.Player(Settings()).play(replace(EPISODE, variant=Variant('w9a9')))


def test_command_noise_has_the_asked_size_and_is_paired():
    quiet, noisy, again = ReachWorld(9.0), ReachWorld(9.0), ReachWorld(9.0)
    settings = Settings(noise_rad=0.02)
    episode = replace(EPISODE, cap=400)
    run(quiet, climb(by=0.0), episode=episode)
    run(noisy, climb(by=0.0), settings, episode)
    run(again, climb(by=0.0), settings, replace(episode, variant=Variant('w4a8')))
    targets = [np.array([t for t, _ in w.commands]) for w in (quiet, noisy, again)]
    assert np.array_equal(targets[1], targets[2])
    assert targets[0][:, 1:].std() == 0
    assert targets[1][:, 1:].std() == pytest.approx(0.02, rel=0.1)


def test_a_slip_opens_the_gripper_once_after_it_has_closed():
    disturb = Disturbance(Settings(slip=True), EPISODE)
    wanted = [OPEN] * 5 + [CLOSE] * 60 + [OPEN] * 5 + [CLOSE] * 40
    sent = [disturb(np.zeros(7), gripper)[1] for gripper in wanted]
    changed = [i for i, (a, b) in enumerate(zip(wanted, sent, strict=True)) if a != b]
    first = 5 + episodes.SLIP_AFTER_STEPS
    assert changed == list(range(first, first + episodes.SLIP_STEPS))


@pytest.mark.parametrize(
    ('suite', 'cap'),
    [('libero_spatial', 220), ('libero_object_swap', 280), ('libero_10', 520), ('libero_90', 400)],
)
def test_step_caps_are_the_papers(suite, cap):
    assert episodes.cap_of(suite) == cap


def test_a_contract_of_another_rate_is_refused():
    other = replace(CONTRACT, action=replace(CONTRACT.action, rate_hz=30.0))
    with pytest.raises(ValueError, match='rate_hz is 30.0; the world steps at 20.0'):
        episodes.check_contract(other, Settings())


def test_a_player_stays_with_its_task_and_helps_where_most_is_left():
    found = [Episode(Variant(), 'libero_object', t, s, 9) for t in (0, 1) for s in range(4)]
    queue = players.Queue(found)
    assert queue.next('').task == 0
    assert queue.next('').task == 1
    mine = [queue.next('libero_object_0').task for _ in range(3)]
    assert mine == [0, 0, 0]
    assert queue.next('libero_object_0').task == 1
    assert [queue.next('libero_object_1').task for _ in range(2)] == [1, 1]
    assert queue.next('libero_object_1') is None


def test_a_short_batch_is_padded_to_the_fixed_size():
    sizes = []

    class Policy:
        def chunks(self, observations, seeds):
            sizes.append(len(observations))
            return list(zip(observations, seeds, strict=True))

    inference = players.BatchedInference(Settings(batch=4))
    inference._policies[Variant()] = Policy()
    asked = [(f'seen {n}', n) for n in range(6)]
    assert inference.chunks(Variant(), asked) == asked
    assert sizes == [4, 4]


def test_unknown_words_of_one_player_leave_the_chunks_of_the_others():
    class Policy:
        def chunks(self, observations, seeds):
            if any('spoon' in seen.instruction for seen in observations):
                raise UnknownWords('does not know spoon')
            return [f'chunk {seed}' for seed in seeds]

    inference = players.BatchedInference(Settings(batch=2))
    inference._policies[Variant()] = Policy()
    asked = [(SimpleNamespace(instruction=text), seed)
             for seed, text in enumerate(('go up', 'take a spoon', 'go up'))]
    first, second, third = inference.answers(Variant(), asked)
    assert (first, third) == ('chunk 0', 'chunk 2')
    assert isinstance(second, UnknownWords) and 'spoon' in str(second)
