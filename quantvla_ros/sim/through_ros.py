# SPDX-License-Identifier: Apache-2.0
"""Play episodes through the ROS graph: sim_node in lockstep, policy_node, DDS between them.

What is driven is what a robot runs: the node's own seeds, seams, limits and stops. Every chunk
whose messages were heard here too is computed again in this process, from the same frames and
the same seed, and must be equal to the last bit. Nothing is paired with episodes in process: the
node's noise is another.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantvla_ros.contract import load_contract
from quantvla_ros.graph import Process, environment, graph_named
from quantvla_ros.processes import Supervisor
from quantvla_ros.resources import share_path
from quantvla_ros.sim.episodes import Episode, Outcome, Settings, Variant
from quantvla_ros.sim.players import load_policy
from quantvla_ros.up import stopped_by_signals

if TYPE_CHECKING:
    from quantvla_ros.nodes.chunk_audit import ChunkAudit, HeardChunk
    from quantvla_ros.nodes.operator import Operator
    from quantvla_ros.policies.base import Policy

START_S = 300.0  # loading the scene and the policy on a slow machine
ENABLE_S = 60.0
STILL_S = 60.0  # an episode that does not move on for so long has crashed
MAX_PAUSES = 5  # stops of the policy node that an episode may go on after
THREADS = 1  # here and in the node: sums in another order are other bits


def check(settings: Settings) -> None:
    """Raise ValueError for what the graph cannot do."""
    plain = Settings()
    refused = {
        '--real': settings.real, '--perturb': settings.noise_rad, '--recovery': settings.slip,
        '--execute': settings.execute, '--batch': settings.batch > 1,
        '--device': settings.device != plain.device,
    }
    wrong = [name for name, given in refused.items() if given]
    if wrong:
        raise ValueError(f'--through-ros plays as the nodes do, on the CPU; leave out '
                         f'{", ".join(wrong)}')


def processes_of(settings: Settings, variant: Variant, first: Episode) -> list[Process]:
    """Return sim and policy node for a variant, as the graph describes them."""
    given = {
        'contract': settings.contract, 'policy': settings.policy, 'model': settings.model,
        'precision': variant.precision, 'calibration': variant.calibration,
        'mode': 'lockstep', 'enable_on_activate': 'false',
        'params_file': str(share_path('config/slow_machine.yaml')),
        'lighting': settings.lighting,
    }
    more: dict[str, dict[str, bool | int | float | str]] = {
        'sim': {'suite': first.suite, 'task': first.task, 'max_texture': settings.max_texture},
        'policy': {'steps': variant.steps, 'threads': THREADS, 'seed': settings.seed},
    }
    return [
        replace(process, parameters={**process.parameters, **more[process.name]})
        for process in graph_named('sim').processes(given)
    ]


def play_through_ros(
    episodes: Sequence[Episode], settings: Settings, folder: Path
) -> Iterator[Outcome]:
    """Play on one graph for each variant; the nodes' words go to FOLDER/ros.txt.

    Raises ValueError with the last of them when the graph does not come up or ends.
    """
    os.environ.update(environment('local'))  # this process speaks over the same transport
    folder.mkdir(parents=True, exist_ok=True)
    for variant in dict.fromkeys(episode.variant for episode in episodes):
        mine = [episode for episode in episodes if episode.variant == variant]
        with (folder / 'ros.txt').open('a') as log:
            yield from _play_variant(mine, settings, log.name, log)


def _play_variant(
    episodes: Sequence[Episode], settings: Settings, name: str, log: object
) -> Iterator[Outcome]:
    from quantvla_ros.nodes.chunk_audit import ChunkAudit
    from quantvla_ros.nodes.operator import Operator

    contract, variant = load_contract(settings.contract), episodes[0].variant
    policy = load_policy(settings, variant, THREADS)
    stop = threading.Event()
    with stopped_by_signals(stop), Supervisor(log) as supervisor:  # type: ignore[arg-type]
        for process in processes_of(settings, variant, episodes[0]):
            supervisor.start(process)

        def over() -> bool:
            return stop.is_set() or supervisor.first_ended() is not None

        with Operator(stop=over) as operator:
            audit = ChunkAudit(operator, contract)
            _raise_unless(
                operator.wait(lambda: operator.policy.get('lifecycle') == 'active', START_S),
                f'the policy node was not ready within {START_S:g} s', name)
            for episode in episodes:
                outcome = play(operator, audit, policy, episode, over)
                if stop.is_set():  # cut off, not crashed: nothing of it is kept
                    raise ValueError('stopped; the same command goes on where it was')
                yield outcome
                _raise_unless(not over(), 'a node ended', name)


def _raise_unless(good: bool, sentence: str, log: str) -> None:  # noqa: FBT001
    if not good:
        lines = Path(log).read_text().splitlines()[-12:]
        raise ValueError(f'{sentence}; the last lines of {log}:\n' + '\n'.join(lines))


def play(
    operator: Operator, audit: ChunkAudit, policy: Policy, episode: Episode,
    over: Callable[[], bool],
) -> Outcome:
    """Play one episode to success, cap, refusal or standstill, then check its chunks."""
    outcome = Outcome(episode, 'failure')
    began = time.monotonic()
    try:
        operator.disable()
        report = operator.start_episode(episode.suite, episode.task, episode.start)
        said = report['instruction']
        operator.wait(lambda: operator.policy.get('instruction') == said, ENABLE_S)
        audit.clear()
        _run(operator, outcome, over)
        operator.disable()
        operator.wait(lambda: False, 0.3)  # the last chunk may still be on its way
    except ValueError as error:  # no answer in time: not the policy's fault
        outcome.status, outcome.error = 'crashed', str(error)
    heard = audit.chunks()
    outcome.chunks = len(heard)
    outcome.compared, outcome.different = compare(heard, policy)
    outcome.seconds = time.monotonic() - began
    return outcome


def _run(operator: Operator, outcome: Outcome, over: Callable[[], bool]) -> None:
    cap, pauses, step, moved = outcome.episode.cap, 0, -1, time.monotonic()
    _enable(operator)
    while not over():
        operator.spin(0.05)
        report = operator.episode
        outcome.steps = min(report['step'], cap)
        if report['success'] or report['step'] >= cap:
            in_time = report['success'] and report['succeeded_at'] <= cap
            outcome.status = 'success' if in_time else 'failure'
            outcome.steps = report['succeeded_at'] if in_time else cap
            return
        if report['step'] != step:
            step, moved = report['step'], time.monotonic()
        if time.monotonic() - moved > STILL_S:
            raise ValueError(f'the episode stood still for {STILL_S:g} s at step {step}')
        if operator.policy.get('state') not in ('running', 'stopping'):
            cause = operator.policy.get('cause') or {}
            if cause.get('kind') == 'policy_refused':
                outcome.status, outcome.error = 'refused', cause['sentence']
                return
            pauses += 1
            if pauses > MAX_PAUSES:
                raise ValueError(f'the policy node stopped {pauses} times, the last time because '
                                 f'{cause.get("sentence", "of an unknown cause")}')
            _enable(operator)
    raise ValueError('a node ended')


def _enable(operator: Operator) -> None:
    """Enable, again and again for a while: data may be stale for a moment after a reset."""
    end, reason = time.monotonic() + ENABLE_S, 'not tried'
    while reason and time.monotonic() < end:
        reason = operator.enable()
        operator.wait(lambda: operator.policy.get('state') == 'running', 1.0)
    if reason:
        raise ValueError(f'the policy node does not start: {reason}')


def compare(heard: Sequence[HeardChunk], policy: Policy) -> tuple[int, int]:
    """Compute chunks again; return how many were compared and how many differ in any bit."""
    compared = different = 0
    for chunk in heard:
        if chunk.observation is None or chunk.origin.prefixed:
            continue
        again = policy.denoise(policy.prepare(chunk.observation), chunk.origin.seed)
        compared += 1
        different += not np.array_equal(again.positions, chunk.positions)
    return compared, different
