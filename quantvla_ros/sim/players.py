# SPDX-License-Identifier: Apache-2.0
"""Who plays the episodes: this process, several processes, or the actors of a Ray cluster.

A Player holds one world and the policies of all variants. Without batching every player computes
its own chunks, one at a time on one thread, so the outcome of an episode does not depend on how
many players there are or where they run. With batching one process computes for all of them,
padded to a fixed batch, so that a chunk does not depend on who else asked.
"""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from quantvla_ros.action import ActionChunk
from quantvla_ros.contract import load_contract
from quantvla_ros.observation import Observation
from quantvla_ros.policies.base import Policy, PolicySettings, make_policy
from quantvla_ros.policies.vocabulary import UnknownWords
from quantvla_ros.sim.episodes import Act, Episode, Outcome, Settings, Variant, Watch, play
from quantvla_ros.sim.gpus import computes_on, renders_on, visible_gpus
from quantvla_ros.sim.lighting import parse_lighting

PATIENCE_S = 0.015  # how long a batch waits for the next one to join; a small batch costs as much
MAX_DEATHS = 8
GRACE_S = 10.0  # for a player to free what it holds


def load_policy(settings: Settings, variant: Variant, threads: int) -> Policy:
    """Make the policy of one variant."""
    made_with = PolicySettings(
        model=settings.model,
        precision=variant.precision,
        calibration=variant.calibration,
        device=settings.device,
        steps=variant.steps,
        threads=threads,
    )
    return make_policy(settings.policy, load_contract(settings.contract), made_with)


class Player:
    """Plays one episode after another and keeps what the next one can use."""

    def __init__(self, settings: Settings, act: Act | None = None) -> None:
        self.settings = settings
        self.contract = load_contract(settings.contract)
        self._alone, self._act = act is None, act or self._act_here
        self._policies: dict[Variant, Policy] = {}
        self._world: Any = None
        self._task = ''

    def play(self, episode: Episode, watch: Watch | None = None) -> Outcome:
        """Play one episode; an exception becomes a crashed outcome.

        Raises ValueError for a task or a policy that cannot be had, which is for the user to mend.
        """
        world = self._world_of(episode)
        if self._alone:
            self._policy(episode.variant)  # a precision that is unknown is no crash
        text = world.scene.instruction
        return play(world, episode, self.settings, self.contract, text, self._act, watch)

    def close(self) -> None:
        """Free the world, and the GL context with it."""
        if self._world is not None:
            self._world.close()
        self._world, self._task = None, ''

    def _world_of(self, episode: Episode) -> Any:
        if self._task != episode.task_name:
            self.close()
            self._world, self._task = make_task(self.settings, episode), episode.task_name
        return self._world

    def _policy(self, variant: Variant) -> Policy:
        if variant not in self._policies:
            self._policies[variant] = load_policy(self.settings, variant, 1)
        return self._policies[variant]

    def _act_here(self, episode: Episode, observation: Observation, seed: int) -> ActionChunk:
        policy = self._policy(episode.variant)
        return policy.denoise(policy.prepare(observation), seed)


def make_task(settings: Settings, episode: Episode) -> Any:
    """Return the world of an episode."""
    if settings.real:
        from quantvla_ros.sim.robosuite_world import RobosuiteWorld

        return RobosuiteWorld(episode.suite, episode.task)
    from quantvla_ros.sim.world import make_world

    return make_world(episode.suite, episode.task, settings.max_texture,
                      parse_lighting(settings.lighting))


class Queue:
    """Episodes still to be played; a player stays with the task whose world it has loaded."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        self._waiting: dict[str, list[Episode]] = {}
        for episode in episodes:
            self._waiting.setdefault(episode.task_name, []).append(episode)
        self._players: dict[str, int] = {}

    def next(self, task: str) -> Episode | None:
        """Return an episode for a player that has `task` loaded ('' for none)."""
        if not self._waiting.get(task):
            if task in self._players:
                self._players[task] -= 1
            if not self._waiting:
                return None
            # the task with the most episodes left for each player that is at it already
            task = max(
                self._waiting,
                key=lambda name: len(self._waiting[name]) / (1 + self._players.get(name, 0)),
            )
            self._players[task] = self._players.get(task, 0) + 1
        episode = self._waiting[task].pop(0)
        if not self._waiting[task]:
            del self._waiting[task]
        return episode


class BatchedInference:
    """Computes the chunks of all players at once, in batches of one fixed size per variant."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._policies: dict[Variant, Any] = {}

    def chunks(
        self, variant: Variant, asked: Sequence[tuple[Observation, int]]
    ) -> list[ActionChunk]:
        """Return one chunk for each question; the last one pads a batch that is not full."""
        if variant not in self._policies:
            self._policies[variant] = load_policy(self.settings, variant, 0)
        policy = self._policies[variant]
        if not hasattr(policy, 'chunks'):
            raise ValueError(f'policy {self.settings.policy!r} has no batches; use --batch 1')
        size, found = self.settings.batch, []
        for first in range(0, len(asked), size):
            part = list(asked[first : first + size])
            full = part + [part[-1]] * (size - len(part))
            observations, seeds = zip(*full, strict=True)
            found += policy.chunks(observations, seeds)[: len(part)]
        return found

    def answers(
        self, variant: Variant, asked: Sequence[tuple[Observation, int]]
    ) -> list[ActionChunk | UnknownWords]:
        """Return chunks, or what the policy says of an instruction it does not know."""
        try:
            return list(self.chunks(variant, asked))
        except UnknownWords as error:
            texts = [observation.instruction for observation, _ in asked]
            if len(set(texts)) == 1:
                return [error] * len(asked)
        found: dict[int, ActionChunk | UnknownWords] = {}
        for text in dict.fromkeys(texts):
            who = [k for k, other in enumerate(texts) if other == text]
            found.update(zip(who, self.answers(variant, [asked[k] for k in who]), strict=True))
        return [found[k] for k in range(len(asked))]


def _serve(connection: Connection, settings: Settings) -> None:
    """Run one player process: episodes in, outcomes and questions out."""

    def ask(episode: Episode, observation: Observation, seed: int) -> ActionChunk:
        connection.send(('ask', episode.variant, observation, seed))
        answer = connection.recv()
        if isinstance(answer, UnknownWords):
            raise answer
        return answer

    player = Player(settings, ask if settings.batch > 1 else None)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # who asked has ended
        while (episode := connection.recv()) is not None:
            try:
                connection.send(('done', player.play(episode)))
            except ValueError as error:
                connection.send(('refused', str(error)))
    player.close()  # while the GL library is whole: at exit it may not be


class _Worker:
    """One player process and what it is at."""

    def __init__(self, settings: Settings, index: int) -> None:
        context = mp.get_context('spawn')
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_serve, args=(theirs, settings), daemon=True
        )
        with renders_on(index):
            self.process.start()
        theirs.close()
        self.episode: Episode | None = None

    def give(self, episode: Episode | None) -> None:
        """Send the next episode, or tell the process to end."""
        self.episode = episode
        self.connection.send(episode)


def play_in_processes(
    episodes: Sequence[Episode], settings: Settings, workers: int
) -> Iterator[Outcome]:
    """Play on several processes of this machine; outcomes come as they finish.

    Where there are several GPUs, each computes the batches of its own players. A process that
    dies gives its episode back as crashed and is replaced. Raises ValueError with what a player
    refused.
    """
    gpus = len(visible_gpus()) if settings.device == 'cuda' and settings.batch > 1 else 1
    if gpus > 1:
        yield from _play_on_gpus(divide(episodes, gpus), settings, -(-workers // gpus))
    else:
        yield from _play_on_one(episodes, settings, workers)


def divide(episodes: Sequence[Episode], parts: int) -> list[list[Episode]]:
    """Cut the list where the parts may take equally long, so that each meets few tasks."""
    total, before = sum(episode.cap for episode in episodes), 0
    found: list[list[Episode]] = [[] for _ in range(parts)]
    for episode in episodes:
        found[before * parts // total].append(episode)
        before += episode.cap
    return [part for part in found if part]


def _play_share(
    connection: Connection, episodes: Sequence[Episode], settings: Settings, workers: int
) -> None:
    try:
        for outcome in _play_on_one(episodes, settings, workers):
            connection.send(outcome)
    except (ValueError, RuntimeError) as error:
        connection.send(error)
    connection.send(None)


def _play_on_gpus(
    shares: Sequence[Sequence[Episode]], settings: Settings, workers: int
) -> Iterator[Outcome]:
    """Play each share in a process that has players and a GPU of its own."""
    context = mp.get_context('spawn')
    processes, live = [], []
    for index, share in enumerate(shares):
        mine, theirs = context.Pipe()
        process = context.Process(target=_play_share, args=(theirs, share, settings, workers))
        with computes_on(index):
            process.start()
        theirs.close()
        processes.append(process)
        live.append(mine)
    try:
        while live:
            for connection in wait(live):
                assert isinstance(connection, Connection)
                try:
                    told = connection.recv()
                except EOFError:
                    raise RuntimeError('a process with a GPU of its own died') from None
                if told is None:
                    live.remove(connection)
                elif isinstance(told, Exception):
                    raise told
                else:
                    yield told
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _play_on_one(
    episodes: Sequence[Episode], settings: Settings, workers: int
) -> Iterator[Outcome]:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # read by the children, which compute alone
    queue, inference = Queue(episodes), BatchedInference(settings)
    team = [_Worker(settings, index) for index in range(min(workers, len(episodes)))]
    try:
        for worker in team:
            worker.give(queue.next(''))
        yield from _collect(team, queue, settings, inference)
    finally:
        for worker in team:
            if worker.episode is None:  # was told to end
                worker.process.join(GRACE_S)
            worker.process.terminate()
        for worker in team:
            worker.process.join()


def _collect(
    team: list[_Worker], queue: Queue, settings: Settings, inference: BatchedInference
) -> Iterator[Outcome]:
    asked: list[tuple[_Worker, Variant, tuple[Observation, int]]] = []
    deaths = 0
    while busy := [w for w in team if w.episode is not None]:
        waiting_for_answer = [worker for worker, _, _ in asked]
        others = {w.connection: w for w in busy if w not in waiting_for_answer}
        ready = wait(list(others), timeout=PATIENCE_S if asked else None) if others else []
        for connection in ready:
            worker = others[connection]  # type: ignore[index]
            try:
                message = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                deaths += 1
                yield _buried(worker, deaths)
                place = team.index(worker)
                team[place] = fresh = _Worker(settings, place)
                fresh.give(queue.next(''))
                continue
            if message[0] == 'ask':
                asked.append((worker, message[1], (message[2], message[3])))
            elif message[0] == 'refused':
                raise ValueError(message[1])
            else:
                task = worker.episode.task_name if worker.episode else ''
                worker.give(queue.next(task))
                yield message[1]
        if asked and not ready:
            _answer(asked, inference)
            asked = []


def _answer(
    asked: list[tuple[_Worker, Variant, tuple[Observation, int]]], inference: BatchedInference
) -> None:
    for variant in dict.fromkeys(variant for _, variant, _ in asked):
        group = [(worker, question) for worker, v, question in asked if v == variant]
        answers = inference.answers(variant, [question for _, question in group])
        for (worker, _), answer in zip(group, answers, strict=True):
            worker.connection.send(answer)


def _buried(worker: _Worker, deaths: int) -> Outcome:
    assert worker.episode is not None
    worker.process.join()
    text = f'the player process ended with exit code {worker.process.exitcode}'
    if deaths > MAX_DEATHS:
        raise RuntimeError(f'{text}; {deaths} processes have died, giving up')
    return Outcome(worker.episode, 'crashed', error=text)


def play_on_ray(
    episodes: Sequence[Episode], settings: Settings, workers: int, address: str
) -> Iterator[Outcome]:
    """Play on the actors of a Ray cluster, one core each; outcomes come as they finish.

    Every node needs this package and its scenes (packed, or QUANTVLA_SCENES).
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('--ray needs the ray package: pip install ray') from error
    ray.init(address=address, log_to_driver=False)
    remote_player: Callable[..., Any] = ray.remote(num_cpus=1)(Player).remote
    queue = Queue(episodes)
    running: dict[Any, tuple[Any, Episode]] = {}

    def give(actor: Any, task: str) -> None:
        episode = queue.next(task)
        if episode is not None:
            running[actor.play.remote(episode)] = (actor, episode)

    try:
        for _ in range(min(workers, len(episodes))):
            give(remote_player(settings), '')
        while running:
            done, _ = ray.wait(list(running))
            actor, episode = running.pop(done[0])
            try:
                yield ray.get(done[0])
                give(actor, episode.task_name)
            except ray.exceptions.RayActorError as error:
                yield Outcome(episode, 'crashed', error=f'the Ray actor died: {error}')
                give(remote_player(settings), '')
    finally:
        ray.shutdown()
